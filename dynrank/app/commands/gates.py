"""What the loss of a user's examples needs of a stored adapter: --gates of ``dynrank squeeze`` and ``inspect``.

Every direction has a gate, a factor of 1 before it. Let c be the gradient of an example's loss by all gates. Dropping
the directions S changes the mean loss by about ``-sum_S g + 1/2 sum_{S x S} H``; g is the mean of c, and H that of
``n c c^T``, where the loss of an example is the mean of n terms (tokens): if the model's probabilities are right, this
is the Hessian's expected value.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import datasets
import torch
from torch import Tensor

from dynrank.adapters.read import Adapter
from dynrank.adapters.sidecar_files import label_names
from dynrank.app.console import quiet_loading
from dynrank.app.models.predicting import answering
from dynrank.app.tasks.adapter_module import IGNORED
from dynrank.app.tasks.classification import Classification
from dynrank.app.tasks.data.columns import Columns, Form, Theirs, find_columns, form_of, refuse_unread
from dynrank.app.tasks.data.source import Source
from dynrank.app.tasks.data.splits import Checked
from dynrank.app.tasks.data.stored import counted
from dynrank.app.tasks.language_modeling import LanguageModeling
from dynrank.app.tasks.loader import spread
from dynrank.app.tasks.text_task import TextTask
from dynrank.errors import ConfigurationError
from dynrank.layers.base import RankedLayer
from dynrank.layers.finding import lora_layers
from dynrank.linalg import directions_of, split
from dynrank.targets import Budget, Rank, Target

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
        self._widths = {name: layer.params_per_rank for name, layer in layers.items()}
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
    refuse_unread(columns, found)
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


def effects(layers: Mapping[str, RankedLayer], losses: Iterable[Tensor], scale: float = 1) -> dict[str, Tensor]:
    """{layer: (examples, rank) float64 gradients of the examples' losses by the gates of the layer's directions}.

    A gate multiplies a column b of B, so the gradient by it is the scalar product of b and the gradient by b. Losses
    are multiplied by ``scale`` before the backward pass: without it, small gradients would become zero in float16.
    """
    # For each product, U sqrt(S) of its SVD, and the map from the gradient by B to the gradient by U sqrt(S).
    sides: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for name, layer in layers.items():
        pairs = [(b, directions_of(b, a)) for b, a in layer.products()]
        sides[name] = [(b.detach().double() @ found.from_B, found.from_A.mT) for b, found in pairs]
    rows: dict[str, list[Tensor]] = {name: [] for name in layers}
    for loss in losses:
        factors = [layer.lora_B for layer in layers.values()]
        gradients = torch.autograd.grad(loss * scale, factors, allow_unused=True)
        for (name, layer), gradient in zip(layers.items(), gradients, strict=True):
            if gradient is None or not gradient.isfinite().all():
                what = "no gradient" if gradient is None else "a gradient that is not finite"
                raise ConfigurationError(f"{what} of an example in --data reaches {name!r}; squeeze without --gates")
            row = torch.zeros(layer.rank, dtype=torch.float64)
            parts = split(gradient.double() / scale, layer.num_products, 1)
            for (columns, to_columns), part in zip(sides[name], parts, strict=True):
                row[: columns.shape[1]] += (columns * (part.mT @ to_columns)).sum(0).cpu()
            rows[name].append(row)
    return {name: torch.stack(each) for name, each in rows.items()}


def greedy(
    effects: Mapping[str, Tensor],
    terms: Tensor,
    widths: Mapping[str, int],
    lowest: int,
    pool: int,
) -> dict[str, Tensor]:
    """{layer: the directions to keep, ascending} so that all layers have at most ``pool`` parameters together.

    The direction that adds least to the estimated loss per parameter (``widths``: those of a direction) is dropped
    again and again. Every layer keeps ``lowest`` directions in any case. Of equal candidates the smallest is dropped.
    ``terms`` are the numbers of terms in the examples' losses, (examples,).
    """
    names = sorted(effects)
    counts = [effects[name].shape[1] for name in names]
    slices = dict(zip(names, torch.split_with_sizes(torch.arange(sum(counts)), counts), strict=True))
    owners = [name for name, count in zip(names, counts, strict=True) for _ in range(count)]
    gradients = torch.cat([effects[name] for name in names], dim=1)
    # The Hessian is the mean of the products of these.
    roots = gradients * terms.double().sqrt()[:, None]
    sizes = torch.tensor([widths[name] for name in owners], dtype=torch.float64)
    left = dict(zip(names, counts, strict=True))
    total = int(sizes.sum())
    cost = 0.5 * roots.square().mean(0) - gradients.mean(0)
    kept = torch.ones(len(owners), dtype=torch.bool)
    free = torch.tensor([left[name] > lowest for name in owners])
    while total > pool and free.any():
        prices = torch.where(free, cost / sizes, torch.inf)
        gone = len(owners) - 1 - int(prices.flip(0).argmin())
        name = owners[gone]
        cost += roots.mT @ roots[:, gone] / len(roots)
        kept[gone] = free[gone] = False
        left[name] -= 1
        total -= widths[name]
        if left[name] == lowest:
            free[slices[name]] = False
    return {name: kept[slices[name]].nonzero().flatten() for name in effects}
