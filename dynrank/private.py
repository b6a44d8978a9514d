"""The private names of torch, transformers and Lightning Fabric that dynrank needs, because no public name does it.

``tests/test_private.py`` fails when a release takes one away, or when another module uses one. Lightning's Trainer has
its own in ``callbacks/lightning/private.py``, DDP in ``distributed/ddp.py``.
"""

from __future__ import annotations

from types import CodeType
from typing import Any

import torch

# Tensors without values, in which the planner makes a step, and what they raise where values are asked for.
from torch._subclasses import FakeTensor as FakeTensor
from torch._subclasses import FakeTensorMode as FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException as DataDependentOutputException
from torch._subclasses.fake_tensor import DynamicOutputShapeException as DynamicOutputShapeException

# The tensors in any nesting of containers, transformers' outputs among them.
from torch.utils._pytree import tree_leaves as tree_leaves

# One operation on a list of tensors in one launch, as torch's own optimizers do it.
foreach_add_, foreach_mul_ = torch._foreach_add_, torch._foreach_mul_
foreach_lerp, foreach_lerp_ = torch._foreach_lerp, torch._foreach_lerp_


def backward_number() -> int:
    """The number of the backward pass under way, one of its own within reentrant checkpointing; -1 outside of any."""
    return torch._C._current_graph_task_id()


def saved_tensor_hooks() -> Any:
    """The hooks on what autograd saves now, which checkpointing sets; None without any."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


def pass_over_in_compile(code: CodeType) -> None:
    """Let ``torch.compile`` begin with what ``code`` calls."""
    # This import takes a second, and help or a plan need none.
    from torch._dynamo.eval_frame import skip_code

    skip_code(code)


def source_of(model: Any) -> str:
    """Where transformers has loaded ``model`` from, a name on the hub or a folder; empty if it does not say."""
    return str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")


def is_expert_parallel(experts: Any) -> bool:
    """Whether transformers has spread this module of experts over processes."""
    return bool(getattr(experts, "_is_expert_parallel", False))


def gated(experts: Any, up: torch.Tensor) -> torch.Tensor:
    """What transformers' module of experts makes of the product with its gate_up_proj."""
    return experts._apply_gate(up)  # type: ignore[no-any-return]


def is_fabrics(module: Any) -> bool:
    """Whether it is Fabric's wrapper around a model."""
    return "_forward_module" in module._modules


def scaler_of_fabric(optimizer: Any) -> Any:
    """The GradScaler behind an optimizer that Fabric has wrapped; None where there is none."""
    return getattr(getattr(getattr(optimizer, "_strategy", None), "precision", None), "scaler", None)
