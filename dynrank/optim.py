"""Carrying an optimizer's state through a linear change of a parameter's coordinates.

If new = maps applied to old, gradients move by the transposed map (they are covectors): with ``g' = M g`` for lora_A
and ``g' = g M^T`` for lora_B, everything linear in gradients moves by M, and second moments by M * M element by element
(the diagonal of ``M diag(v) M^T``). Steps are counts and stay.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dynrank.errors import ConfigurationError

_LINEAR, _SQUARED, _KEPT = "linear", "squared", "kept"

# What each entry of an optimizer's per-parameter state is; an optimizer or entry that isn't here is refused.
_ADAM = {"step": _KEPT, "exp_avg": _LINEAR, "exp_avg_sq": _SQUARED, "max_exp_avg_sq": _SQUARED}
_RULES: dict[type[Optimizer], dict[str, str]] = {
    torch.optim.SGD: {"momentum_buffer": _LINEAR},
    torch.optim.Adam: _ADAM,
    torch.optim.AdamW: _ADAM,
    torch.optim.RAdam: _ADAM,
    torch.optim.NAdam: _ADAM | {"mu_product": _KEPT},
}

OPTIMIZER_STATES = ("transport", "reset")


def check_optimizer(optimizer: Optimizer, parameters: Iterable[nn.Parameter], optimizer_state: str) -> None:
    """Refuse, before anything is changed, an optimizer whose state for ``parameters`` cannot be carried.

    Raises:
        ConfigurationError: if ``optimizer_state`` is neither "transport" nor "reset", the optimizer has no rule, or an
            entry of its state has no rule or another shape than its parameter.
    """
    if optimizer_state not in OPTIMIZER_STATES:
        raise ConfigurationError(
            f"optimizer_state must be one of {OPTIMIZER_STATES}, got {optimizer_state!r}; set schedule.optimizer_state"
        )
    name, rules = type(optimizer).__name__, _RULES.get(type(optimizer))
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ConfigurationError(f"optimizer {name} keeps all parameters in one vector, whose length may not change")
    if optimizer_state == "reset":
        return
    if rules is None:
        raise ConfigurationError(
            f"the state of optimizer {name} cannot be carried through a change of rank; carried: "
            f"{sorted(kind.__name__ for kind in _RULES)}; set optimizer.name to one of them or "
            "schedule.optimizer_state=reset"
        )
    for parameter in parameters:
        for key, value in optimizer.state.get(parameter, {}).items():
            if key not in rules:
                raise ConfigurationError(
                    f"no rule carries {key!r} of optimizer {name}; set schedule.optimizer_state=reset"
                )
            if rules[key] != _KEPT and value is not None and value.shape != parameter.shape:
                raise ConfigurationError(
                    f"{key!r} of optimizer {name} has shape {[*value.shape]} for a parameter of shape "
                    f"{[*parameter.shape]}; set schedule.optimizer_state=reset"
                )


@torch.no_grad()
def change_state(optimizer: Optimizer, parameter: nn.Parameter, map_KR: Tensor, dim: int, optimizer_state: str) -> None:
    """Move the state of ``parameter``, whose gradient along ``dim`` changes by ``map_KR``, or forget it.

    A row of zeros in the map is a direction that did not exist: its second moment becomes the mean over the carried
    ones, because v = 0 under an old step count makes Adam take several times its normal step.

    Args:
        optimizer: one that :func:`check_optimizer` has passed; a parameter unknown to it is left alone.
        parameter: the changed parameter (found by identity).
        map_KR: (K, R), new gradient = map @ old gradient along ``dim``.
        dim: 0 for lora_A, 1 for lora_B.
        optimizer_state: "transport" or "reset".
    """
    state = optimizer.state.get(parameter)
    if not state:
        return
    if optimizer_state == "reset":
        del optimizer.state[parameter]
        return
    rules = _RULES[type(optimizer)]
    for key, value in state.items():
        if rules[key] == _KEPT or value is None:
            continue
        map_ = map_KR if rules[key] == _LINEAR else map_KR.square()
        moved = _along(map_.to(value.device), value.double(), dim)
        if rules[key] == _SQUARED:
            is_new = map_KR.eq(0).all(dim=1).to(value.device)
            mean = moved.movedim(dim, 0)[~is_new].mean(0, keepdim=True).movedim(0, dim)
            moved = torch.where(is_new.unsqueeze(1 - dim), mean, moved)
        state[key] = moved.to(value.dtype)


def _along(map_KR: Tensor, value: Tensor, dim: int) -> Tensor:
    return map_KR @ value if dim == 0 else value @ map_KR.mT
