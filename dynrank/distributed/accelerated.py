"""What accelerate is set to, in transformers' Trainer or a plain loop: FSDP2, and what is refused.

accelerate is imported inside the functions, because it is installed only if it is used.
"""

from __future__ import annotations

import sys
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from torch import nn

from dynrank.distributed.zero_checks import check_config
from dynrank.errors import ConfigurationError

if TYPE_CHECKING:
    from transformers import TrainingArguments


def fsdp_plugin() -> Any:
    """The plugin by which accelerate shards models in this process; None if it does not."""
    state = sys.modules.get("accelerate.state")
    # AcceleratorState() would start accelerate where nobody has.
    if state is None or not state.is_initialized():
        return None
    return getattr(state.AcceleratorState(), "fsdp_plugin", None)


def fsdp_settings(model: nn.Module) -> dict[str, Any]:
    """The mesh, blocks and options of ``fully_shard`` that accelerate is set to; empty if it does not shard models."""
    plugin = fsdp_plugin()
    if plugin is None:
        return {}
    from accelerate.state import AcceleratorState
    from accelerate.utils.fsdp_utils import get_parameters_from_modules

    state = AcceleratorState()
    check_accelerate(state)
    # accelerate looks for these classes when it prepares the model, and sharding derives others from them.
    plugin.set_auto_wrap_policy(model)
    names = plugin.transformer_cls_names_to_wrap or ()
    # Blocks inside of blocks come first.
    blocks = [module for module in model.modules() if type(module).__name__ in names][::-1]
    settings = {
        "mesh": state.device_mesh and state.device_mesh[tuple(state.parallelism_config.fsdp_dim_names)],
        "blocks": blocks or None,
        "mp_policy": plugin.mixed_precision_policy,
        "offload_policy": plugin.cpu_offload,
        "reshard_after_forward": plugin.reshard_after_forward,
        "ignored_params": get_parameters_from_modules(plugin.ignored_modules, model, state.device),
    }
    return {name: value for name, value in settings.items() if value is not None}


def check_arguments(args: TrainingArguments) -> None:
    """Refuse what copies the model, or shards adapters, from arguments, accelerate's configuration or environment."""
    from accelerate.state import AcceleratorState
    from accelerate.utils import parse_flag_from_env

    ways = ["MEGATRON_LM"] if parse_flag_from_env("ACCELERATE_USE_MEGATRON_LM") else []
    ways += [f"{args.n_gpu} GPUs in one process"] if args.n_gpu > 1 else []
    plugin = fsdp_plugin()
    if plugin is not None and args.load_best_model_at_end and "SHARDED" in str(plugin.state_dict_type):
        # transformers looks for the folder of the best checkpoint before it is there in all processes.
        ways.append("load_best_model_at_end with SHARDED_STATE_DICT (set state_dict_type to FULL_STATE_DICT)")
    state = AcceleratorState()
    is_zero = state.distributed_type.value == "DEEPSPEED"
    if getattr(args, "use_vllm", False) and (plugin is not None or is_zero):
        # TRL merges adapters before each generation, and PEFT cannot add a whole matrix to a shard.
        ways.append(f"use_vllm with {'DeepSpeed' if is_zero else 'FSDP2'} (set use_vllm=False)")
    if is_zero and getattr(args, "torch_compile", False):
        ways.append("torch_compile with DeepSpeed (set torch_compile=False)")
    if ways:
        raise ConfigurationError(
            f"RankTrainerCallback changes ranks on one device, under DDP, FSDP2 or DeepSpeed; this Trainer was set to "
            f"{ways[0]}: change that in its arguments, accelerate's configuration and the environment "
            "(ACCELERATE_USE_...), and start it with torchrun or accelerate launch (docs/several_gpus.md)"
        )
    check_accelerate(state, may_be=("DEEPSPEED",))
    if is_zero:
        check_config(state.deepspeed_plugin.deepspeed_config)


def check_accelerate(state: Any, may_be: Collection[str] = ()) -> None:
    """Refuse ways to train in several processes under which ranks cannot change, by accelerate's ``state``.

    ``may_be``: further types of it under which they can.
    """
    plugin = getattr(state, "fsdp_plugin", None)
    mesh = getattr(state, "parallelism_config", None)
    kind = state.distributed_type.value
    ways = [kind] if kind not in ("NO", "FSDP", *may_be) and not kind.startswith("MULTI_") else []
    ways += [f"{n}_size={getattr(mesh, f'{n}_size')}" for n in ("tp", "cp", "sp") if getattr(mesh, f"{n}_size", 1) > 1]
    if plugin is not None and plugin.fsdp_version != 2:
        ways.append(f"FSDP{plugin.fsdp_version} (set fsdp_version: 2)")
    elif plugin is not None and plugin.activation_checkpointing:
        # From modules in its wrappers PEFT saves nothing.
        ways.append("fsdp_activation_checkpointing: true (let the model do it, by gradient_checkpointing=True)")
    if ways:
        raise ConfigurationError(
            f"ranks change on one device, under DDP or under FSDP2, and accelerate is set to {ways[0]}: change that in "
            "its configuration, in the arguments and in the environment (ACCELERATE_USE_...)"
        )
