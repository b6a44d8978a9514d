"""Bytes of an optimizer's state, by making the optimizer and a step of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dynrank.errors import ConfigurationError
from dynrank.models.sizes import storage_bytes
from dynrank.tasks.optimizers import make_optimizer

__all__ = ["optimizer_state_bytes"]


def optimizer_state_bytes(
    adapter: Iterable[nn.Parameter], head: Iterable[nn.Parameter], options: Mapping[str, Any]
) -> int:
    """Bytes of the state after a step, for parameters whose shapes and dtypes alone are looked at.

    The step is made for real, on zeros, for two parameters of each kind: state that the two share is counted once (the
    tables of an 8-bit optimizer), the rest as often as there are parameters of the kind.

    Args:
        adapter: parameters of LoRA layers.
        head: parameters of modules that are trained whole.
        options: keyword arguments of :func:`dynrank.tasks.optimizers.make_optimizer`.

    Raises:
        ConfigurationError: if the optimizer cannot be made or does not make a step.
    """
    kinds = [Counter((parameter.shape, parameter.dtype) for parameter in group) for group in (adapter, head)]
    groups = [
        {kind: [_stand_in(*kind) for _ in range(min(count, 2))] for kind, count in counts.items()} for counts in kinds
    ]
    of_adapter, of_head = ([p for ps in group.values() for p in ps] for group in groups)
    made: Any = make_optimizer(of_adapter, of_head, 1000, **options)
    optimizer = made["optimizer"]
    if hasattr(optimizer, "train"):  # a schedule-free one has modes
        optimizer.train()
    try:
        optimizer.step()
    except (RuntimeError, TypeError) as error:
        raise ConfigurationError(
            f"optimizer.name={options['name']} does not make a step on its own: {error}; set optimizer"
        ) from error
    states = [
        (_tensors(optimizer.state[ps[0]]), counts[kind])
        for group, counts in zip(groups, kinds, strict=True)
        for kind, ps in group.items()
    ]
    holders = Counter(key for state in optimizer.state.values() for key in {_key(t) for t in _tensors(state)})
    own = sum(count * storage_bytes(t for t in tensors if holders[_key(t)] == 1) for tensors, count in states)
    return own + storage_bytes(t for tensors, _ in states for t in tensors if holders[_key(t)] > 1)


def _stand_in(shape: torch.Size, dtype: torch.dtype) -> nn.Parameter:
    parameter = nn.Parameter(torch.zeros(shape, dtype=dtype))
    parameter.grad = torch.zeros_like(parameter)
    return parameter


def _tensors(state: Mapping[str, Any]) -> list[Tensor]:
    return [value for value in state.values() if isinstance(value, Tensor)]


def _key(tensor: Tensor) -> int:
    key: int = tensor.untyped_storage()._cdata
    return key
