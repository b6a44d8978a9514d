"""What a run needs by rank: trained parameters by formula and by count, and bytes, from its configuration alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from omegaconf import DictConfig, OmegaConf
from pydantic import BeforeValidator, ByteSize, Field
from transformers import PreTrainedModel

from dynrank.adapters.save import trained_heads
from dynrank.errors import ConfigurationError, read_as, validated
from dynrank.layers.base import LoRALayer
from dynrank.layers.finding import adapter_parameters, own_layers
from dynrank.layers.placing import add_lora
from dynrank.models.pretrained import enable_checkpointing, meta_model, read_config
from dynrank.models.settings import ModelSettings
from dynrank.models.sizes import storage_bytes, tensors_of
from dynrank.planner.base_weights import without_values
from dynrank.planner.optimizer import optimizer_state_bytes
from dynrank.planner.step import CountingMode, count_step, token_batch
from dynrank.run.config import make, plain, rank_pattern

__all__ = ["Need", "Plan", "make_plan"]

# Lightning's precisions: dtype of all parameters (None: as they are), dtype of autocast.
_PRECISIONS: dict[str, tuple[torch.dtype | None, torch.dtype | None]] = {
    "32": (None, None),
    "32-true": (None, None),
    "bf16-true": (torch.bfloat16, None),
    "16-true": (torch.float16, None),
    "bf16-mixed": (None, torch.bfloat16),
    "16-mixed": (None, torch.float16),
}


def _with_unit(size: object) -> object:
    if not str(size).strip().lower().endswith("b"):
        raise ValueError(f"must be a size with its unit, such as 24GiB or 500 MB, got {size!r}")
    return size


@validated("plan")
class Question:
    """What ``dynrank plan`` is asked beside the run's own configuration; null takes the run's own value."""

    base: Annotated[str, Field(min_length=1)] | None
    batch_size: Annotated[int, Field(ge=1)]
    sequence_length: Annotated[int, Field(ge=1)]
    ranks: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1)]
    budget: Annotated[ByteSize, Field(ge=1), BeforeValidator(_with_unit)] | None


@dataclass(frozen=True)
class Need:
    """What training at one rank takes, in bytes unless it says otherwise.

    Attributes:
        rank: of the layers that no rule sets.
        ranks: (lowest, highest) of all layers.
        parameters: numbers in the factors of all LoRA layers.
        checkpointing: blocks keep their inputs alone and are computed again in the backward.
        weights: the frozen base and all buffers.
        adapter: the factors, and the modules that are trained whole.
        optimizer: its state.
        gradients: of all that is trained.
        activations: saved by the forward for the backward.
        step: the most that forward and backward hold at once of activations, gradients and temporary tensors.
    """

    rank: int
    ranks: tuple[int, int]
    parameters: int
    checkpointing: bool
    weights: int
    adapter: int
    optimizer: int
    gradients: int
    activations: int
    step: int

    @property
    def total(self) -> int:
        """The most that is held at once."""
        return self.weights + self.adapter + self.optimizer + self.step


@dataclass(frozen=True)
class Plan:
    """The needs of a model and a batch.

    Attributes:
        model: its name and class.
        parameters: of the model without LoRA.
        head_parameters: those of them that are trained whole.
        weights: dtype of the frozen base, or its packing, nf4 or int8.
        layers: names of the layers that have LoRA.
        batch: (sequences, tokens of each).
        optimizer: its name.
        budget: bytes to fit into, if any.
        needs: by rank, without and with checkpointing.
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

    def best(self, *, checkpointing: bool) -> int | None:
        """The highest rank that fits the budget."""
        fit = [n.rank for n in self.needs if n.checkpointing == checkpointing and n.total <= (self.budget or 0)]
        return max(fit, default=None)


def make_plan(config: DictConfig) -> Plan:
    """Count what the run of ``config`` (composed from ``conf/plan.yaml``) needs; no weights are loaded or made.

    Raises:
        ConfigurationError: if any value cannot be used.
        RuntimeError: if the count of trained parameters is not what the formula gives.
    """
    asked = _asked(config)
    precision = _PRECISIONS.get(str(config.trainer.precision))
    if precision is None:
        raise ConfigurationError(f"trainer.precision must be one of {[*_PRECISIONS]}, got {config.trainer.precision!r}")
    dtype, autocast = precision
    settings = ModelSettings(**plain(config.model))
    build = _of_task(config) if asked.base is None else _of_model(asked.base, settings)
    batch, needs = (asked.batch_size, asked.sequence_length), list[Need]()
    for rank in sorted(set(asked.ranks)):
        with _rank_named(rank):
            model, heads = build(rank)
            _check_length(model, asked.sequence_length)
            parameters = model.num_parameters()
            head_parameters = sum(p.numel() for head in heads for p in model.get_submodule(head).parameters())
            for parameter in model.parameters() if dtype is not None else ():
                parameter.data = parameter.data.to(dtype)
            add_lora(model.train(), modules_to_save=heads, dtype=dtype or torch.float32, **_lora(config, rank))
        needs += _needs(
            model, rank, head_parameters, batch, autocast, plain(config.optimizer), settings.gradient_checkpointing
        )
    kind = str(model.dtype).removeprefix("torch.")
    name = asked.base or config.task.get("model") or type(model).__name__
    return Plan(
        model=f"{name} ({type(model).__name__})",
        parameters=parameters,
        head_parameters=head_parameters,
        weights=kind if settings.quantization == "none" else settings.quantization,
        layers=tuple(own_layers(model)),
        batch=batch,
        optimizer=config.optimizer.name,
        budget=asked.budget,
        needs=tuple(needs),
    )


def _asked(config: DictConfig) -> Question:
    values = {name: plain(config[name]) for name in Question.__annotations__}
    for name, of_task in (("batch_size", "batch_size"), ("sequence_length", "max_length")):
        if values[name] is None:
            values[name] = OmegaConf.select(config.task, of_task)
    ranks = values["ranks"] if values["ranks"] is not None else config.lora.rank
    values["ranks"] = ranks if isinstance(ranks, list) else [ranks]
    return read_as(Question, values, "the keys of dynrank plan")


@contextmanager
def _rank_named(rank: int) -> Iterator[None]:
    """Say in an error at which of the ranks it arose."""
    try:
        yield
    except ConfigurationError as error:
        raise ConfigurationError(f"rank {rank} of ranks: {error}") from error


def _check_length(model: PreTrainedModel, length: int) -> None:
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and length > longest:
        raise ConfigurationError(
            f"sequence_length must be at most the {longest} positions of {type(model).__name__}, got {length}"
        )


_Build = Callable[[int], tuple[PreTrainedModel, list[str]]]
"""From a rank to the model without LoRA, on the meta device, and the names of what is trained whole."""


def _of_model(name: str, settings: ModelSettings) -> _Build:
    config = read_config(name, "base", settings)
    return lambda rank: (meta_model(config, settings, "base"), [])


def _of_task(config: DictConfig) -> _Build:
    task = make(config.task, "task")

    def build(rank: int) -> tuple[PreTrainedModel, list[str]]:
        model: Any = task.module(_lora(config, rank), plain(config.optimizer), on_meta=True).model
        heads = list(trained_heads(model, own_layers(model)))
        for module in list(model.modules()):
            for name, child in module._modules.items():
                if isinstance(child, LoRALayer):
                    module._modules[name] = child.base
        return model, heads

    return build


def _lora(config: DictConfig, rank: int) -> dict[str, Any]:
    """Arguments of :func:`dynrank.add_lora`; every backend keeps the same tensors, and torch's runs without values."""
    return {**plain(config.lora), "rank": rank, "rank_map": rank_pattern(config.rank_map), "backend": "torch"}


def _needs(
    model: PreTrainedModel,
    rank: int,
    head_parameters: int,
    batch: tuple[int, int],
    autocast: torch.dtype | None,
    optimizer: dict[str, Any],
    checkpointed: bool,
) -> Iterator[Need]:
    """The need of a model with its LoRA layers: without checkpointing unless it is on, and with it where it can be."""
    layers = own_layers(model).values()
    parameters = sum(layer.rank * sum(type(layer).shape_of(layer.base)) for layer in layers)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    counted = sum(parameter.numel() for parameter in trained) - head_parameters
    if counted != parameters:
        raise RuntimeError(f"r * (d_in + d_out) is {parameters:,} over all layers, but {counted:,} are trained")
    factors = set(adapter_parameters(model))
    state = optimizer_state_bytes(factors, [p for p in trained if p not in factors], optimizer)
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False  # a training step does not use keys and values again
    mode = CountingMode()
    without_values(model, mode)
    with mode:
        inputs = token_batch(model, *batch)
    adapter = storage_bytes(parameter for parameter in model.parameters() if parameter.requires_grad)
    weights = storage_bytes(tensors_of(model)) - adapter
    ranks = [layer.rank for layer in layers]
    ways = (True,) if checkpointed else (False, True) if model.supports_gradient_checkpointing else (False,)
    for checkpointing in ways:
        if checkpointing:
            enable_checkpointing(model)
        step = count_step(model, inputs, mode, autocast=autocast)
        yield Need(
            rank=rank,
            ranks=(min(ranks), max(ranks)),
            parameters=parameters,
            checkpointing=checkpointing,
            weights=weights,
            adapter=adapter,
            optimizer=state,
            gradients=step.gradients,
            activations=step.activations,
            step=step.peak,
        )
