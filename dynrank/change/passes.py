"""The backward passes of an optimizer step: of each LoRA layer and each example the core ``sum_t dz_t z_t^T``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from dynrank.change.calls import Call, Calls, counted
from dynrank.layers.ranked import RankedLayer
from dynrank.linalg import split
from dynrank.private import backward_number


@dataclass
class Pass:
    """One call's part in a backward pass: its examples, and what the layers have shown.

    Attributes:
        task: the number of the backward pass.
        rows: examples.
        call: the call, where one is known.
        terms: of the loss, as the first layer has shown them, where no call is known.
        calls: by module, those that belong to it.
        kept: which examples are kept.
        cores: (examples kept, E, R, R) by layer, of a layer in ``whole`` (1, E, R, R); E products have one core each.
        whole: the layers that have shown the sum of all examples alone.
    """

    task: int
    rows: int
    call: Call | None = None
    terms: Tensor | None = None
    calls: dict[nn.Module, Call] = field(default_factory=dict)
    kept: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.long))
    cores: dict[str, Tensor] = field(default_factory=dict)
    whole: set[str] = field(default_factory=set)

    @property
    def sizes(self) -> list[int] | None:
        return self.call.sizes if self.call is not None else None

    def thin(self, room: int) -> None:
        """Keep no more than ``room`` of its examples, evenly spread."""
        stay = _evenly(len(self.kept), room)
        self.kept = self.kept[stay]
        for name in self.cores.keys() - self.whole:
            self.cores[name] = self.cores[name][stay.to(self.cores[name].device)]

    def counted(self) -> tuple[int, str]:
        """(terms of its part of the loss, who has counted them)."""
        call = self.call
        if call is not None and call.terms is not None:
            return int(call.terms), "the model's output"
        if call is not None and call.learned is not None:
            return int(call.learned), "its labels"
        if self.terms is not None:
            return int(self.terms), "the layer nearest to the loss"
        if call is not None:
            return self.rows, "its examples"
        return self.rows, "the backward passes, for want of better (set loss_terms)"


class Passes:
    """The backward passes of ``model`` since the last optimizer step, watched until :meth:`close`.

    Args:
        model: holds the layers.
        layers: name -> layer.
        quota: how many examples of a step are kept.

    Attributes:
        room: how many examples each pass may keep; it falls where a step has many passes.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, RankedLayer], quota: int) -> None:
        self.room, self._quota, self._layers = quota, quota, dict(layers)
        self._passes: list[Pass] = []
        self._stops = []
        for name, layer in layers.items():
            if layer.observe is not None:
                self._stops.append(layer.observe(partial(self._tap, name)))
            self._stops.append(layer.lora_A.register_hook(partial(self._whole, name)).remove)  # type: ignore[no-untyped-call]
        self._stops.append(Calls(model, [layer.module for layer in layers.values()], self._arrive).close)

    def take(self) -> list[Pass]:
        """What the step that has ended leaves; the next one begins."""
        passes, self._passes = self._passes, []
        return passes

    def close(self) -> None:
        """Stop watching."""
        for stop in self._stops:
            stop()
        self._stops = []

    def _arrive(self, call: Call) -> None:
        """Begin what a call has in a backward pass; a module that is called once more brings other examples."""
        last, task = self._passes[-1] if self._passes else None, backward_number()
        if last is None or last.task != task or last.calls.get(call.module, call) is not call:
            last = self._begin(task, len(call.sizes) if call.sizes is not None else call.rows, call)
        last.calls[call.module] = call

    def _begin(self, task: int, rows: int, call: Call | None = None) -> Pass:
        """Another pass of the step; each keeps as many of its examples, and at least one."""
        self.room = min(self.room, max(1, self._quota // (len(self._passes) + 1)))
        for each in self._passes:
            if len(each.kept) > self.room:
                each.thin(self.room)
        self._passes.append(Pass(task, rows, call, kept=_evenly(rows, self.room)))
        return self._passes[-1]

    def _current(self, name: str, rows: int) -> Pass:
        """The pass in which a layer reports. Without calls, reentrant checkpointing's backward passes are one."""
        last, task = self._passes[-1] if self._passes else None, backward_number()
        if last is not None and (last.call is not None or last.task == task or name not in last.cores):
            if last.call is None:
                last.task = task
            return last
        return self._begin(task, rows)

    @torch.no_grad()
    def _tap(self, name: str, z: Tensor, dz: Tensor) -> None:
        """Add the cores of a layer's examples; it may be used twice in a pass."""
        # One position without a batch is one example.
        z, dz = (t[None] if t.ndim == 1 else t for t in (z, dz))
        current = self._current(name, len(dz))
        if current.call is None and current.terms is None:
            current.terms = counted(dz)
        examples = _by_example(z, dz, current)
        # Where they cannot be told apart, the gradient of A has their sum.
        if examples is None or name in current.whole:
            current.cores.pop(name, None)
            current.whole.add(name)
            return
        wide = torch.promote_types(self._layers[name].lora_A.dtype, torch.float32)
        z_SPR, dz_SPR = (t.to(wide) for t in examples)
        cores = (dz_SPR.mT @ z_SPR)[:, None]
        seen = current.cores.get(name)
        current.cores[name] = cores if seen is None else seen.add_(cores)

    @torch.no_grad()
    def _whole(self, name: str, gradient: Tensor) -> None:
        """Add the core of all positions, by the gradient of A, where the layer has not shown its examples."""
        layer, current = self._layers[name], self._current(name, 1)
        if name in current.cores and name not in current.whole:
            return
        current.whole.add(name)
        wide = torch.promote_types(layer.lora_A.dtype, torch.float32)
        d_ERI, a_ERI = (
            split(factor.to(wide), layer.experts, 0) for factor in (gradient.flatten(1), layer.lora_A.flatten(1))
        )
        core = (d_ERI @ a_ERI.mT)[None]
        seen = current.cores.get(name)
        current.cores[name] = core if seen is None else seen.add_(core)


def joined(passes: list[Pass], name: str, layer: RankedLayer, whole: bool) -> Tensor:
    """(samples, E, R, R) of a step, or (passes, E, R, R) if ``whole``; zeros where a pass has not reached the layer."""
    wide, shape = torch.promote_types(layer.lora_A.dtype, torch.float32), (layer.experts, layer.rank, layer.rank)
    parts = []
    for seen in passes:
        core = seen.cores.get(name)
        if core is None:
            core = layer.lora_A.new_zeros(1 if whole else len(seen.kept), *shape, dtype=wide)
        # Another process has not shown its examples.
        elif whole and name not in seen.whole:
            core = core.sum(0, keepdim=True) * (seen.rows / len(core))
        parts.append(core)
    # One is not copied: on a CPU fresh memory is half of what watching costs.
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts) if parts else layer.lora_A.new_zeros(0, *shape, dtype=wide)


def _evenly(count: int, most: int) -> Tensor:
    """Up to ``most`` of the numbers below ``count``, evenly spread."""
    kept = min(count, most)
    return torch.arange(kept) * count // max(kept, 1)


def _by_example(z: Tensor, dz: Tensor, seen: Pass) -> tuple[Tensor, Tensor] | None:
    """(examples kept, positions, R) of both, zeros where one is shorter; None if they cannot be told apart."""
    if seen.sizes is not None:
        if dz[..., 0].numel() != sum(seen.sizes):
            return None
        parts = ([*torch.split(t.reshape(-1, t.shape[-1]), seen.sizes)] for t in (z, dz))
        z, dz = (pad_sequence([part[i] for i in seen.kept], batch_first=True) for part in parts)
        return z, dz
    # Positions may come before the batch.
    if len(dz) != seen.rows and dz.ndim > 2 and dz.shape[1] == seen.rows:
        z, dz = z.transpose(0, 1), dz.transpose(0, 1)
    if len(dz) % seen.rows or not len(dz):
        return None
    z, dz = (t.reshape(seen.rows, -1, t.shape[-1]) for t in (z, dz))
    kept = seen.kept.to(dz.device)
    return (z, dz) if len(kept) == seen.rows else (z[kept], dz[kept])
