"""A stored adapter with the examples in a user's file, for --gates of ``dynrank squeeze`` and ``inspect``."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import datasets
import torch
from torch import Tensor

from dynrank.adapters.by_data import effects, greedy
from dynrank.adapters.predicting import answering
from dynrank.adapters.read import Adapter
from dynrank.adapters.sidecar_files import label_names
from dynrank.errors import ConfigurationError
from dynrank.layers.base import params_per_rank
from dynrank.layers.finding import lora_layers
from dynrank.output.console import quiet_loading
from dynrank.targets import Budget, Rank, Target
from dynrank.tasks.adapter_module import IGNORED
from dynrank.tasks.classification import Classification
from dynrank.tasks.data.columns import Columns, Form, Theirs, find_columns, form_of
from dynrank.tasks.data.source import Source
from dynrank.tasks.data.splits import Checked
from dynrank.tasks.data.stored import counted
from dynrank.tasks.language_modeling import LanguageModeling
from dynrank.tasks.loader import spread
from dynrank.tasks.text_task import TextTask

# The forms of a language model's examples; the first form whose columns the file has is used.
WRITTEN: tuple[Form, ...] = ("chat", "completion", "text")
# Largest number of examples, and the smallest one that gates can be measured with.
EXAMPLES = 640
FEW = 32
# Largest number of tokens of an example: longer texts are cut, longer answers are left out.
LENGTH = 512


class Gated:
    """A stored adapter on its base ``model`` (None: as the adapter names it), and the examples in the file ``data``.

    ``columns`` is {our name: the file's name} of columns with unusual names.
    """

    def __init__(self, adapter: Adapter, data: str, model: str | None, columns: Mapping[str, Theirs]) -> None:
        quiet_loading()
        # A wrong column is reported before the model is loaded, which takes longer.
        source = Source(data, "--data", "train")
        _columns(source, ("classification", *WRITTEN), columns)
        self.model, tokenizer = answering(adapter, model)
        self.examples = _examples(self.model, tokenizer, source, columns)
        layers = dict(lora_layers(self.model))
        self._widths = {name: params_per_rank(layer) for name, layer in layers.items()}
        # transformers' losses of language models count the labels after the first position.
        terms = [int((e["labels"][:, 1:] != IGNORED).sum()) if self.model.can_generate() else 1 for e in self.examples]
        self._terms = torch.tensor(terms)
        self._effects = effects(layers, self._losses(), scale=1024 if self.model.dtype == torch.float16 else 1)

    def kept(self, target: Target) -> dict[str, Tensor]:
        """{layer: the directions to keep, ascending} for a target of type Rank or Budget."""
        lowest = 1
        pool = 0
        if isinstance(target, Budget):
            pool = target.parameters or 0
        elif isinstance(target, Rank):
            assert isinstance(target.rank, int)
            lowest = target.rank
        return greedy(self._effects, self._terms, self._widths, lowest, pool)

    @torch.no_grad()
    def loss(self) -> float:
        """The mean loss of the examples."""
        return sum(float(loss) for loss in self._losses()) / len(self.examples)

    def _losses(self) -> Iterator[Tensor]:
        for example in self.examples:
            yield self.model(**{key: value.to(self.model.device) for key, value in example.items()}).loss


def _columns(source: Source, forms: Sequence[Form], given: Mapping[str, Theirs]) -> Columns:
    """The columns of the first of ``forms`` that the source has."""
    form = form_of(source.sample, forms, given, source.where)
    return find_columns(source.sample, given, form, source.where, source.types)


def _examples(model: Any, tokenizer: str, source: Source, columns: Mapping[str, Theirs]) -> list[dict[str, Tensor]]:
    """Up to ``EXAMPLES`` batches of one example each, with labels."""
    if model.config.is_encoder_decoder:
        raise ConfigurationError(f"--gates takes classifiers and causal language models, got a {type(model).__name__}")
    found = _columns(source, WRITTEN if model.can_generate() else ("classification",), columns)
    rows, _ = source.read(found)
    rows = spread(rows.remove_columns(["digest", "place"]), EXAMPLES)
    options: Any = {"model": tokenizer, "data": Checked(train=rows), "max_length": LENGTH}
    if found.form == "classification":
        task: TextTask = _named(Classification(**options), model, source.where)
    else:
        task = LanguageModeling(**options, form=found.form)
    # Decoders classify by the last token that is not padding.
    model.config.pad_token_id = task.tokenizer.pad_token_id
    examples = spread(task.examples_of(task.rows["train"], "--data"), EXAMPLES)
    if len(examples) < FEW:
        raise ConfigurationError(f"{source.where} must have at least {FEW} examples, got {len(examples)}")
    return [task.collate([example]) for example in examples]


def _named(task: Classification, model: Any, where: str) -> Classification:
    """The task with the model's classes in the model's order."""
    names = label_names(model) or [str(index) for index in range(model.config.num_labels)]
    rows = task.rows["train"]
    kind = datasets.Value("string")
    rows = rows.cast_column("label", datasets.Sequence(kind) if task.several else kind)
    strange = sorted(counted(rows).keys() - set(names))
    if strange:
        raise ConfigurationError(f"labels in {where} must be the adapter's, {names[:9]}, got {strange[:9]}")
    task.rows = Checked({"train": rows})
    task.labels = names
    return task
