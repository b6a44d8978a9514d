"""The optimizers whose state can be carried through a change of rank, and the kind of each entry of that state."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from dynrank.errors import ConfigurationError

# How many numbers share a scale in bitsandbytes' 8-bit state.
BLOCK = 256
KEPT, LINEAR, SQUARED, ROW, COLUMN, POSITION, STEP, SCALES = (
    "kept", "linear", "squared", "row", "column", "position", "step", "scales",
)  # fmt: skip

_ADAM = {"step": KEPT, "exp_avg": LINEAR, "exp_avg_sq": SQUARED, "max_exp_avg_sq": SQUARED}
# Entries that only bitsandbytes has.
_BITS = {"step": KEPT, "qmap1": KEPT, "qmap2": KEPT, "absmax1": SCALES, "absmax2": SCALES}
_SCHEDULE_FREE = {"z": POSITION, "exp_avg_sq": SQUARED}
# Kinds of the entries, by package and class, so that only torch has to be installed. Other optimizers are refused, and
# so are subclasses, which may have other state. Centred RMSprop is refused, because after the maps a second moment may
# be below the square of the mean; Adamax, because the largest gradient of a sum is not known.
RULES: dict[str, dict[str, str]] = {
    "torch.SGD": {"momentum_buffer": LINEAR},
    "torch.RMSprop": {"step": KEPT, "square_avg": SQUARED, "momentum_buffer": STEP},
    "torch.Adagrad": {"step": KEPT, "sum": SQUARED},
    "torch.ASGD": {"step": KEPT, "eta": KEPT, "mu": KEPT, "ax": POSITION},
    "torch.Adam": _ADAM,
    "torch.AdamW": _ADAM,
    "torch.RAdam": _ADAM,
    "torch.NAdam": _ADAM | {"mu_product": KEPT},
    "torch.Adafactor": {"step": KEPT, "row_var": ROW, "col_var": COLUMN},
    "torch.Muon": {"momentum_buffer": LINEAR},
    "dynrank.Muon": {"momentum_buffer": LINEAR} | _ADAM,
    "transformers.Adafactor": {
        "step": KEPT, "RMS": KEPT, "exp_avg": STEP, "exp_avg_sq_row": ROW, "exp_avg_sq_col": COLUMN,
    },
    "prodigyopt.Prodigy": _ADAM | {"s": LINEAR, "p0": POSITION},
    "schedulefree.SGDScheduleFree": _SCHEDULE_FREE,
    "schedulefree.AdamWScheduleFree": _SCHEDULE_FREE,
    "schedulefree.RAdamScheduleFree": _SCHEDULE_FREE,
} | {
    f"bitsandbytes.{name}{bits}": _BITS | {f"state{number}": kind for number, kind in enumerate(kinds, start=1)}
    for name, kinds in {
        "SGD": [LINEAR], "Lion": [LINEAR], "RMSprop": [SQUARED], "Adagrad": [SQUARED],
        "Adam": [LINEAR, SQUARED], "AdamW": [LINEAR, SQUARED],
    }.items()
    for bits in ("", "8bit", "32bit")
}  # fmt: skip


def check_optimizer(optimizer: Optimizer, parameters: Iterable[nn.Parameter], optimizer_state: str) -> None:
    """Refuse, before anything changes, an optimizer whose state for ``parameters`` cannot be carried (or reset).

    Args:
        optimizer: the optimizer without a wrapper.
        parameters: the parameters whose shape will change.
        optimizer_state: "transport" or "reset".
    """
    name, rules = rule_name(optimizer).removeprefix("torch."), RULES.get(rule_name(optimizer))
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ConfigurationError(
            f"optimizer {name} keeps all parameters in one vector, whose length cannot change; set optimizer.name"
        )
    if optimizer_state == "reset":
        if rule_name(optimizer) in ("schedulefree.AdamWScheduleFree", "schedulefree.RAdamScheduleFree"):
            # With v = 0 and the bias correction over, the first step would be 1 / sqrt(1 - beta2) = 31 times too long.
            raise ConfigurationError(
                f"optimizer {name} counts steps for a whole group, so the moments of one parameter cannot start again; "
                "set schedule.how.optimizer_state=transport"
            )
        return
    if rules is None:
        raise ConfigurationError(
            f"the state of optimizer {name} cannot be carried through a change of rank; carried: "
            f"{sorted(kind.removeprefix('torch.') for kind in RULES)}; set optimizer.name to one of them or "
            "schedule.how.optimizer_state=reset"
        )
    for parameter in parameters:
        for key, value in optimizer.state.get(parameter, {}).items():
            if key not in rules:
                raise ConfigurationError(
                    f"no rule carries {key!r} of optimizer {name}; set schedule.how.optimizer_state=reset"
                )
            if not moves(rules[key], value):
                continue
            shape = shape_of(rules[key], parameter)
            if value.shape not in (shape, (math.prod(shape),)):
                raise ConfigurationError(
                    f"{key!r} of optimizer {name} has shape {[*value.shape]} for a parameter of shape "
                    f"{[*parameter.shape]}; set schedule.how.optimizer_state=reset"
                )


def rule_name(optimizer: Optimizer) -> str:
    """The key in RULES: package, class, and the options that change the state."""
    cls = type(optimizer)
    # bitsandbytes can put its state into paged memory.
    options = {"is_paged": getattr(optimizer, "is_paged", False)}
    options["centered"] = any(group.get("centered") for group in optimizer.param_groups)
    chosen = "".join(f"({option})" for option, value in options.items() if value)
    return f"{cls.__module__.partition('.')[0]}.{cls.__qualname__}{chosen}"


def shape_of(kind: str, parameter: nn.Parameter) -> tuple[int, ...]:
    """The shape of an entry of this kind; transformers' Adafactor and Prodigy may store it flat."""
    rows, columns = parameter.flatten(1).shape
    special = {ROW: (rows, 1), COLUMN: (1, columns), SCALES: (-(-parameter.numel() // BLOCK),)}
    return special.get(kind, (*parameter.shape,))


def moves(kind: str, value: Any) -> bool:
    """Whether a change of rank must transform the entry; not a count, nor Prodigy's single 0 for a tensor of zeros."""
    return kind != KEPT and value is not None and not (value.ndim == 0 and value == 0)
