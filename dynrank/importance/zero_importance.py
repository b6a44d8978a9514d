"""The importance of layers under DeepSpeed's ZeRO, where each process has a part of every step.

A product of gradient and update is a sum over numbers. So each process sums over the numbers that it trains, in
DeepSpeed's flat partitions, where the gradient is averaged, unscaled and clipped; one collective call a step adds up
what all processes have found.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, distributed
from torch.optim import Optimizer

from dynrank.distributed.processes import process_count
from dynrank.distributed.zero import OWN_STATE, ZeroTensors
from dynrank.importance.importance import ImportanceSums
from dynrank.layers.ranked_layer import RankedLayer


class ZeroImportance(ImportanceSums):
    """The importance of layers whose factors a DeepSpeed engine trains, from here to :meth:`remove`.

    The last update of each flat partition is in the optimizer's state, so that DeepSpeed saves and loads it.

    Args:
        layers: name -> layer.
        tensors: lora_A and lora_B of each of them, in turn.
        device: that of messages between processes.
    """

    def __init__(self, layers: Mapping[str, RankedLayer], tensors: ZeroTensors, device: torch.device) -> None:
        super().__init__(layers, device)
        self._optimizer = tensors.optimizer
        self._partitions = _partitions(tensors)
        # The products of each layer in the step just made; None: there was none.
        self._products: Tensor | None = None
        # Whether there is an update of the step before, perhaps in other processes alone.
        self._has_update = False
        before = self._optimizer.register_step_pre_hook(self._measure)
        self._handles = [before, self._optimizer.register_step_post_hook(self._take_update)]

    def is_of(self, layers: Mapping[str, RankedLayer]) -> bool:
        # DeepSpeed makes its tensors anew for each training.
        return False

    def forget_last_update(self) -> None:
        self._has_update = False
        for state in self._optimizer.state.values():
            state.pop(OWN_STATE, None)

    def remove(self) -> None:
        """Measure no longer, and free what is held."""
        for handle in self._handles:
            handle.remove()
        self.forget_last_update()

    @torch.no_grad()
    def _measure(self, optimizer: Optimizer, *_: Any) -> None:
        """Multiply the update before a step by its gradient, and keep the values from before the step."""
        if self._products is None:
            self._products = self._zeros(len(self._names))
        for partition in self._stepped(optimizer):
            update = optimizer.state[partition.flat].get(OWN_STATE)
            if update is not None:
                self._products += partition.products(update, len(self._names)).to(self._device)
            partition.before = partition.flat.detach().clone() if update is None else update.copy_(partition.flat)

    @torch.no_grad()
    def _take_update(self, optimizer: Optimizer, *_: Any) -> None:
        for partition in self._stepped(optimizer):
            assert partition.before is not None
            # The optimizer has made its own state by now: it takes any entry for a sign that it has.
            optimizer.state[partition.flat][OWN_STATE] = torch.sub(
                partition.flat, partition.before, out=partition.before
            )
            partition.before = None

    def _stepped(self, optimizer: Optimizer) -> list[_Partition]:
        """The partitions of the present step; DeepSpeed makes one step for each of them."""
        members = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        return [self._partitions[id(flat)] for flat in members if id(flat) in self._partitions]

    @torch.no_grad()
    def end_step(self) -> None:
        """Add up the step just made; a collective call."""
        products = self._products
        self._products = None
        # DeepSpeed leaves out a step in all processes or in none.
        if products is None:
            return
        if self._has_update:
            if process_count() > 1:
                distributed.all_reduce(products)
            self.add(-products, torch.ones_like(products))
        self._has_update = True

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "has_update": self._has_update}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._has_update = state["has_update"]


class _Partition:
    """A flat tensor of DeepSpeed's with factors of layers, in a process.

    Attributes:
        flat: the tensor.
        before: its values before the present step; None outside of a step.
    """

    def __init__(self, flat: Tensor, parts: Sequence[tuple[int, int, int]]) -> None:
        self.flat = flat
        self.before: Tensor | None = None
        # (length, layer), with the numbers between the parts, which are of no layer.
        lengths: list[int] = []
        layers: list[int] = []
        end = 0
        for start, count, layer in sorted(parts):
            lengths += [start - end, count]
            layers += [-1, layer]
            end = start + count
        lengths.append(flat.numel() - end)
        layers.append(-1)
        self._lengths = torch.tensor(lengths, device=flat.device)
        self._layers = torch.tensor(layers, device=flat.device)

    def products(self, update: Tensor, count: int) -> Tensor:
        """(count,) float64: the sum of gradient times update of each layer; ``update`` is lost."""
        found = torch.zeros(count + 1, dtype=torch.float64, device=self.flat.device)
        if self.flat.grad is not None:
            values = update.mul_(self.flat.grad).double()
            # Without checks of the lengths, which would wait for the GPU.
            sums = torch.segment_reduce(values, "sum", lengths=self._lengths, unsafe=True)
            # -1, of no layer, is the last.
            found.index_add_(0, self._layers % (count + 1), sums)
        return found[:count]


def _partitions(tensors: ZeroTensors) -> dict[int, _Partition]:
    """{id of a flat tensor: its partition} for all of which this process has a part."""
    flats: dict[int, Tensor] = {}
    parts: dict[int, list[tuple[int, int, int]]] = {}
    for number, shard in enumerate(tensors.shards):
        if shard is not None and shard.size:
            flats[id(shard.flat)] = shard.flat
            parts.setdefault(id(shard.flat), []).append((shard.start, shard.size, number // 2))
    return {key: _Partition(flat, parts[key]) for key, flat in flats.items()}
