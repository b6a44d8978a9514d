"""What a run needs by rank: trained parameters by formula and by count, and bytes, from its configuration alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn
from transformers import PreTrainedModel

from dynrank.adapters.save import trained_heads
from dynrank.errors import ConfigurationError
from dynrank.layers.base import LoRALayer
from dynrank.layers.finding import adapter_parameters, own_layers
from dynrank.layers.placing import add_lora
from dynrank.models.config import meta_model, read_config
from dynrank.models.sizes import storage_bytes, tensors_of
from dynrank.planner.base_weights import DTYPES, PACKED, check_weights, pack_linear, without_values
from dynrank.planner.optimizer import optimizer_state_bytes
from dynrank.planner.step import CountingMode, count_step, token_batch
from dynrank.run.config import plain, rank_pattern
from dynrank.run.trusted import make

__all__ = ["Need", "Plan", "make_plan", "parse_bytes"]

_UNITS = {"B": 1, **{f"{p}iB": 2 ** (10 * i) for i, p in enumerate("KMGT", 1)}}
_UNITS |= {f"{p}B": 1000**i for i, p in enumerate("KMGT", 1)}
# What Lightning calls it: dtype of all parameters (None: as they are), dtype of autocast.
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
    """What training at one rank takes, in bytes unless it says otherwise.

    Attributes:
        rank: of the layers that no rule sets.
        ranks: (lowest, highest) of all layers.
        parameters: numbers in the factors of all LoRA layers.
        checkpointing: blocks keep their inputs alone and are computed again in the backward.
        weights: the frozen base and all buffers.
        adapter: the factors, and the modules that are trained whole.
        optimizer: its state.
        gradients: of what is trained, all of them.
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
        model: what the user calls it, and its class.
        parameters: of the model without LoRA.
        head_parameters: of the modules among them that are trained whole.
        weights: kind of the frozen base: fp32, bf16, fp16, nf4 or int8.
        layers: names of the layers that have LoRA.
        batch: (sequences, tokens of each).
        optimizer: its name.
        budget: in bytes, if there is one.
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
    ranks, budget = _ranks(config), parse_bytes(config.budget) if config.budget is not None else None
    check_weights(config.weights)
    batch = _size(config, "batch_size", "batch_size"), _size(config, "sequence_length", "max_length")
    precision = _PRECISIONS.get(str(config.trainer.precision))
    if precision is None:
        raise ConfigurationError(f"trainer.precision must be one of {[*_PRECISIONS]}, got {config.trainer.precision!r}")
    build = _builder(config)
    needs: list[Need] = []
    for rank in ranks:
        with _rank_named(rank):
            model, heads = build(rank)
        _check_length(model, batch[1])
        parameters, head_parameters = model.num_parameters(), _count(model, heads)
        dtype, autocast = precision
        kind = _set_weights(model, config, dtype, heads)
        with _rank_named(rank):
            add_lora(model.train(), modules_to_save=heads, dtype=dtype or torch.float32, **_lora(config, rank))
        needs += _needs(model, rank, head_parameters, batch, autocast, plain(config.optimizer))
    name = config.model or config.task.get("model") or type(model).__name__
    return Plan(
        f"{name} ({type(model).__name__})",
        parameters,
        head_parameters,
        kind,
        tuple(own_layers(model)),
        batch,
        config.optimizer.name,
        budget,
        tuple(needs),
    )


def parse_bytes(text: Any, key: str = "budget") -> int:
    """Bytes of a size such as ``24GiB``, ``500 MB`` or a plain number of bytes.

    >>> parse_bytes("1.5KiB"), parse_bytes("2 GB"), parse_bytes(10)
    (1536, 2000000000, 10)
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)", str(text).strip())
    unit = next((u for u in _UNITS if match and u.lower() == (match[2] or "B").lower()), None)
    size = round(float(match[1]) * _UNITS[unit]) if match and unit else 0
    if size < 1:
        raise ConfigurationError(f"{key} must be a size such as 24GiB (units: {', '.join(_UNITS)}), got {text!r}")
    return size


def _ranks(config: DictConfig) -> list[int]:
    ranks = plain(config.ranks)
    if ranks is None:
        ranks = [config.lora.rank]
    if isinstance(ranks, int):
        ranks = [ranks]
    if not isinstance(ranks, list) or not ranks or not all(type(rank) is int and rank >= 1 for rank in ranks):
        raise ConfigurationError(f"ranks must be null or a list of whole numbers of at least 1, got {ranks!r}")
    return sorted(set(ranks))


@contextmanager
def _rank_named(rank: int) -> Iterator[None]:
    """Errors say which of the ranks was at fault, and not for hundreds of layers."""
    try:
        yield
    except ConfigurationError as error:
        lines = str(error).splitlines()
        more = [f"  and {len(lines) - 4} more"] if len(lines) > 4 else []
        raise ConfigurationError("\n".join([f"rank {rank} of ranks: {lines[0]}", *lines[1:4], *more])) from error


def _check_length(model: PreTrainedModel, length: int) -> None:
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and length > longest:
        raise ConfigurationError(
            f"sequence_length must be at most the {longest} positions of {type(model).__name__}, got {length}"
        )


def _size(config: DictConfig, key: str, of_task: str) -> int:
    value = config[key] if config[key] is not None else OmegaConf.select(config.task, of_task)
    if value is None:
        raise ConfigurationError(f"the task has no {of_task}; set {key}")
    if not isinstance(value, int) or value < 1:
        raise ConfigurationError(f"{key} must be a whole number of at least 1, got {value!r}")
    return value


def _builder(config: DictConfig) -> Callable[[int], tuple[PreTrainedModel, list[str]]]:
    """A function from a rank to the model without LoRA, on the meta device, and what of it is trained whole."""
    if config.model is not None:
        read = read_config(config.model)
        dtype = DTYPES.get(config.weights) or (torch.bfloat16 if config.weights in PACKED else read.dtype)
        return lambda rank: (meta_model(read, dtype or torch.float32), [])
    task = make(config.task, "task")
    optimizer = plain(config.optimizer)

    def of_task(rank: int) -> tuple[PreTrainedModel, list[str]]:
        model: Any = task.module(_lora(config, rank), optimizer, on_meta=True).model
        heads = list(trained_heads(model, own_layers(model)))
        for module in list(model.modules()):
            for name, child in module._modules.items():
                if isinstance(child, LoRALayer):
                    module._modules[name] = child.base
        return model, heads

    return of_task


def _lora(config: DictConfig, rank: int) -> dict[str, Any]:
    """Arguments of :func:`dynrank.add_lora`; every backend keeps the same tensors, and torch's runs without values."""
    return {**plain(config.lora), "rank": rank, "rank_map": rank_pattern(config.rank_map), "backend": "torch"}


def _set_weights(model: PreTrainedModel, config: DictConfig, run: torch.dtype | None, heads: Sequence[str]) -> str:
    """Bring the base to its dtype or packing, in place; returns the name of it."""
    dtype = DTYPES.get(config.weights) or (torch.bfloat16 if config.weights in PACKED else run)
    if dtype is not None:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
    if config.weights in PACKED:
        pack_linear(model, config.weights, double=config.double_quantization, kept=heads)
    known = {dtype: name for name, dtype in DTYPES.items()}
    return config.weights or known.get(model.dtype, str(model.dtype).removeprefix("torch."))


def _needs(
    model: PreTrainedModel,
    rank: int,
    head_parameters: int,
    batch: tuple[int, int],
    autocast: torch.dtype | None,
    optimizer: dict[str, Any],
) -> list[Need]:
    layers = own_layers(model)
    parameters = sum(layer.rank * sum(type(layer).shape_of(layer.base)) for layer in layers.values())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    counted = sum(parameter.numel() for parameter in trained) - head_parameters
    if counted != parameters:
        raise RuntimeError(f"r * (d_in + d_out) is {parameters:,} over all layers, but {counted:,} are trained")
    factors = adapter_parameters(model)
    own = {id(factor) for factor in factors}
    state = optimizer_state_bytes(factors, [p for p in trained if id(p) not in own], optimizer)
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False  # the keys and values of a training step are not used again
    mode = CountingMode()
    without_values(model, mode)
    with mode:
        inputs = token_batch(model, *batch)
    adapter = storage_bytes(parameter for parameter in model.parameters() if parameter.requires_grad)
    weights = storage_bytes(tensors_of(model)) - adapter
    ranks = [layer.rank for layer in layers.values()]
    needs = []
    for checkpointing in (False, True) if model.supports_gradient_checkpointing else (False,):
        if checkpointing:
            _checkpoint(model)
        step = count_step(model, inputs, mode, autocast=autocast)
        needs.append(
            Need(
                rank,
                (min(ranks), max(ranks)),
                parameters,
                checkpointing,
                weights,
                adapter,
                state,
                step.gradients,
                step.activations,
                step.peak,
            )
        )
    return needs


def _checkpoint(model: Any) -> None:
    """Recompute every block in the backward, by torch's own function."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def _count(model: nn.Module, heads: Sequence[str]) -> int:
    return sum(parameter.numel() for name in heads for parameter in model.get_submodule(name).parameters())
