"""``dynrank plan``: the trained parameters and the bytes of a run by rank, from its configuration only."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig
from rich.table import Table
from torch import Tensor, nn
from transformers import PreTrainedModel

from dynrank.adapters.read import Adapter
from dynrank.app.console import print_facts
from dynrank.app.keys import names_keys
from dynrank.app.models.pretrained import storage_bytes, tensors_of
from dynrank.app.planner.step import count_forward, token_batch, without_values
from dynrank.app.runs.config import PlanKeys, plain, read_keys
from dynrank.app.runs.job import adapter_of, lacks_data, lora_arguments, make_scheduler, make_task
from dynrank.app.tasks.optimizers import make_optimizer
from dynrank.errors import ConfigurationError
from dynrank.importance.importance import bytes_held, shares_by_importance
from dynrank.layers.finding import adapter_parameters, own_layers, parameter_count
from dynrank.output.console import empty_table, print_table, span
from dynrank.output.ranks import layer_kinds

_PARTS = ("weights", "adapter", "optimizer", "importance", "activations", "gradients", "logits")
# Lightning's precisions: (dtype of all parameters or None for no change, dtype of autocast).
_PRECISIONS: dict[str, tuple[torch.dtype | None, torch.dtype | None]] = {
    "32": (None, None),
    "32-true": (None, None),
    "bf16-true": (torch.bfloat16, None),
    "16-true": (torch.float16, None),
    "bf16-mixed": (None, torch.bfloat16),
    "16-mixed": (None, torch.float16),
}


@dataclass(frozen=True)
class Need:
    """What training at one rank needs, in bytes except for the first four.

    Attributes:
        rank: rank of the layers that no rule sets.
        ranks: (lowest, highest) rank of all layers.
        parameters: number of parameters of all LoRA layers.
        of: number of parameters of the model without LoRA.
        weights: the frozen base and all buffers.
        adapter: the factors, and the modules that are trained without LoRA.
        optimizer: the optimizer's state.
        importance: what the importance of layers is computed from, until the last stage of the schedule that shares
            ranks by it; 0 if there is none.
        activations: the tensors that the forward saves for the backward.
        gradients: those of the adapter, when the backward ends.
        logits: two gradients of the logits in float32, when the backward begins.
    """

    rank: int
    ranks: tuple[int, int]
    parameters: int
    of: int
    weights: int
    adapter: int
    optimizer: int
    importance: int
    activations: int
    gradients: int
    logits: int

    @property
    def total(self) -> int:
        """The peak of a step, without what single operations take for a moment."""
        lasting = self.weights + self.adapter + self.optimizer + self.importance
        return lasting + self.activations + max(self.gradients, self.logits)


def show_plan(config: DictConfig) -> None:
    """Print what the run of ``config`` needs at each rank, and what fits the budget."""
    facts, needs = make_plan(config)
    budget = read_keys(PlanKeys, config).budget
    print_facts(facts)
    print_table(_table(needs, budget))
    print("total            weights + adapter + optimizer + importance + activations + the larger of the last two: the")
    print(
        "                 gradients of the logits (two, in float32) when the backward begins, those of the adapter when"
    )
    print("                 it ends; importance: two copies of the factors, until ranks have been shared by importance")
    if budget is not None:
        fit = [need.rank for need in needs if need.total <= budget]
        lacking = needs[0].total - budget
        said = f"none of these fits; rank {needs[0].rank} lacks {_mebibytes(lacking)} MiB"
        if fit:
            said = f"rank {max(fit)} is the highest of these that fits"
        print(f"budget           {_mebibytes(budget)} MiB: {said}")


def _table(needs: Sequence[Need], budget: int | None) -> Table:
    more = [] if budget is None else ["fits"]
    table = empty_table("MiB by rank", "rank", "LoRA parameters", "of model", *_PARTS, "total", *more)
    for need in needs:
        # Layers of a rank map may have other ranks.
        of_others = "" if need.ranks == (need.rank, need.rank) else f" ({span(need.ranks)})"
        cells = [f"{need.rank}{of_others}", f"{need.parameters:,}", f"{need.parameters / need.of:.2%}"]
        cells += [_mebibytes(getattr(need, part)) for part in (*_PARTS, "total")]
        if budget is not None:
            cells.append("yes" if need.total <= budget else "no")
        table.add_row(*cells)
    return table


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:,.1f}"


@names_keys
def make_plan(config: DictConfig) -> tuple[dict[str, str], list[Need]]:
    """What the run of ``config`` (composed from ``conf/plan.yaml``) trains, in words, and its need at each rank.

    Both are made without any weights; ranks ascend.
    """
    keys = read_keys(PlanKeys, config)
    precision = _PRECISIONS.get(str(config.trainer.precision))
    if precision is None:
        raise ConfigurationError(f"trainer.precision must be one of {[*_PRECISIONS]}, got {config.trainer.precision!r}")
    dtype, autocast = precision
    needs = []
    adapter = adapter_of(config)
    measures = shares_by_importance(make_scheduler(config.schedule).driver.stages)
    # Its data are read, and printed, once.
    task = make_task(config, on_meta=True)
    rows, length = (getattr(task, name, None) for name in ("batch_size", "max_length"))
    if rows is None or length is None:
        raise ConfigurationError("dynrank plan needs a batch: the attributes batch_size and max_length of the task")
    for rank in sorted(set(keys.ranks)):
        model = _model(task, config, adapter, rank)
        for parameter in model.parameters() if dtype is not None else ():
            parameter.data = parameter.data.to(dtype)
        factors = set(adapter_parameters(model))
        head = [p for p in model.parameters() if p.requires_grad and p not in factors]
        state = _optimizer_state_bytes(factors, head, plain(config.optimizer))
        importance = bytes_held(adapter_parameters(model)) if measures else 0
        needs.append(_need(model, rank, (rows, length), autocast, state, importance))
    name = config.task.get("model") or type(model).__name__
    packing = config.model.quantization
    base = str(model.dtype).removeprefix("torch.") if packing == "none" else packing
    layers = own_layers(model)
    facts = {
        "model": f"{name} ({type(model).__name__}), {needs[-1].of:,} parameters, base in {base}",
        "LoRA": f"{len(layers)} layers: {', '.join(dict.fromkeys(layer_kinds(layers).values()))}",
    }
    if head:
        unknown = ", a head of two classes: data.train is not set" if lacks_data(config) else ""
        facts["trained whole"] = f"{sum(parameter.numel() for parameter in head):,} parameters{unknown}"
    facts["batch"] = f"{rows} x {length} tokens; optimizer {config.optimizer.name}"
    return facts, needs


def _model(task: Any, config: DictConfig, adapter: Adapter | None, rank: int) -> PreTrainedModel:
    """The model of the task with its LoRA layers, on the meta device."""
    lora = {**lora_arguments(config, adapter), "rank": rank}
    if lora["backend"] == "triton":
        # It saves the same tensors as torch's, which can run on tensors without values.
        lora["backend"] = "torch"
    model: PreTrainedModel = task.module(lora, plain(config.optimizer), on_meta=True).model
    return model.train()


def _need(
    model: PreTrainedModel,
    rank: int,
    batch: tuple[int, int],
    autocast: torch.dtype | None,
    optimizer: int,
    importance: int,
) -> Need:
    """The need of a model with its LoRA layers; ``optimizer`` and ``importance`` are in bytes."""
    ranks = [layer.rank for layer in own_layers(model).values()]
    parameters = sum(factor.numel() for factor in adapter_parameters(model))
    if hasattr(model.config, "use_cache"):
        # A training step does not need the cache of keys and values.
        model.config.use_cache = False
    mode = without_values(model)
    adapter = storage_bytes(parameter for parameter in model.parameters() if parameter.requires_grad)
    # bitsandbytes' forward for int8 takes tables off the weights, so they are counted before it.
    weights = storage_bytes(tensors_of(model)) - adapter
    with mode:
        activations, logits = count_forward(model, token_batch(model, *batch), autocast)
    return Need(
        rank=rank,
        ranks=(min(ranks), max(ranks)),
        parameters=parameters,
        of=parameter_count(model.parameters()) - parameters,
        weights=weights,
        adapter=adapter,
        optimizer=optimizer,
        importance=importance,
        activations=activations,
        gradients=adapter,
        logits=8 * logits,
    )


def _optimizer_state_bytes(
    adapter: Iterable[nn.Parameter], head: Iterable[nn.Parameter], options: Mapping[str, Any]
) -> int:
    """The bytes of the optimizer's state after a step, by the shapes and dtypes of the parameters.

    The step runs on zeros, with one parameter of each shape and dtype. A table that an 8-bit optimizer shares among its
    parameters counts for each. The arguments are those of :func:`dynrank.app.tasks.optimizers.make_optimizer`.
    """
    of_adapter = _stand_ins(adapter)
    of_head = _stand_ins(head)
    made: Any = make_optimizer([*of_adapter], [*of_head], 1000, **options)
    optimizer = made["optimizer"]
    try:
        optimizer.step()
    except (RuntimeError, TypeError) as error:
        raise ConfigurationError(
            f"optimizer.name={options['name']} cannot make a step: {error}; set optimizer"
        ) from error
    total = 0
    for parameter, count in (of_adapter | of_head).items():
        state = optimizer.state[parameter].values()
        total += count * storage_bytes(value for value in state if isinstance(value, Tensor))
    return total


def _stand_ins(parameters: Iterable[nn.Parameter]) -> dict[nn.Parameter, int]:
    """A new parameter of each shape and dtype -> how many of ``parameters`` it represents."""
    made = {}
    for (shape, dtype), count in Counter((parameter.shape, parameter.dtype) for parameter in parameters).items():
        parameter = nn.Parameter(torch.zeros(shape, dtype=dtype))
        parameter.grad = torch.zeros_like(parameter)
        made[parameter] = count
    return made
