"""The private names of torch, transformers and Lightning Fabric that dynrank uses where no public name serves.

Tests fail when a release removes one, and ``tests/test_private.py`` when another module uses one. The private names of
Lightning's Trainer are in ``callbacks/lightning/private.py``, those of DDP in ``distributed/wrappers.py``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

# Operations on a list of tensors in one launch, which torch's own optimizers use.
foreach_copy_ = torch._foreach_copy_
foreach_mul_ = torch._foreach_mul_
foreach_sub_ = torch._foreach_sub_


def version_of(tensor: torch.Tensor) -> int:
    """A number that every change of the tensor in place raises."""
    return int(tensor._version)


def persistent_buffers(module: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    """(name, buffer) of the buffers of ``module`` itself that its state dict has; others are caches."""
    left_out = module._non_persistent_buffers_set
    return [(name, buffer) for name, buffer in module.named_buffers(recurse=False) if name not in left_out]


def source_of(model: Any) -> str:
    """The hub name or folder from which transformers loaded ``model``; empty if unknown."""
    return str(getattr(getattr(model, "config", None), "name_or_path", "") or "")


def stacked_as(model: Any) -> str:
    """The family by whose example transformers stacks the experts in checkpoints of ``model``; empty if none."""
    examples = getattr(sys.modules.get("transformers.conversion_mapping"), "_MODEL_TO_CONVERSION_PATTERN", {})
    return str(examples.get(getattr(getattr(model, "config", None), "model_type", None), ""))


def is_expert_parallel(experts: Any) -> bool:
    """Whether transformers has distributed the experts of this module over processes."""
    return bool(getattr(experts, "_is_expert_parallel", False))


def gated(experts: Any, up: torch.Tensor) -> torch.Tensor:
    """The activation that transformers' module of experts applies to the output of its gate_up_proj."""
    return experts._apply_gate(up)  # type: ignore[no-any-return]


def at_end_of_backward(function: Callable[[], None]) -> None:
    """Call ``function`` once when the running backward pass has ended; call this in one of its hooks."""
    torch.autograd.Variable._execution_engine.queue_callback(function)


def backward_number() -> int:
    """A number that only the running backward pass has."""
    return torch._C._current_graph_task_id()


def is_recorded() -> bool:
    """Whether a compiler, jit.trace, torch.func or forward-mode AD needs plain operations instead of the op."""
    compiles = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    return compiles or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def need_own_call(*modules: torch.nn.Module) -> bool:
    """Whether a call of one of ``modules`` does more than the forward of its class.

    It has hooks, or all modules have, or somebody has set a forward on the object, as accelerate does.
    """
    if torch.nn.modules.module._has_any_global_hook():  # type: ignore[no-untyped-call]
        return True
    for module in modules:
        before = module._forward_pre_hooks or module._backward_pre_hooks
        if before or module._forward_hooks or module._backward_hooks or "forward" in vars(module):
            return True
    return False


def has_device_hook(module: torch.nn.Module) -> bool:
    """Whether accelerate moves inputs, or weights, between memories in each call of ``module`` (``device_map``)."""
    return "_hf_hook" in vars(module)


def is_fabrics(module: Any) -> bool:
    """Whether ``module`` is Fabric's wrapper around a model."""
    # Fabric has two packages. Without its module nothing is wrapped, and it is slow to import.
    found = [sys.modules.get(name) for name in ("lightning.fabric", "lightning_fabric")]
    return any(fabric is not None and fabric.is_wrapped(module) for fabric in found)
