"""Carrying an optimizer's state through a linear change of a parameter's coordinates.

Every entry of a parameter's state is of a kind (:mod:`dynrank.change.optimizer_rules`), which says how it moves. With E
the products that a factor stacks (the experts, or 1), R the old rank, K the new one, ``map_EKR`` that of the parameter
and ``gradient_map_EKR`` that of its gradient (gradients are covectors, so for lora_A it is the map of lora_B, and the
other way round), in each product by itself:

- what is linear in gradients moves by the gradient map;
- second moments move by its square, element by element: the diagonal of ``M diag(v) M^T``;
- Adafactor's second moment is the outer product ``row col / mean(row)``. The squared map takes it to another outer
  product: the factor along the rank moves by the squared map, and the other one, a mean over the rank and the products,
  is multiplied by the ratio of the new mean to the old one (both factors have the same mean);
- what lives where the parameter lives (the ``z`` of schedule-free) moves by the parameter's map, as do steps that are
  still to be made (the momentum of RMSprop, which is of its steps and not of gradients);
- counts stay.

A new direction starts with first moments and steps of zero, with a position that is the parameter's own, and with
second moments of 2.5 times the mean of the carried ones: v = 0 under an old step count makes Adam take several times
its normal step.

Second moments are bounded: ``max(v') <= max(v) max(1, (b' / b)^2)``, where b and b' are the largest norms of a column
of the other factor before and after. The gradient of a row of A is ``b_r^T G``, with b_r a column of B and G the
gradient of the update, so its square grows with the norm of b_r squared and with nothing else that a change of
coordinates does. The diagonal alone does not know this: where columns of B are nearly parallel, or weak, the gradient
map has entries of 1 / sqrt(sigma), and the gradients that would cancel are added up as squares. Repeated faster than
Adam forgets, and with the mean of the result as the seed of new directions, that has no bound: between rank 4 and 8
every 3 steps v came to 6.5e9 after 400 changes, between 1 and 10 to infinity after 738.

8-bit state (Dettmers et al., arXiv:2110.02861) is decoded, moved and coded again with its library's own functions.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dynrank.change.optimizer_rules import (
    BLOCK,
    COLUMN,
    LINEAR,
    POSITION,
    ROW,
    RULES,
    SCALES,
    SQUARED,
    STEP,
    moves,
    rule_name,
    shape_of,
)
from dynrank.errors import ConfigurationError
from dynrank.linalg import RankChange, joined, split

# Second moments of a new direction, as a multiple of the mean of the others. Its first gradients agree in sign, those
# of trained directions mostly cancel. With the mean itself, beta1 = 0.9 and gradients of one size, the first 10 steps
# are rms(1 - 0.9^k) = 0.45 of the rate for the former and sqrt(0.1 / 1.9) = 0.23 for the latter. To stay below 1.5
# times the latter takes (0.45 / 0.23 / 1.5)^2 = 1.7; 2.5 leaves room for gradients 1.2 times as large as the others.
_SEED = 2.5


@dataclass(frozen=True)
class Move:
    """A linear change of one parameter's coordinates.

    Attributes:
        value: the parameter's new value, ``map @ old value`` along ``dim``, with fresh values in new directions.
        map_EKR: (E, K, R) float64, of the parameter; a row of zeros is a direction that is new, or held nothing.
        gradient_map_EKR: (E, K, R) float64, of its gradient.
        dim: where the rank is: 0 for lora_A, 1 for lora_B.
        gain: (E,) how much larger the largest second moment of each product may become, at least 1.
    """

    value: Tensor
    map_EKR: Tensor
    gradient_map_EKR: Tensor
    dim: int
    gain: Tensor


def moved_states(
    optimizer: Optimizer, lora_A: nn.Parameter, lora_B: nn.Parameter, change: RankChange, optimizer_state: str
) -> dict[nn.Parameter, dict[str, Any]]:
    """New states of a layer's parameters, which still have their old values; empty for "reset".

    ``optimizer`` has passed :func:`check_optimizer`; a parameter that has no state in it gets none. Errors as in
    :func:`moved_state`.
    """
    from_A, from_B, count = change.from_A, change.from_B, len(change.from_A)
    gain_A = _gain(split(lora_B, count, 1), split(change.lora_B, count, 1))
    gain_B = _gain(split(lora_A, count, 0), split(change.lora_A, count, 0))
    moves = {
        lora_A: Move(change.lora_A, from_A, from_B.mT, 0, gain_A),
        lora_B: Move(change.lora_B, from_B.mT, from_A, 1, gain_B),
    }
    known = {parameter: move for parameter, move in moves.items() if optimizer.state.get(parameter)}
    if optimizer_state == "reset":
        return {parameter: {} for parameter in known}
    return {parameter: moved_state(optimizer, parameter, move) for parameter, move in known.items()}


def _gain(old_ERN: Tensor, new_EKN: Tensor) -> Tensor:
    """(E,) by how much the largest squared gradient may grow when the other factor changes; 1 where that was zero."""
    old, new = (factor.double().norm(dim=2).amax(1) for factor in (old_ERN, new_EKN))
    return torch.where(old > 0, (new / old).square(), 1.0).clamp_min(1.0)


@torch.no_grad()
def moved_state(optimizer: Optimizer, parameter: nn.Parameter, move: Move) -> dict[str, Any]:
    """The state of ``parameter`` for its new value; the old state is left as it is.

    Schedule-free may be in either mode: its two points move by the same map, which commutes with going from one to the
    other.
    """
    state, rules, along = optimizer.state[parameter], RULES[rule_name(optimizer)], (ROW, COLUMN)[move.dim]

    def by_product(tensor: Tensor) -> Tensor:
        return split(tensor, len(move.map_EKR), move.dim)

    # In the parameter's shape, which has filters in a convolution.
    def formed(matrix: Tensor) -> Tensor:
        rows = len(parameter) if move.dim else -1
        return matrix.reshape(rows, *([-1] if move.dim else []), *parameter.shape[1 + move.dim :])

    def squared(old_ERN: Tensor) -> Tensor:
        gradient_map_EKR = move.gradient_map_EKR.to(old_ERN.device)
        is_new = _empty(gradient_map_EKR)
        moved = gradient_map_EKR.square() @ old_ERN
        # The sum is that of the carried directions, since new ones have zeros in ``moved``.
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
            map_EKR, own = move.map_EKR.to(old.device), by_product(move.value.to(old.device, old.dtype))
            moved = joined(torch.where(_empty(map_EKR), own, map_EKR @ by_product(old)), move.dim)
        elif kind in (SQUARED, along):
            moved = joined(squared(by_product(old)), move.dim)
        else:
            # Adafactor's factor across the rank: both factors are zero where one has the mean zero.
            factor = state[next(name for name in rules if rules[name] == along)].double()
            factor = by_product(factor.reshape(shape_of(along, parameter)))
            moved = old * (squared(factor).mean() / factor.mean().clamp_min(torch.finfo(factor.dtype).tiny))
        # 8-bit state is coded from float32.
        dtype = value.dtype if value.is_floating_point() else torch.float32
        moved = formed(moved) if kind not in (ROW, COLUMN) else moved
        new[key] = (moved if value.shape == shape else moved.flatten()).to(dtype)
        if not new[key].isfinite().all():
            raise ConfigurationError(
                f"{key!r} of optimizer {rule_name(optimizer)} would not be finite after the change of rank: it is not "
                "now, or the scales of lora_A and lora_B are too far apart; set schedule.how.optimizer_state=reset"
            )
    return _coded(optimizer, parameter, formed(move.value), new) if "qmap1" in rules else {**state, **new}


def _empty(map_EKR: Tensor) -> Tensor:
    return map_EKR.eq(0).all(dim=-1, keepdim=True)


def _decoded(state: dict[str, Any], key: str) -> Tensor:
    value: Tensor = state[key]
    if value.dtype == torch.uint8:
        scales, code = state[f"absmax{key[-1]}"], state[f"qmap{key[-1]}"]
        value = _bitsandbytes().dequantize_blockwise(value, absmax=scales, code=code, blocksize=BLOCK)
    return value


def _coded(optimizer: Any, parameter: nn.Parameter, value: Tensor, new: dict[str, Tensor]) -> dict[str, Any]:
    """The state in 8 or 32 bits, as the optimizer would have begun with at the new size (min_8bit_size)."""
    (place,) = (
        (group, group_index, index)
        for group_index, group in enumerate(optimizer.param_groups)
        for index, member in enumerate(group["params"])
        if member is parameter
    )
    # The twin writes into a state of its own.
    twin = object.__new__(type(optimizer))
    vars(twin).update(vars(optimizer), state=defaultdict(dict))
    twin.init_state(place[0], value, *place[1:])
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
    # The module is loaded, since its optimizer exists.
    return sys.modules["bitsandbytes.functional"]
