"""``dynrank plan``: the trained parameters and the bytes of a run by rank, from its configuration only."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from omegaconf import DictConfig
from rich.table import Table
from torch import Tensor, nn
from transformers import PreTrainedModel

from dynrank.errors import ConfigurationError, configured
from dynrank.layers.finding import adapter_parameters, own_layers
from dynrank.layers.placing import add_lora
from dynrank.models.names import ModelSettings
from dynrank.models.pretrained import meta_model, read_config, storage_bytes, storage_key, tensors_of
from dynrank.output.console import empty_table, print_table, span
from dynrank.output.ranks import layer_kinds
from dynrank.planner.step import count_forward, token_batch, without_values
from dynrank.private import FakeTensorMode
from dynrank.runs.config import PlanKeys, argument, plain
from dynrank.runs.job import lacks_data, lora_arguments, make_task
from dynrank.tasks.optimizers import make_optimizer

_PARTS = ("weights", "adapter", "optimizer", "activations", "gradients", "logits")
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
    """What training at one rank needs, in bytes except for the first three.

    Attributes:
        rank: rank of the layers that no rule sets.
        ranks: (lowest, highest) rank of all layers.
        parameters: number of parameters of all LoRA layers.
        weights: the frozen base and all buffers.
        adapter: the factors, and the modules that are trained without LoRA.
        activations: the tensors that the forward saves for the backward.
        gradients: those of the adapter, when the backward ends.
        logits: two gradients of the logits in float32, when the backward begins.
    """

    rank: int
    ranks: tuple[int, int]
    parameters: int
    weights: int
    adapter: int
    optimizer: int
    activations: int
    gradients: int
    logits: int

    @property
    def total(self) -> int:
        """The peak of a step, without what single operations take for a moment."""
        return self.weights + self.adapter + self.optimizer + self.activations + max(self.gradients, self.logits)


@dataclass(frozen=True)
class Plan:
    """The needs of a model and a batch.

    Attributes:
        model: name and class of the model.
        parameters: number of parameters of the model without LoRA.
        head_parameters: how many of these are in modules that are trained without LoRA.
        weights: dtype of the frozen base, or its packing, nf4 or int8.
        layers: names of the layers that have LoRA.
        batch: (sequences, tokens per sequence).
        budget: available bytes; None if not given.
        needs: one for each rank, ascending.
    """

    model: str
    parameters: int
    head_parameters: int
    weights: str
    layers: tuple[str, ...]
    batch: tuple[int, int]
    optimizer: str
    budget: int | None
    needs: tuple[Need, ...]


def show_plan(config: DictConfig) -> None:
    """Print the plan of ``config``."""
    plan = make_plan(config)
    kinds = dict.fromkeys(layer_kinds(plan.layers).values())
    print(f"model            {plan.model}, {plan.parameters:,} parameters, base in {plan.weights}")
    print(f"LoRA             {len(plan.layers)} layers: {', '.join(kinds)}")
    if plan.head_parameters:
        unknown = ", a head of two classes: data.train is not set" if config.base is None and lacks_data(config) else ""
        print(f"trained whole    {plan.head_parameters:,} parameters{unknown}")
    print(f"batch            {plan.batch[0]} x {plan.batch[1]} tokens; optimizer {plan.optimizer}")
    print_table(_table(plan))
    print("total            weights + adapter + optimizer + activations + the larger of the last two: the gradients of")
    print("                 the logits (two, in float32) when the backward begins, those of the adapter when it ends")
    if plan.budget is not None:
        fit = [need.rank for need in plan.needs if need.total <= plan.budget]
        lacking = plan.needs[0].total - plan.budget
        said = f"none of these fits; rank {plan.needs[0].rank} lacks {_mebibytes(lacking)} MiB"
        if fit:
            said = f"rank {max(fit)} is the highest of these that fits"
        print(f"budget           {_mebibytes(plan.budget)} MiB: {said}")


def _table(plan: Plan) -> Table:
    more = [] if plan.budget is None else ["fits"]
    table = empty_table("MiB by rank", "rank", "LoRA parameters", "of model", *_PARTS, "total", *more)
    for need in plan.needs:
        # Layers of a rank map may have other ranks.
        of_others = "" if need.ranks == (need.rank, need.rank) else f" ({span(need.ranks)})"
        cells = [f"{need.rank}{of_others}", f"{need.parameters:,}", f"{need.parameters / plan.parameters:.2%}"]
        cells += [_mebibytes(getattr(need, part)) for part in (*_PARTS, "total")]
        if plan.budget is not None:
            cells.append("yes" if need.total <= plan.budget else "no")
        table.add_row(*cells)
    return table


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:,.1f}"


@configured()
def make_plan(config: DictConfig) -> Plan:
    """The plan of the run of ``config`` (composed from ``conf/plan.yaml``), made without any weights."""
    asked = _asked(config)
    precision = _PRECISIONS.get(str(config.trainer.precision))
    if precision is None:
        raise ConfigurationError(f"trainer.precision must be one of {[*_PRECISIONS]}, got {config.trainer.precision!r}")
    dtype, autocast = precision
    settings = ModelSettings(**plain(config.model))
    size = asked.batch_size
    length = asked.sequence_length
    ranks = asked.ranks
    if size is None or length is None or ranks is None:
        raise ConfigurationError("the task has no batch_size or no max_length; set batch_size and sequence_length")
    batch = size, length
    needs = []
    for rank in sorted(set(ranks)):
        model = _model(config, asked.base, settings, rank)
        for parameter in model.parameters() if dtype is not None else ():
            parameter.data = parameter.data.to(dtype)
        factors = set(adapter_parameters(model))
        parameters = model.num_parameters() - sum(factor.numel() for factor in factors)
        head = [p for p in model.parameters() if p.requires_grad and p not in factors]
        state = _optimizer_state_bytes(factors, head, plain(config.optimizer))
        needs.append(_need(model, rank, batch, autocast, state))
    kind = str(model.dtype).removeprefix("torch.")
    name = asked.base or config.task.get("model") or type(model).__name__
    return Plan(
        model=f"{name} ({type(model).__name__})",
        parameters=parameters,
        head_parameters=sum(parameter.numel() for parameter in head),
        weights=kind if settings.quantization == "none" else settings.quantization,
        layers=tuple(own_layers(model)),
        batch=batch,
        optimizer=config.optimizer.name,
        budget=asked.budget,
        needs=tuple(needs),
    )


def _asked(config: DictConfig) -> PlanKeys:
    values = {field.name: plain(config[field.name]) for field in fields(PlanKeys)}
    for name, of_task in (("batch_size", "batch_size"), ("sequence_length", "max_length")):
        if values[name] is None:
            values[name] = argument(config.task, of_task)
    ranks = values["ranks"] if values["ranks"] is not None else config.lora.rank
    values["ranks"] = ranks if isinstance(ranks, list) else [ranks]
    return PlanKeys(**values)


def _model(config: DictConfig, base: str | None, settings: ModelSettings, rank: int) -> PreTrainedModel:
    """The model with its LoRA layers, on the meta device."""
    lora = {**lora_arguments(config), "rank": rank}
    # Every backend saves the same tensors, and torch's can run on tensors without values.
    lora["backend"] = "torch"
    if base is not None:
        return add_lora(meta_model(read_config(base, "base", settings), settings, "base").train(), **lora)
    task = make_task(config, on_meta=True)
    model: PreTrainedModel = task.module(lora, plain(config.optimizer), on_meta=True).model
    return model.train()


def _need(
    model: PreTrainedModel, rank: int, batch: tuple[int, int], autocast: torch.dtype | None, optimizer: int
) -> Need:
    """The need of a model with its LoRA layers; ``optimizer`` is the bytes of the optimizer's state."""
    ranks = [layer.rank for layer in own_layers(model).values()]
    if hasattr(model.config, "use_cache"):
        # A training step does not need the cache of keys and values.
        model.config.use_cache = False
    # bitsandbytes has tables with values.
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    without_values(model, mode)
    adapter = storage_bytes(parameter for parameter in model.parameters() if parameter.requires_grad)
    # bitsandbytes' forward for int8 takes tables off the weights, so they are counted before it.
    weights = storage_bytes(tensors_of(model)) - adapter
    with mode:
        activations, logits = count_forward(model, token_batch(model, *batch), autocast)
    return Need(
        rank=rank,
        ranks=(min(ranks), max(ranks)),
        parameters=sum(factor.numel() for factor in adapter_parameters(model)),
        weights=weights,
        adapter=adapter,
        optimizer=optimizer,
        activations=activations,
        gradients=adapter,
        logits=8 * logits,
    )


def _optimizer_state_bytes(
    adapter: Iterable[nn.Parameter], head: Iterable[nn.Parameter], options: Mapping[str, Any]
) -> int:
    """The bytes of the optimizer's state after a step, by the shapes and dtypes of the parameters.

    The step runs on zeros, with at most two parameters of each shape and dtype. State that both share (the tables of
    an 8-bit optimizer) counts once, all other state once for each parameter. The arguments are those of
    :func:`dynrank.tasks.optimizers.make_optimizer`.
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
    stand_ins = of_adapter | of_head
    tensors = {p: [value for value in optimizer.state[p].values() if isinstance(value, Tensor)] for p in stand_ins}
    holders = Counter(key for held in tensors.values() for key in {storage_key(tensor) for tensor in held})
    shared = storage_bytes(t for held in tensors.values() for t in held if holders[storage_key(t)] > 1)
    own = {p: storage_bytes(t for t in held if holders[storage_key(t)] == 1) for p, held in tensors.items()}
    return shared + round(sum(count * own[p] for p, count in stand_ins.items()))


def _stand_ins(parameters: Iterable[nn.Parameter]) -> dict[nn.Parameter, float]:
    """At most two new parameters of each shape and dtype -> how many of ``parameters`` each represents."""
    made = {}
    for (shape, dtype), count in Counter((parameter.shape, parameter.dtype) for parameter in parameters).items():
        for _ in range(min(count, 2)):
            parameter = nn.Parameter(torch.zeros(shape, dtype=dtype))
            parameter.grad = torch.zeros_like(parameter)
            made[parameter] = count / min(count, 2)
    return made
