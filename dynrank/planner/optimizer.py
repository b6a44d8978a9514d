"""The bytes of an optimizer's state, measured after a real step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dynrank.errors import ConfigurationError
from dynrank.models.sizes import storage_bytes, storage_key
from dynrank.tasks.optimizers import make_optimizer


def optimizer_state_bytes(
    adapter: Iterable[nn.Parameter], head: Iterable[nn.Parameter], options: Mapping[str, Any]
) -> int:
    """The bytes of the optimizer's state after a step, by the shapes and dtypes of the parameters.

    The step runs on zeros, with at most two parameters of each shape and dtype. State that both share (the tables of
    an 8-bit optimizer) counts once, all other state once for each parameter. The arguments are those of
    :func:`dynrank.tasks.optimizers.make_optimizer`.
    """
    of_adapter, of_head = _stand_ins(adapter), _stand_ins(head)
    made: Any = make_optimizer([*of_adapter], [*of_head], 1000, **options)
    optimizer = made["optimizer"]
    # A schedule-free optimizer has modes for training and evaluation.
    if hasattr(optimizer, "train"):
        optimizer.train()
    try:
        optimizer.step()
    except (RuntimeError, TypeError) as error:
        raise ConfigurationError(
            f"optimizer.name={options['name']} cannot make a step: {error}; set optimizer"
        ) from error
    stand_ins = of_adapter | of_head
    tensors = {p: [value for value in optimizer.state[p].values() if isinstance(value, Tensor)] for p in stand_ins}
    holders = Counter(key for held in tensors.values() for key in {storage_key(tensor) for tensor in held})
    shared = storage_bytes(t for held in tensors.values() for t in held if holders[storage_key(t)] > 1)
    own = {p: storage_bytes(t for t in held if holders[storage_key(t)] == 1) for p, held in tensors.items()}
    return shared + round(sum(count * own[p] for p, count in stand_ins.items()))


def _stand_ins(parameters: Iterable[nn.Parameter]) -> dict[nn.Parameter, float]:
    """At most two new parameters of each shape and dtype -> how many of ``parameters`` each represents."""
    made = {}
    for (shape, dtype), count in Counter((parameter.shape, parameter.dtype) for parameter in parameters).items():
        for _ in range(min(count, 2)):
            parameter = nn.Parameter(torch.zeros(shape, dtype=dtype))
            parameter.grad = torch.zeros_like(parameter)
            made[parameter] = count / min(count, 2)
    return made
