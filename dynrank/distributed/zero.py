"""DeepSpeed's ZeRO: the flat partitions that it trains, and whole parameters and moments in them.

ZeRO flattens the parameters of a param group (ZeRO-3: of a sub-group), and each process steps a part of them in
float32. This module knows DeepSpeed's tensors, and nothing of adapters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from dynrank.distributed.processes import process_count, process_index
from dynrank.layers.partitioned import is_partitioned, whole_shape

# The one entry of the optimizer's state that is dynrank's.
OWN_STATE = "dynrank_last_update"


class Shard(NamedTuple):
    """What one process trains of one parameter: ``flat[start : start + size]``.

    Attributes:
        flat: the tensor that the optimizer steps.
        start: where the part begins in it.
        place: where it begins in the flattened parameter.
        size: how many numbers it has.
    """

    flat: Tensor
    start: int
    place: int
    size: int

    def of(self, flat: Tensor) -> Tensor:
        """This part of ``flat``, or of a tensor of its shape, as a view."""
        return flat[self.start : self.start + self.size]

    def of_whole(self, whole: Tensor) -> Tensor:
        """This part of the whole parameter."""
        return whole.flatten()[self.place : self.place + self.size]


class ZeroTensors:
    """Parameters that a DeepSpeed engine trains under ZeRO 1, 2 or 3.

    Args:
        engine: DeepSpeed's engine.
        parameters: the parameters, in one order in all processes.

    Attributes:
        shards: for each parameter the part that this process trains; None: another process has all of it.
        optimizer: the optimizer that steps them, inside of DeepSpeed's own.
    """

    def __init__(self, engine: Any, parameters: Sequence[nn.Parameter]) -> None:
        self._engine = engine
        self._whole = list(parameters)
        self._shapes = [*map(whole_shape, self._whole)]
        zero = engine.optimizer
        self.optimizer: Optimizer = zero.optimizer
        self.shards: list[Shard | None]
        if hasattr(zero, "sub_group_to_group_id"):
            self.shards = [_shard_of_sub_group(zero, parameter) for parameter in self._whole]
        else:
            places = _places(zero)
            self.shards = [_shard_of_group(zero, *places[id(parameter)], parameter) for parameter in self._whole]

    def state(self) -> dict[str, Any]:
        """The optimizer's state of any parameter; empty before its first step."""
        # Also where other processes have all of these parameters: all have to ask for the same moments.
        return next((state for state in self.optimizer.state.values() if state), {})

    @torch.no_grad()
    def whole(self, key: str | None = None) -> list[Tensor]:
        """The whole parameters in float32, or the entry ``key`` of their state; one collective call for all."""
        sizes = [shape.numel() for shape in self._shapes]
        everything = torch.zeros(sum(sizes), device=self._engine.device)
        parts = torch.split(everything, sizes)
        for part, shard in zip(parts, self.shards, strict=True):
            if shard is not None:
                shard.of_whole(part).copy_(shard.of(self._values(shard, key)))
        if process_count() > 1:
            # Each number is zero in all processes but one.
            distributed.all_reduce(everything)
        return [part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]

    def _values(self, shard: Shard, key: str | None) -> Tensor:
        value: Tensor = shard.flat if key is None else self.optimizer.state[shard.flat][key]
        return value

    @torch.no_grad()
    def write_state(self, key: str, values: Sequence[Tensor]) -> None:
        """Replace the entry ``key`` of the state of all parameters by whole ``values``."""
        for value, shard in zip(values, self.shards, strict=True):
            if shard is not None:
                shard.of(self._values(shard, key)).copy_(shard.of_whole(value))

    @torch.no_grad()
    def write(self, values: Sequence[Tensor]) -> None:
        """Replace all parameters by whole ``values``, also those that the forward pass reads; a collective call."""
        # DeepSpeed is imported here, because it is slow and few runs need it.
        from deepspeed.runtime.zero import GatheredParameters

        for value, shard in zip(values, self.shards, strict=True):
            if shard is not None:
                shard.of(shard.flat).copy_(shard.of_whole(value))
        partitioned = [parameter for parameter in self._whole if is_partitioned(parameter)]
        with GatheredParameters(partitioned, modifier_rank=0, enabled=bool(partitioned)):
            for parameter, value in zip(self._whole, values, strict=True):
                parameter.data.copy_(value)

    def groups(self) -> list[list[nn.Parameter]]:
        """The parameters of each of the optimizer's param groups."""
        zero = self._engine.optimizer
        if not hasattr(zero, "sub_group_to_group_id"):
            return [[*group] for group in zero.bit16_groups]
        groups: list[list[nn.Parameter]] = [[] for _ in self.optimizer.param_groups]
        for number, group in enumerate(zero.fp16_groups):
            groups[zero.sub_group_to_group_id[number]] += group
        return groups


def _shard_of_sub_group(zero: Any, parameter: Any) -> Shard:
    """ZeRO-3: each process has a part of the same size of each parameter, of which the last may end with padding."""
    number, start, size = zero.grad_position[zero.get_param_id(parameter)]
    place = process_index() * size
    return Shard(zero.fp32_partitioned_groups_flat[number], start, place, min(size, max(0, parameter.ds_numel - place)))


def _places(zero: Any) -> dict[int, tuple[int, int]]:
    """ZeRO-1 and 2: {id of a parameter: (number of its param group, where it begins in the flattened group)}.

    Each parameter is a view of its flattened group. DeepSpeed's own lists of places would do, but 0.18 has none. Its
    functions for single parameters (safe_get_full_fp32_param) read others in 0.19.8 if ``round_robin_gradients`` has
    changed the order.
    """
    places = {}
    for number, (group, flat) in enumerate(zip(zero.bit16_groups, zero.bit16_groups_flat, strict=True)):
        for parameter in group:
            assert parameter.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr()
            places[id(parameter)] = number, parameter.storage_offset() - flat.storage_offset()
    return places


def _shard_of_group(zero: Any, number: int, begin: int, parameter: nn.Parameter) -> Shard | None:
    """ZeRO-1 and 2: the flattened group is cut into parts of the same size, wherever parameters begin and end."""
    flat = zero.single_partition_of_fp32_groups[number]
    first = process_index() * flat.numel()
    start = max(begin, first)
    size = min(begin + parameter.numel(), first + flat.numel()) - start
    return Shard(flat, start - first, start - begin, size) if size > 0 else None


def has_flat_copy(parameter: nn.Parameter) -> bool:
    """Whether DeepSpeed trains a flat copy of ``parameter``."""
    # DeepSpeed parts every parameter under ZeRO 3, and gives it this method with all else that flattens.
    return is_partitioned(parameter) or hasattr(parameter, "get_full_hp_param")


class ZeroOptimizer(Optimizer):
    """Stands for the optimizer that DeepSpeed steps, with other parameters in place of flat partitions.

    It makes no steps. Its hooks are those of the other one, and so are all settings of its groups.

    Args:
        stepping: the optimizer that makes the steps.
        groups: the parameters of each of its param groups.

    Attributes:
        state: state of these parameters, which somebody else copies.
    """

    def __init__(self, stepping: Optimizer, groups: Sequence[list[nn.Parameter]]) -> None:
        self.stepping = stepping
        self.state = {}  # type: ignore[assignment]
        pairs = zip(stepping.param_groups, groups, strict=True)
        self.param_groups = [_Group(group, parameters) for group, parameters in pairs]  # type: ignore[misc]

    def register_step_pre_hook(self, hook: Any) -> RemovableHandle:
        return self.stepping.register_step_pre_hook(hook)

    def register_step_post_hook(self, hook: Any) -> RemovableHandle:
        return self.stepping.register_step_post_hook(hook)

    def register_state_dict_pre_hook(self, hook: Any, prepend: bool = False) -> RemovableHandle:
        return self.stepping.register_state_dict_pre_hook(hook, prepend)

    def register_state_dict_post_hook(self, hook: Any, prepend: bool = False) -> RemovableHandle:
        return self.stepping.register_state_dict_post_hook(hook, prepend)


def stepping(optimizer: Optimizer) -> Optimizer:
    """The optimizer that makes the steps: the one that a :class:`ZeroOptimizer` stands for, any other itself."""
    return optimizer.stepping if isinstance(optimizer, ZeroOptimizer) else optimizer


class _Group(MutableMapping[str, Any]):
    """A param group of DeepSpeed's optimizer with other parameters."""

    def __init__(self, group: dict[str, Any], parameters: list[nn.Parameter]) -> None:
        self._group = group
        self._members = parameters

    def __getitem__(self, key: str) -> Any:
        return self._members if key == "params" else self._group[key]

    def __setitem__(self, key: str, value: Any) -> None:
        # DeepSpeed's own stay in its group.
        if key != "params":
            self._group[key] = value

    def __delitem__(self, key: str) -> None:
        del self._group[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._group)

    def __len__(self) -> int:
        return len(self._group)


def moments(state: Mapping[str, Any]) -> list[str]:
    """The entries of an optimizer's own state of one parameter that have its shape."""
    return [k for k, value in state.items() if isinstance(value, Tensor) and value.ndim > 0 and k != OWN_STATE]
