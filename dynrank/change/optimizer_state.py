"""The transformation of an optimizer's state under a linear change of a parameter's coordinates.

The kind of an entry (``RULES``) determines how it transforms. E is the number of products
that a factor stacks (the experts, or 1), R the old rank and K the new rank. ``map_EKR`` is the map of the parameter,
and ``gradient_map_EKR`` that of its gradient. (Gradients are covectors, so the gradient of lora_A has the map of
lora_B, and the other way round.) In each product separately:

- an entry that is linear in gradients transforms by the gradient map;
- second moments transform by its elementwise square, which gives the diagonal of ``M diag(v) M^T``;
- Adafactor's second moment is the outer product ``row col / mean(row)``, and the squared map gives another outer
  product. The factor along the rank transforms by the squared map. The other factor, a mean over the rank and the
  products, is multiplied by the ratio of the new mean to the old one (both factors have the same mean);
- a position in parameter space (the ``z`` of schedule-free) transforms by the parameter's map, and so does a sum of
  steps (the momentum of RMSprop);
- counts do not change.

A new direction gets first moments and steps of zero, the parameter's own position, and second moments of 2.5 times the
mean of the others: v = 0 with an old step count would make Adam's next steps several times too long.

Second moments are bounded: ``max(v') <= max(v) max(1, (b' / b)^2)``, where b and b' are the largest norms of a column
of the other factor before and after. The reason: the gradient of a row of A is ``b_r^T G``, with b_r a column of B and
G the gradient of the update, so a change of coordinates can only raise its square through the norm of b_r. The
diagonal ignores this. If columns of B are small or nearly parallel, the gradient map has entries of 1 / sqrt(sigma),
and the diagonal adds the squares of gradients that would cancel. Without a bound, changes that come faster than Adam
forgets let v grow: between rank 4 and 8 every 3 steps to 6.5e9 after 400 changes, between 1 and 10 to infinity after
738.

8-bit state (Dettmers et al., arXiv:2110.02861) is decoded, transformed and encoded with its library's own functions.
"""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dynrank.distributed.zero import stepping
from dynrank.distributed.zero_checks import FLAT_COPIES, check_reset
from dynrank.errors import ConfigurationError
from dynrank.layers.ranked_layer import RankedLayer
from dynrank.linalg import RankChange, joined, split

# How many numbers share a scale in bitsandbytes' 8-bit state.
BLOCK = 256
KEPT = "kept"
LINEAR = "linear"
SQUARED = "squared"
ROW = "row"
COLUMN = "column"
POSITION = "position"
STEP = "step"
SCALES = "scales"

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
    "deepspeed.FusedAdam": _ADAM,
    "deepspeed.DeepSpeedCPUAdam": _ADAM,
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

# Second moments of a new direction, as a multiple of the mean of the others. Its first gradients agree in sign, while
# those of trained directions mostly cancel. With the mean itself, beta1 = 0.9 and gradients of equal size, the first 10
# steps are rms(1 - 0.9^k) = 0.45 of the rate for the former and sqrt(0.1 / 1.9) = 0.23 for the latter. To stay below
# 1.5 times the latter needs (0.45 / 0.23 / 1.5)^2 = 1.7; 2.5 also allows gradients 1.2 times as large as the others.
_SEED = 2.5


def check_trained(layers: Mapping[str, RankedLayer], optimizers: Collection[Optimizer]) -> None:
    """Refuse optimizers, if there are any, of which none trains a layer: they train copies that keep their shapes."""
    trained = {id(parameter) for each in optimizers for group in each.param_groups for parameter in group["params"]}
    for name, layer in layers.items():
        factors = (layer.lora_A, layer.lora_B)
        if optimizers and any(factor.requires_grad and id(factor) not in trained for factor in factors):
            raise ConfigurationError(
                f"none of the optimizers trains {name!r}: pass all that train adapters, made after LoRA was added; "
                + FLAT_COPIES,
                "optimizers",
            )


def check_optimizer(optimizer: Optimizer, parameters: Iterable[nn.Parameter], optimizer_state: str) -> None:
    """Refuse, before anything changes, an optimizer whose state for ``parameters`` cannot be carried (or reset).

    Args:
        optimizer: the optimizer without a wrapper.
        parameters: the parameters whose shape will change.
        optimizer_state: "transport" or "reset".
    """
    name = rule_name(optimizer).removeprefix("torch.")
    rules = RULES.get(rule_name(optimizer))
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ConfigurationError(
            f"optimizer {name} keeps all parameters in one vector, whose length cannot change; take another one",
            "optimizers",
        )
    if name == "peft.LoraFAOptimizer":
        raise ConfigurationError(
            f"optimizer {name} has the scaling of each factor, and its state by names, from its start; take another "
            "one",
            "optimizers",
        )
    if optimizer_state == "reset":
        check_reset(optimizer)
        if rule_name(optimizer) in ("schedulefree.AdamWScheduleFree", "schedulefree.RAdamScheduleFree"):
            # With v = 0 and the bias correction over, the first step would be 1 / sqrt(1 - beta2) = 31 times too long.
            raise ConfigurationError(
                f"optimizer {name} counts steps for a whole group, so the moments of one parameter cannot start again; "
                'set optimizer_state="transport"',
                "optimizer_state",
            )
        return
    if rules is None:
        carried = sorted(kind.removeprefix("torch.") for kind in RULES)
        raise ConfigurationError(
            f"the state of optimizer {name} cannot be carried through a change of rank; carried: {carried}; take one "
            'of these, or set optimizer_state="reset"',
            "optimizers",
            "optimizer_state",
        )
    if any(group.get("slice_p", 1) > 1 for group in optimizer.param_groups):
        raise ConfigurationError(
            f"optimizer {name} keeps every n-th number of a part of its state (slice_p), which cannot be carried; set "
            'slice_p=1, or optimizer_state="reset"',
            "optimizers",
            "optimizer_state",
        )
    for parameter in parameters:
        if parameter.ndim > 2 and ROW in rules.values():
            raise ConfigurationError(
                f"optimizer {name} keeps means of a convolution's factor (shape {[*parameter.shape]}) that cannot be "
                'carried; set optimizer_state="reset", or take another optimizer',
                "optimizer_state",
                "optimizers",
            )
        for key, value in optimizer.state.get(parameter, {}).items():
            if key not in rules:
                raise ConfigurationError(
                    f'no rule carries {key!r} of optimizer {name}; set optimizer_state="reset"', "optimizer_state"
                )
            if not moves(rules[key], value):
                continue
            shape = shape_of(rules[key], parameter)
            if value.shape not in (shape, (math.prod(shape),)):
                raise ConfigurationError(
                    f"{key!r} of optimizer {name} has shape {[*value.shape]} for a parameter of shape "
                    f'{[*parameter.shape]}; set optimizer_state="reset"',
                    "optimizer_state",
                )


def rule_name(optimizer: Optimizer) -> str:
    """The key in RULES: package, class, and the options that change the state; of the one that makes the steps."""
    optimizer = stepping(optimizer)
    cls = type(optimizer)
    # bitsandbytes can put its state into paged memory.
    options = {"is_paged": getattr(optimizer, "is_paged", False)}
    options["centered"] = any(group.get("centered") for group in optimizer.param_groups)
    chosen = "".join(f"({option})" for option, value in options.items() if value)
    return f"{cls.__module__.partition('.')[0]}.{cls.__qualname__}{chosen}"


def overwrites_gradients(optimizer: Optimizer) -> bool:
    """Whether a step may leave other values in the gradients than it has found.

    So do schedulefree's, Prodigy with a weight decay that is not decoupled, and SGD with Nesterov's momentum in the
    form for many tensors, torch's default on GPUs. Of an optimizer without a rule nothing is known.
    """
    name = rule_name(optimizer)
    if name == "torch.SGD":
        return any(group["nesterov"] for group in optimizer.param_groups)
    return name not in RULES or name.startswith(("schedulefree.", "prodigyopt."))


def shape_of(kind: str, parameter: nn.Parameter) -> tuple[int, ...]:
    """The shape of an entry of this kind; transformers' Adafactor and Prodigy may store it flat."""
    rows, columns = parameter.flatten(1).shape
    special = {ROW: (rows, 1), COLUMN: (1, columns), SCALES: (-(-parameter.numel() // BLOCK),)}
    return special.get(kind, (*parameter.shape,))


def moves(kind: str, value: Any) -> bool:
    """Whether a change of rank must transform the entry; not a count, nor Prodigy's single 0 for a tensor of zeros."""
    return kind != KEPT and value is not None and not (value.ndim == 0 and value == 0)


@dataclass(frozen=True)
class Move:
    """A linear change of one parameter's coordinates.

    Attributes:
        value: the parameter's new value, ``map @ old value`` along ``dim``, with random values in new directions.
        map_EKR: (E, K, R) float64, map of the parameter; a row of zeros is a direction that is new or was zero.
        gradient_map_EKR: (E, K, R) float64, map of its gradient.
        dim: dimension of the rank: 0 for lora_A, 1 for lora_B.
        gain: (E,) the largest allowed factor of the largest second moment of each product, at least 1.
    """

    value: Tensor
    map_EKR: Tensor
    gradient_map_EKR: Tensor
    dim: int
    gain: Tensor


def moved_states(
    optimizer: Optimizer, lora_A: nn.Parameter, lora_B: nn.Parameter, change: RankChange, optimizer_state: str
) -> dict[str, dict[str, Any]]:
    """{"lora_A", "lora_B": new state} of a layer's parameters, which still have their old values; {} for "reset".

    ``optimizer`` must have passed :func:`check_optimizer`. A parameter without state is left out.
    """
    from_A = change.from_A
    from_B = change.from_B
    count = len(change.from_A)
    gain_A = _gain(split(lora_B, count, 1), split(change.lora_B, count, 1))
    gain_B = _gain(split(lora_A, count, 0), split(change.lora_A, count, 0))
    both = {
        "lora_A": (lora_A, Move(change.lora_A, from_A, from_B.mT, 0, gain_A)),
        "lora_B": (lora_B, Move(change.lora_B, from_B.mT, from_A, 1, gain_B)),
    }
    return {
        factor: {} if optimizer_state == "reset" else moved_state(optimizer, parameter, move)
        for factor, (parameter, move) in both.items()
        if optimizer.state.get(parameter)
    }


def _gain(old_ERN: Tensor, new_EKN: Tensor) -> Tensor:
    """(E,) the largest possible growth of a squared gradient when the other factor changes; 1 if that was zero."""
    old, new = (factor.double().norm(dim=2).amax(1) for factor in (old_ERN, new_EKN))
    return torch.where(old > 0, (new / old).square(), 1.0).clamp_min(1.0)


@torch.no_grad()
def moved_state(optimizer: Optimizer, parameter: nn.Parameter, move: Move) -> dict[str, Any]:
    """The state of ``parameter`` for its new value; the old state does not change.

    Schedule-free may be in either mode: the same map transforms its two points, and it commutes with the switch between
    them.
    """
    state = optimizer.state[parameter]
    rules = RULES[rule_name(optimizer)]
    along = (ROW, COLUMN)[move.dim]

    def by_product(tensor: Tensor) -> Tensor:
        return split(tensor, len(move.map_EKR), move.dim)

    # The parameter's own shape differs in a convolution, whose rows are filters.
    def formed(matrix: Tensor) -> Tensor:
        rows = len(parameter) if move.dim else -1
        return matrix.reshape(rows, *([-1] if move.dim else []), *parameter.shape[1 + move.dim :])

    def squared(old_ERN: Tensor) -> Tensor:
        gradient_map_EKR = move.gradient_map_EKR.to(old_ERN.device)
        is_new = _empty(gradient_map_EKR)
        moved = gradient_map_EKR.square() @ old_ERN
        # New directions are zero in ``moved``, so the sum is that of the others.
        seed = moved.sum(1, keepdim=True) / (~is_new).sum(1, keepdim=True)
        seed = torch.where(is_new.all(1, keepdim=True), old_ERN.mean(1, keepdim=True), seed)
        bound = move.gain.to(old_ERN.device) * old_ERN.amax((1, 2))
        return torch.where(is_new, _SEED * seed, moved).minimum(bound[:, None, None])

    new: dict[str, Tensor] = {}
    for key, value in state.items():
        kind = rules[key]
        if kind == SCALES or not moves(kind, value):
            continue
        shape = shape_of(kind, parameter)
        old = _decoded(state, key).double().reshape(shape)
        if kind == LINEAR:
            moved = joined(move.gradient_map_EKR.to(old.device) @ by_product(old), move.dim)
        elif kind == STEP:
            moved = joined(move.map_EKR.to(old.device) @ by_product(old), move.dim)
        elif kind == POSITION:
            map_EKR = move.map_EKR.to(old.device)
            own = by_product(move.value.to(old.device, old.dtype))
            moved = joined(torch.where(_empty(map_EKR), own, map_EKR @ by_product(old)), move.dim)
        elif kind in (SQUARED, along):
            moved = joined(squared(by_product(old)), move.dim)
        else:
            # Adafactor's factor across the rank. If the mean of one factor is zero, both factors are zero.
            factor = state[next(name for name in rules if rules[name] == along)].double()
            factor = by_product(factor.reshape(shape_of(along, parameter)))
            moved = old * (squared(factor).mean() / factor.mean().clamp_min(torch.finfo(factor.dtype).tiny))
        # 8-bit state is encoded from float32.
        dtype = value.dtype if value.is_floating_point() else torch.float32
        moved = formed(moved) if kind not in (ROW, COLUMN) else moved
        new[key] = (moved if value.shape == shape else moved.flatten()).to(dtype)
        if not new[key].isfinite().all():
            raise ConfigurationError(
                f"{key!r} of optimizer {rule_name(optimizer)} would not be finite after the change of rank: it is not "
                'finite now, or lora_A and lora_B differ too much in size; set optimizer_state="reset"',
                "optimizer_state",
            )
    return _coded(optimizer, parameter, formed(move.value), new) if "qmap1" in rules else {**state, **new}


def _empty(map_EKR: Tensor) -> Tensor:
    return map_EKR.eq(0).all(dim=-1, keepdim=True)


def _decoded(state: dict[str, Any], key: str) -> Tensor:
    value: Tensor = state[key]
    if value.dtype == torch.uint8:
        scales = state[f"absmax{key[-1]}"]
        code = state[f"qmap{key[-1]}"]
        value = _bitsandbytes().dequantize_blockwise(value, absmax=scales, code=code, blocksize=BLOCK)
    return value


def _coded(optimizer: Any, parameter: nn.Parameter, value: Tensor, new: dict[str, Tensor]) -> dict[str, Any]:
    """The state in 8 or 32 bits, as the optimizer would choose for the new size (min_8bit_size)."""
    (position,) = (
        (group, group_index, index)
        for group_index, group in enumerate(optimizer.param_groups)
        for index, member in enumerate(group["params"])
        if member is parameter
    )
    # A copy of the optimizer initialises the new state, so that the old state does not change.
    twin = object.__new__(type(optimizer))
    vars(twin).update(vars(optimizer), state=defaultdict(dict))
    twin.init_state(position[0], value, *position[1:])
    state: dict[str, Any] = twin.state[value]
    state["step"] = optimizer.state[parameter]["step"]
    for key, moved in new.items():
        if state[key].dtype == torch.uint8:
            code = state[f"qmap{key[-1]}"]
            state[key], coding = _bitsandbytes().quantize_blockwise(moved, code=code, blocksize=BLOCK)
            state[f"absmax{key[-1]}"] = coding.absmax
        else:
            state[key] = moved
    return state


def _bitsandbytes() -> Any:
    # The module has been imported, because its optimizer exists.
    return sys.modules["bitsandbytes.functional"]
