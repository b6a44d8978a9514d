"""Gates of a stored adapter from examples in a file, for the option --gates of ``dynrank squeeze`` and ``inspect``."""

from collections.abc import Iterator, Mapping
from contextlib import closing
from typing import Any

import datasets
import torch
from torch import Tensor

from dynrank.adapters.predicting import answering
from dynrank.adapters.read import Adapter
from dynrank.adapters.sidecar_files import label_names
from dynrank.change.gates import EXAMPLES, FEW, Gates
from dynrank.driver.check import layer_states
from dynrank.errors import ConfigurationError
from dynrank.layers.finding import lora_layers
from dynrank.output.console import quiet_loading
from dynrank.targets import Target
from dynrank.tasks.classification import Classification
from dynrank.tasks.data.columns import Form, form_of
from dynrank.tasks.data.files import from_source
from dynrank.tasks.data.source import Source
from dynrank.tasks.data.splits import Checked
from dynrank.tasks.data.stored import counted
from dynrank.tasks.language_modeling import LanguageModeling
from dynrank.tasks.loader import spread
from dynrank.tasks.text_task import TextTask

# The forms of a language model's examples; the first form whose columns the file has is used.
WRITTEN: tuple[Form, ...] = ("chat", "completion", "text")
# Largest number of tokens of an example: longer texts are cut, longer answers are left out.
LENGTH = 512


class WatchedAdapter:
    """A stored adapter on its base, with gates measured over up to ``EXAMPLES`` examples of a file, in eval mode.

    Args:
        adapter: adapter of a classifier or a causal language model.
        data: a file; each row has a text and a label, or for a language model messages, a prompt and an answer, or a
            text.
        model: the base model; None: as the adapter names it.
        columns: {our name: the file's name} of columns with unusual names.
        loss_terms: a batch's loss is the mean of this many terms; None: counted from the gradients.
    """

    def __init__(
        self, adapter: Adapter, data: str, model: str | None, columns: Mapping[str, str], loss_terms: int | None
    ) -> None:
        quiet_loading()
        source = Source(data, "--data", "train")
        # A wrong column is reported before the model is loaded, which takes longer.
        form_of(source.sample, ("classification", *WRITTEN), columns, source.where)
        self.model, tokenizer = answering(adapter, model)
        self.batches: list[dict[str, Tensor]] = _batches(self.model, tokenizer, source, columns)
        self._layers = dict(lora_layers(self.model))
        self.gates = Gates(self.model, self._layers, len(self.batches), loss_terms)
        # Without a scale, small gradients would become zero in float16.
        self.gates.loss_scale = 1024.0 if self.model.dtype == torch.float16 else 1.0
        with closing(self.gates):
            for loss in self._losses():
                torch.autograd.backward(loss * self.gates.loss_scale)
                self.gates.end_step()
                self.model.zero_grad()
        if not self.gates.examples or self.gates.unreached:
            raise ConfigurationError(
                f"no gradient of the examples in --data={data} reaches {self.gates.unreached[:3] or 'the adapter'}, so "
                "gates cannot tell what the loss needs; squeeze without --gates"
            )

    def ranks(self, target: Target) -> dict[str, int]:
        """{layer: the rank that ``target`` gives it by the gates}."""
        return target.ranks(layer_states(self._layers, last=True, target=target, directions=self.gates))

    @torch.no_grad()
    def loss(self) -> float:
        """The mean loss of the examples with the present adapter."""
        return sum(float(loss) for loss in self._losses()) / len(self.batches)

    def _losses(self) -> Iterator[Tensor]:
        for batch in self.batches:
            yield self.model(**{key: value.to(self.model.device) for key, value in batch.items()}).loss


def _batches(model: Any, tokenizer: str, source: Source, columns: Mapping[str, str]) -> list[dict[str, Tensor]]:
    if model.config.is_encoder_decoder:
        raise ConfigurationError(f"--gates takes classifiers and causal language models, got a {type(model).__name__}")
    rows, form = from_source(source, WRITTEN if model.can_generate() else ("classification",), columns)
    options: Any = {"model": tokenizer, "data": Checked(train=spread(rows, EXAMPLES)), "max_length": LENGTH}
    if form == "classification":
        task: TextTask = _named(Classification(**options, batch_size=8), model, source.where)
    else:
        task = LanguageModeling(**options, form=form, batch_size=2)
    # Decoders classify by the last token that is not padding.
    model.config.pad_token_id = task.tokenizer.pad_token_id
    examples = spread(task.examples_of(task.rows["train"], "--data"), EXAMPLES)
    if len(examples) < FEW:
        raise ConfigurationError(f"{source.where} must have at least {FEW} examples, got {len(examples)}")
    return [*task.evaluation(examples)]


def _named(task: Classification, model: Any, where: str) -> Classification:
    """The task with the model's classes in the model's order."""
    names = label_names(model) or [str(index) for index in range(model.config.num_labels)]
    rows, kind = task.rows["train"], datasets.Value("string")
    rows = rows.cast_column("label", datasets.Sequence(kind) if task.several else kind)
    strange = sorted(counted(rows).keys() - set(names))
    if strange:
        raise ConfigurationError(f"labels in {where} must be the adapter's, {names[:9]}, got {strange[:9]}")
    task.rows, task.labels = Checked({"train": rows}), names
    return task
