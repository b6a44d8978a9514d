"""What of DeepSpeed was tried with ranks that change, and the refusal of everything else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any

import torch
from torch.optim import Optimizer

from dynrank.distributed.zero import ZeroOptimizer
from dynrank.errors import ConfigurationError

# The versions that were tried, as in pyproject.toml.
FIRST = (0, 18, 4)
END = (0, 20)

# What to do where no optimizer of a loop trains the adapters, for errors.
FLAT_COPIES = "DeepSpeed trains flat copies, so ranks change in transformers' Trainer alone; else use DDP or FSDP2"

# Optimizers that treat every number by itself and leave a zero alone that has zero gradient and moments; names as in
# dynrank.change.optimizer_state. Not Lion, which moves it by the rate, nor Adafactor and Muon, which take means over a
# whole tensor.
BY_NUMBER = (
    "torch.AdamW", "torch.Adam", "torch.SGD", "torch.RMSprop", "torch.NAdam", "torch.RAdam",
    "deepspeed.FusedAdam", "deepspeed.DeepSpeedCPUAdam",
)  # fmt: skip


def check_version() -> None:
    """Refuse a version of DeepSpeed that was not tried."""
    version = metadata.version("deepspeed")
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:3] if part.isdecimal())
    if not FIRST <= numbers < END:
        wanted = f">={'.'.join(map(str, FIRST))},<{'.'.join(map(str, END))}"
        raise ConfigurationError(
            f"ranks change under deepspeed{wanted}, whose tensors were tried, and deepspeed {version} is installed; "
            f"install 'deepspeed{wanted}', or use DDP or FSDP2"
        )


def _is_on(value: Any) -> bool:
    """Whether a switch, or a section with ``enabled``, is on; "auto" is replaced before training starts."""
    switch = value.get("enabled", True) if isinstance(value, Mapping) else value
    return bool(switch) and switch != "auto"


def _above(least: float) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int | float) and value > least


# The names of one setting.
_GATHERING = (
    "stage3_gather_16bit_weights_on_model_save",
    "gather_16bit_weights_on_model_save",
    "stage3_gather_fp16_weights_on_model_save",
)
# (the key of ds.json, whether its value is refused, what to do)
_REFUSED: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("fp16", _is_on, "set bf16, or neither"),
    ("amp", _is_on, "set bf16, or neither"),
    ("torch_autocast", _is_on, "set bf16, or neither"),
    ("bf16.bf16_master_weights_and_grads", _is_on, "keep master weights in float32"),
    ("bf16.bf16_optimizer_states", _is_on, "keep moments in float32"),
    ("data_types.grad_accum_dtype", lambda value: value not in (None, "fp32"), "leave it out"),
    ("zero_optimization.offload_optimizer.device", lambda value: value == "nvme", "set cpu or none"),
    ("zero_optimization.offload_param.device", lambda value: value == "nvme", "set cpu or none"),
    ("zero_optimization.offload_optimizer.ratio", lambda value: value != 1, "set 1"),
    ("zero_optimization.offload_optimizer.super_offload", _is_on, "leave it out"),
    ("zero_optimization.zenflow", _is_on, "leave it out"),
    ("zero_optimization.zero_hpz_partition_size", _above(1), "leave it out (ZeRO++)"),
    ("zero_optimization.zero_quantized_weights", _is_on, "leave it out (ZeRO++)"),
    ("zero_optimization.zero_quantized_nontrainable_weights", _is_on, "leave it out (ZeRO++)"),
    ("zero_optimization.zero_quantized_gradients", _is_on, "leave it out (ZeRO++)"),
    ("zero_optimization.mics_shard_size", _above(0), "leave it out (MiCS)"),
    ("zero_optimization.elastic_checkpoint", _is_on, "leave it out"),
    ("checkpoint.load_universal", _is_on, "resume in as many processes as before"),
    ("tensor_parallel.autotp_size", _above(1), "leave it out (tensor parallelism)"),
    ("sequence_parallel_size", _above(1), "leave it out (sequence parallelism)"),
    ("elasticity", _is_on, "leave it out"),
    ("compile.deepcompile", _is_on, "leave it out"),
    ("compression_training", bool, "leave it out"),
)


def _value(config: Mapping[str, Any], key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def check_config(config: Mapping[str, Any]) -> None:
    """Refuse settings of DeepSpeed (of ds.json) under which changes of rank were not tried."""
    check_version()
    stage = _value(config, "zero_optimization.stage")
    faults = []
    if stage not in (1, 2, 3):
        faults.append(f"zero_optimization.stage={stage!r}: set 1, 2 or 3 (without ZeRO, DDP trains the same)")
    if stage == 3 and not any(_value(config, f"zero_optimization.{key}") for key in _GATHERING):
        faults.append(
            f"zero_optimization without {_GATHERING[0]}: set it to true, so that checkpoints have the adapter"
        )
    for key, is_refused, cure in _REFUSED:
        value = _value(config, key)
        if value is not None and is_refused(value):
            faults.append(f"{key}={value!r}: {cure}")
    if faults:
        raise ConfigurationError(
            "ranks change under DeepSpeed's ZeRO 1, 2 and 3, with settings that were tried, and not with\n  "
            + "\n  ".join(faults)
        )


def check_optimizer(engine: Any, name: str) -> None:
    """Refuse an engine that does not step flat partitions in float32 by an optimizer of the list.

    ``name``: package and class of the optimizer that makes the steps.
    """
    zero = engine.optimizer
    if type(zero).__name__ not in ("DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3"):
        raise ConfigurationError(
            f"ranks change under DeepSpeed's ZeRO 1, 2 and 3, and {type(zero).__name__} is neither"
        )
    if name not in BY_NUMBER:
        raise ConfigurationError(
            f"under DeepSpeed ranks change with the optimizers {[*BY_NUMBER]}, got {name}: zeros stand for what a cut "
            "takes away, and others may move them, or count them in means over a tensor; take one of these, or train "
            "under DDP or FSDP2",
            "optimizers",
        )
    flats = getattr(zero, "fp32_partitioned_groups_flat", None) or zero.single_partition_of_fp32_groups
    if any(flat.dtype != torch.float32 for flat in flats):
        raise ConfigurationError("under DeepSpeed ranks change if the weights that are stepped are in float32")


def check_reset(optimizer: Optimizer) -> None:
    """Refuse to let moments of some parameters start again under DeepSpeed."""
    if isinstance(optimizer, ZeroOptimizer):
        raise ConfigurationError(
            "DeepSpeed counts steps for many parameters together, so the moments of a few cannot start again; set "
            'optimizer_state="transport"',
            "optimizer_state",
        )
