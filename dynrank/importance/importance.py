"""The importance of a layer: how much the layer's updates have lowered the loss so far.

This is loss change allocation (Lan et al., arXiv:1909.01440): ``-sum_t g_{t+1} . (theta_{t+1} - theta_t)`` over the
optimizer steps. The gradient is that of the next step, so an update is not judged by the noise of its own batch. The
terms come from the factors and gradients that every optimizer step has anyway, whatever the optimizer, the layer or the
way it is trained.

A step takes the same number of operations for any number of layers: the updates of all factors on one device lie in
one buffer, in which every factor begins at a multiple of ``BLOCK`` numbers.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from math import sqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dynrank.change.reports import score
from dynrank.layers.ranked_layer import RankedLayer
from dynrank.private import foreach_copy_, foreach_mul_, foreach_sub_
from dynrank.schedules import Stage

# Sums over blocks of so many numbers are in float64, and those of a factor's blocks are then added.
BLOCK = 1024


class LayerImportance(NamedTuple):
    """The importance of one layer.

    Attributes:
        value: the decrease of the loss by its updates; negative if they have raised the loss.
        error: its standard error over the steps.
    """

    value: float
    error: float

    @property
    def score(self) -> float:
        """What ranks are in proportion to."""
        return score(self.value, self.error)


class ImportanceSums:
    """Sums the decrease of the loss by layer; all sums are float64 on one device.

    Args:
        names: the names of the layers.
        device: that of the sums.
    """

    def __init__(self, names: Iterable[str], device: torch.device) -> None:
        self._names = list(names)
        self._device = device
        self._sums = self._zeros(len(self._names))
        self._squares = self._zeros(len(self._names))
        # By layer, because optimizers may step in turn.
        self._steps = self._zeros(len(self._names))

    def is_of(self, layers: Mapping[str, RankedLayer]) -> bool:
        """Whether these are the layers that are measured."""
        return self._names == [*layers]

    def forget_last_update(self) -> None:
        """Forget the last update, and keep the sums; call it after factors have changed other than by a step."""
        raise NotImplementedError

    def add(self, terms: Tensor, counted: Tensor) -> None:
        """Add the terms of a step: both (layers,) float64, and ``counted`` is 1 where a layer was measured, else 0."""
        # Gradients that are not finite, as those of a step that GradScaler has skipped, say nothing.
        is_known = terms.isfinite().all()
        terms = torch.where(is_known, terms, 0.0)
        self._sums += terms
        self._squares += terms.square()
        self._steps += is_known * counted

    def _zeros(self, count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.float64, device=self._device)

    def of_layers(self) -> dict[str, LayerImportance]:
        """{layer: its importance}; empty before the second step."""
        steps = self._steps.tolist()
        if not any(steps):
            return {}
        found = {}
        sums = self._sums.tolist()
        squares = self._squares.tolist()
        for name, value, square, count in zip(self._names, sums, squares, steps, strict=True):
            # The standard deviation of a step's term, times the root of the number of steps.
            deviations = max(square - value**2 / max(count, 1.0), 0.0)
            found[name] = LayerImportance(value, sqrt(deviations * count / (count - 1)) if count > 1 else 0.0)
        return found

    def unmeasured(self) -> list[str]:
        """The layers that have never had an update and a gradient after it."""
        return [name for name, count in zip(self._names, self._steps.tolist(), strict=True) if not count]

    def state_dict(self) -> dict[str, Any]:
        """Plain lists of numbers."""
        return {"sums": self._sums.tolist(), "squares": self._squares.tolist(), "steps": self._steps.tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state``; the layers hold the factors of the same checkpoint."""
        for sums, saved in ((self._sums, "sums"), (self._squares, "squares"), (self._steps, "steps")):
            sums.copy_(torch.tensor(state[saved], dtype=torch.float64))


class Importance(ImportanceSums):
    """The importance of layers whose factors and gradients every process holds whole.

    Args:
        layers: name -> layer, at the start of the run or as in the checkpoint.
    """

    def __init__(self, layers: Mapping[str, RankedLayer]) -> None:
        device = next((layer.lora_A.device for layer in layers.values()), torch.device("cpu"))
        super().__init__(layers, device)
        self._layers = dict(layers)
        self.forget_last_update()

    def is_of(self, layers: Mapping[str, RankedLayer]) -> bool:
        pairs = zip(_factors_of(layers), self._factors, strict=False)
        return super().is_of(layers) and all(a is b for a, b in pairs)

    def forget_last_update(self) -> None:
        # Changes of rank keep these objects, and looking them up in PEFT's modules takes longer than a step's sums.
        factors = _factors_of(self._layers)
        self._factors = factors
        # The old buffers are freed before the new ones are made.
        self._updates: list[_Updates] = []
        self._updates = [
            _Updates([(number, factors[number]) for number in numbers], dtype, self._device)
            for (_, dtype), numbers in _by_kind(factors).items()
        ]
        # Whether there is an update that waits for the next gradient of its factor.
        self._has_update = [False] * len(factors)
        # Which factors the last step has measured, and the same by factor and by layer as tensors.
        self._measured: tuple[list[bool], Tensor, Tensor] | None = None

    @torch.no_grad()
    def end_step(
        self,
        stepped: Collection[int] | None = None,
        scales: Mapping[int, Tensor] | None = None,
        kept: Mapping[int, Tensor] | None = None,
    ) -> None:
        """Take the gradients of the optimizer step just made and the update before it; nothing waits for a GPU.

        Args:
            stepped: ids of the parameters of the optimizers that have made it; None: all.
            scales: {id of a parameter: what its gradient is multiplied by}; others have their gradient as it is.
            kept: {id of a parameter: its gradient}, where the optimizer has overwritten the one of the parameter.
        """
        factors = self._factors
        # Somebody else has changed ranks.
        if not all(buffer.fits(factors) for buffer in self._updates):
            self.forget_last_update()
            return
        # Gradients of another optimizer's factors may be old ones, from which their last update was made.
        kept = kept or {}
        present = [(id(factor), kept.get(id(factor), factor.grad)) for factor in factors]
        grads = [grad if stepped is None or key in stepped else None for key, grad in present]
        measured = [grad is not None and known for grad, known in zip(grads, self._has_update, strict=True)]
        if any(measured):
            self._add(grads, measured, scales or {})
        for buffer in self._updates:
            buffer.replace(factors, grads)
        self._has_update = [grad is not None or known for grad, known in zip(grads, self._has_update, strict=True)]

    def _add(self, grads: Sequence[Tensor | None], measured: list[bool], scales: Mapping[int, Tensor]) -> None:
        """Add the terms of a step; ``measured`` are the factors with a gradient and an update before it."""
        if self._measured is None or self._measured[0] != measured:
            # Made anew only if it differs from that of the step before, because each copy to a GPU takes time.
            by_layer = [a or b for a, b in zip(measured[::2], measured[1::2], strict=True)]
            counted = torch.tensor(by_layer, dtype=torch.float64, device=self._device)
            self._measured = measured, torch.tensor(measured, device=self._device), counted
        _, is_measured, counted = self._measured
        products = self._zeros(len(measured))
        for buffer in self._updates:
            products.index_copy_(0, buffer.numbers, buffer.products(grads).to(self._device))
        if scales:
            one = torch.ones((), device=next(iter(scales.values())).device)
            products /= torch.stack([scales.get(id(factor), one) for factor in self._factors]).to(self._device)
        self.add(-torch.where(is_measured, products, 0.0).view(-1, 2).sum(1), counted)

    def state_dict(self) -> dict[str, Any]:
        """Plain containers and tensors; the updates are copied, because the next step replaces them."""
        updates = {number: update for buffer in self._updates for number, update in buffer.updates.items()}
        known = [updates[number].clone() if known else None for number, known in enumerate(self._has_update)]
        return {**super().state_dict(), "updates": known}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._has_update = [update is not None for update in state["updates"]]
        for buffer in self._updates:
            for number, update in buffer.updates.items():
                if self._has_update[number]:
                    # A layer's device may differ from the one in the run before.
                    update.copy_(state["updates"][number])


class _Updates:
    """The factors before the last step, and their last updates, on one device and in one dtype.

    Args:
        factors: (number of the factor among those of all layers, the factor).
        dtype: that of the updates.
        sums_on: the device of ``numbers``.

    Attributes:
        numbers: (F,) int64, the numbers of the factors.
        updates: {number: the last update}, views of one buffer.
    """

    def __init__(self, factors: Sequence[tuple[int, nn.Parameter]], dtype: torch.dtype, sums_on: torch.device) -> None:
        device = factors[0][1].device
        blocks = [_blocks(factor.numel()) for _, factor in factors]
        # (all blocks, BLOCK); the numbers between two factors stay zero.
        self._flat = torch.zeros(sum(blocks), BLOCK, dtype=dtype, device=device)
        self._blocks = torch.tensor(blocks, device=device)
        self.numbers = torch.tensor([number for number, _ in factors], device=sums_on)
        parts = torch.split(self._flat, blocks)
        self.updates = {
            number: part.flatten()[: factor.numel()].view(factor.shape)
            for part, (number, factor) in zip(parts, factors, strict=True)
        }
        self._before = {number: factor.detach().clone() for number, factor in factors}

    def fits(self, factors: Sequence[nn.Parameter]) -> bool:
        """Whether the factors have the shapes that they had before."""
        return all(factors[number].shape == before.shape for number, before in self._before.items())

    def products(self, grads: Sequence[Tensor | None]) -> Tensor:
        """(F,) float64: the sum of gradient times update of each factor; that of a factor without gradient is void.

        The updates of factors with a gradient are lost, because :meth:`replace` overwrites them next.
        """
        known = {number: grad for number in self.updates if (grad := grads[number]) is not None}
        if known:
            foreach_mul_([self.updates[number] for number in known], [*known.values()])
        sums = self._flat.sum(1, dtype=torch.float64)
        # Without checks of the lengths, which would wait for the GPU.
        return torch.segment_reduce(sums, "sum", lengths=self._blocks, unsafe=True)

    def replace(self, factors: Sequence[nn.Parameter], grads: Sequence[Tensor | None]) -> None:
        """Take the updates of the step just made; an update waits for the next gradient of its factor."""
        known = [number for number in self.updates if grads[number] is not None]
        if known:
            updates = [self.updates[number] for number in known]
            foreach_copy_(updates, [factors[number] for number in known])
            foreach_sub_(updates, [self._before[number] for number in known])
        foreach_copy_([*self._before.values()], [factors[number] for number in self._before])


def shares_by_importance(stages: Iterable[Stage]) -> bool:
    """Whether a stage shares ranks by importance."""
    return any("importance" in stage.to.needs for stage in stages)


def bytes_held(factors: Iterable[nn.Parameter]) -> int:
    """The bytes that :class:`Importance` holds for these factors: their values before a step, and their updates."""
    total = 0
    for factor in factors:
        total += factor.numel() * factor.dtype.itemsize
        total += _blocks(factor.numel()) * BLOCK * _dtype_of_updates(factor).itemsize
    return total


def _blocks(count: int) -> int:
    """How many blocks hold so many numbers."""
    return -(-count // BLOCK)


def _dtype_of_updates(factor: Tensor) -> torch.dtype:
    return torch.promote_types(factor.dtype, torch.float32)


def _by_kind(factors: Sequence[nn.Parameter]) -> dict[tuple[torch.device, torch.dtype], list[int]]:
    """{(device, dtype of the updates): the numbers of the factors}."""
    kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for number, factor in enumerate(factors):
        kinds.setdefault((factor.device, _dtype_of_updates(factor)), []).append(number)
    return kinds


def _factors_of(layers: Mapping[str, RankedLayer]) -> list[nn.Parameter]:
    """lora_A and lora_B of every layer, in turn."""
    return [factor for layer in layers.values() for factor in (layer.lora_A, layer.lora_B)]
