"""``dynrank plan``: the trained parameters and the bytes of a run by rank, from its configuration only."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from dynrank.app.console import print_facts
from dynrank.app.keys import names_keys
from dynrank.app.planner.step import count_step, storage_bytes
from dynrank.app.runs.config import PlanKeys, plain, read_keys
from dynrank.app.runs.job import adapter_of, lacks_data, lora_arguments, make_scheduler, make_task
from dynrank.app.tasks.optimizers import make_optimizer
from dynrank.errors import ConfigurationError
from dynrank.importance.importance import bytes_held, shares_by_importance
from dynrank.layers.finding import adapter_parameters, own_layers
from dynrank.output.console import empty_table, print_table, span
from dynrank.output.ranks import layer_kinds

# Lightning's precisions: (dtype of all parameters or None for no change, dtype of autocast).
_PRECISIONS: dict[str, tuple[torch.dtype | None, torch.dtype | None]] = {
    "32": (None, None),
    "32-true": (None, None),
    "bf16-true": (torch.bfloat16, None),
    "16-true": (torch.float16, None),
    "bf16-mixed": (None, torch.bfloat16),
    "16-mixed": (None, torch.float16),
}
# The parts of Need.bytes in the order of the table.
_PARTS = ("weights", "adapter", "optimizer", "importance", "activations", "gradients", "logits")


@dataclass(frozen=True)
class Need:
    """What training at one rank needs.

    Attributes:
        rank: rank of the layers that no rule sets.
        ranks: of all layers.
        parameters: number of parameters of all LoRA layers.
        of: number of parameters of the model without LoRA.
        bytes: {part: its bytes}: ``weights``, the frozen base and all buffers; ``adapter``, the factors and the modules
            that are trained without LoRA; the state of the ``optimizer``; what the ``importance`` of layers is computed
            from, until the last stage of the schedule that shares ranks by it; ``activations``, the tensors that the
            forward saves for the backward; ``gradients`` of the adapter, when the backward ends; ``logits``, two
            gradients of the logits in float32, when the backward begins.
    """

    rank: int
    ranks: set[int]
    parameters: int
    of: int
    bytes: dict[str, int]

    @property
    def total(self) -> int:
        """The peak of a step, without what single operations take for a moment."""
        return sum(self.bytes.values()) - min(self.bytes["gradients"], self.bytes["logits"])


def show_plan(config: DictConfig) -> None:
    """Print what the run of ``config`` needs at each rank, and what fits the budget."""
    facts, needs = make_plan(config)
    budget = read_keys(PlanKeys, config).budget
    title = "MiB by rank; the total has the larger of gradients and logits, as one ends before the other begins"
    headings = ["rank", "LoRA parameters", "of model", *_PARTS, "total", *([] if budget is None else ["fits"])]
    table = empty_table(title, *headings)
    for need in needs:
        # Layers of a rank map may have other ranks.
        of_others = "" if need.ranks == {need.rank} else f" ({span(need.ranks)})"
        cells = [f"{need.rank}{of_others}", f"{need.parameters:,}", f"{need.parameters / need.of:.2%}"]
        cells += [_mebibytes(size) for size in (*(need.bytes[part] for part in _PARTS), need.total)]
        if budget is not None:
            cells.append("yes" if need.total <= budget else "no")
        table.add_row(*cells)
    print_facts(facts)
    print_table(table)
    if budget is not None:
        fit = [need.rank for need in needs if need.total <= budget]
        lacking = f"none of these fits; rank {needs[0].rank} lacks {_mebibytes(needs[0].total - budget)} MiB"
        said = f"rank {max(fit)} is the highest of these that fits" if fit else lacking
        print_facts({"budget": f"{_mebibytes(budget)} MiB: {said}"})


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:,.1f}"


@names_keys
def make_plan(config: DictConfig) -> tuple[dict[str, str], list[Need]]:
    """What the run of ``config`` (composed from ``conf/plan.yaml``) trains, in words, and its need at each rank.

    Both are made without any weights; ranks ascend.
    """
    precision = _PRECISIONS.get(str(config.trainer.precision))
    if precision is None:
        raise ConfigurationError(f"trainer.precision must be one of {[*_PRECISIONS]}, got {config.trainer.precision!r}")
    dtype, autocast = precision
    measures = shares_by_importance(make_scheduler(config.schedule).driver.stages)
    options = plain(config.optimizer)
    lora = lora_arguments(config, adapter_of(config))
    # Triton's op saves the same tensors as torch's, which can run on tensors without values.
    lora["backend"] = lora["backend"].replace("triton", "torch")
    # Its data are read once for all ranks.
    task = make_task(config, on_meta=True)
    rows, length = (getattr(task, name, None) for name in ("batch_size", "max_length"))
    if rows is None or length is None:
        raise ConfigurationError("dynrank plan needs a batch: the attributes batch_size and max_length of the task")
    needs = []
    for rank in sorted({*read_keys(PlanKeys, config).ranks}):
        model: Any = task.module({**lora, "rank": rank}, options, on_meta=True).model.train()
        if dtype is not None:
            nn.Module.to(model, dtype)
        if hasattr(model.config, "use_cache"):
            # A training step does not need the cache of keys and values.
            model.config.use_cache = False
        factors = adapter_parameters(model)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        parameters = sum(factor.numel() for factor in factors)
        parts = count_step(model, rows, length, autocast)
        parts["optimizer"] = _optimizer_state_bytes(trained, options)
        parts["importance"] = bytes_held(factors) if measures else 0
        layers = own_layers(model)
        of = sum(parameter.numel() for parameter in model.parameters()) - parameters
        needs.append(Need(rank, {layer.rank for layer in layers.values()}, parameters, of, parts))
    packing = config.model.quantization
    base = str(model.dtype).removeprefix("torch.") if packing == "none" else packing
    name = config.task.get("model") or type(model).__name__
    facts = {
        "model": f"{name} ({type(model).__name__}), {of:,} parameters, base in {base}",
        "LoRA": f"{len(layers)} layers: {', '.join(dict.fromkeys(layer_kinds(layers).values()))}",
    }
    whole = sum(parameter.numel() for parameter in trained) - parameters
    if whole:
        unknown = ", a head of two classes: data.train is not set" if lacks_data(config) else ""
        facts["trained whole"] = f"{whole:,} parameters{unknown}"
    facts["batch"] = f"{rows} x {length} tokens; optimizer {config.optimizer.name}"
    return facts, needs


def _optimizer_state_bytes(trained: Iterable[nn.Parameter], options: Mapping[str, Any]) -> int:
    """The bytes of the state that the optimizer of these ``options`` has after a step.

    The step runs on zeros, with one parameter of each shape and dtype. A table that an 8-bit optimizer shares among its
    parameters counts for each.
    """
    counts = Counter((parameter.shape, parameter.dtype) for parameter in trained)
    stand_ins = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape, dtype in counts]
    for stand_in in stand_ins:
        stand_in.grad = torch.zeros_like(stand_in)
    made: Any = make_optimizer(stand_ins, [], 1000, **options)
    optimizer = made["optimizer"]
    optimizer.step()
    states = [optimizer.state[stand_in].values() for stand_in in stand_ins]
    sizes = [storage_bytes(value for value in state if isinstance(value, Tensor)) for state in states]
    return sum(count * size for count, size in zip(counts.values(), sizes, strict=True))
