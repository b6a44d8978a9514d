"""The backward passes of an optimizer step, and in them the core ``sum_t dz_t z_t^T`` of each layer and example."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from dynrank.change.calls import Call, Calls, counted
from dynrank.layers.base import RankedLayer
from dynrank.linalg import split
from dynrank.private import backward_number


class PassCount(NamedTuple):
    """The examples of a pass, how many of them are kept, the terms of its loss, and how these were counted."""

    rows: int
    kept: int
    terms: int
    source: str


@dataclass
class Pass:
    """The part of one call of the model in a backward pass: its examples and their cores.

    Attributes:
        task: id of the backward pass.
        rows: number of examples.
        call: the call of the model, if it is known.
        terms: number of terms of the loss by the first layer of the backward pass; only used if no call is known.
        calls: calls in this pass, by module.
        kept: indices of the examples that are kept.
        cores: (kept examples, E, R, R) by layer, with one core per product; (1, E, R, R) for a layer in ``whole``.
        whole: the layers that show only the sum over all examples.
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

    def thin(self, most: int) -> None:
        """Keep at most ``most`` of the examples, evenly spread."""
        stay = _evenly(len(self.kept), most)
        self.kept = self.kept[stay]
        for name in self.cores.keys() - self.whole:
            self.cores[name] = self.cores[name][stay.to(self.cores[name].device)]

    def count(self) -> PassCount:
        call, terms = self.call, self.rows
        if call is not None and call.terms is not None:
            terms, source = int(call.terms), "the model's output"
        elif call is not None and call.learned is not None:
            terms, source = int(call.learned.sum()), "its labels"
        elif self.terms is not None:
            terms, source = int(self.terms), "the layer nearest to the loss"
        elif call is not None:
            source = "its examples"
        else:
            source = "the number of backward passes (if that is wrong, set loss_terms)"
        return PassCount(self.rows, len(self.kept), terms, source)


class Passes:
    """Collects the backward passes of ``model`` since the last optimizer step, until :meth:`close`.

    Args:
        model: the model with the layers.
        layers: name -> layer.
        quota: how many examples of a step are kept.

    Attributes:
        per_pass: how many examples of each pass are kept; it falls if a step has many passes.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, RankedLayer], quota: int) -> None:
        self.per_pass, self._quota, self._layers = quota, quota, dict(layers)
        self._passes: list[Pass] = []
        self._stops = []
        for name, layer in layers.items():
            if layer.observe is not None:
                self._stops.append(layer.observe(partial(self._tap, name)))
            self._stops.append(layer.lora_A.register_hook(partial(self._whole, name)).remove)  # type: ignore[no-untyped-call]
        self._stops.append(Calls(model, [layer.module for layer in layers.values()], self._arrive).close)

    def take(self) -> list[Pass]:
        """The passes of the step that has ended; later passes belong to the next step."""
        passes, self._passes = self._passes, []
        return passes

    def close(self) -> None:
        """Remove all hooks."""
        for stop in self._stops:
            stop()
        self._stops = []

    def _arrive(self, call: Call) -> None:
        """Add ``call`` to the current pass, or to a new one if its module was called before: it has other examples."""
        last, task = self._passes[-1] if self._passes else None, backward_number()
        if last is None or last.task != task or last.calls.get(call.module, call) is not call:
            last = self._begin(task, len(call.sizes) if call.sizes is not None else call.rows, call)
        last.calls[call.module] = call

    def _begin(self, task: int, rows: int, call: Call | None = None) -> Pass:
        """Another pass of the step. All passes keep the same number of examples, at least one."""
        self.per_pass = min(self.per_pass, max(1, self._quota // (len(self._passes) + 1)))
        for each in self._passes:
            if len(each.kept) > self.per_pass:
                each.thin(self.per_pass)
        self._passes.append(Pass(task, rows, call, kept=_evenly(rows, self.per_pass)))
        return self._passes[-1]

    def _current(self, name: str, rows: int) -> Pass:
        """The pass that a layer's data belongs to. Without calls, reentrant checkpoints' inner passes count as one."""
        last, task = self._passes[-1] if self._passes else None, backward_number()
        if last is not None and (last.call is not None or last.task == task or name not in last.cores):
            if last.call is None:
                last.task = task
            return last
        return self._begin(task, rows)

    @torch.no_grad()
    def _tap(self, name: str, z: Tensor, dz: Tensor) -> None:
        """Add the cores of a layer's examples; a layer may run twice in a pass."""
        # A tensor without a batch dimension is one example.
        z, dz = (t[None] if t.ndim == 1 else t for t in (z, dz))
        current = self._current(name, len(dz))
        if current.call is None and current.terms is None:
            current.terms = counted(dz)
        examples = _by_example(z, dz, current)
        # If examples cannot be told apart, the hook on A's gradient adds their sum later.
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
        """Add the core of all positions, from the gradient of A, if the layer has not shown its examples."""
        layer, current = self._layers[name], self._current(name, 1)
        if name in current.cores and name not in current.whole:
            return
        current.whole.add(name)
        wide = torch.promote_types(layer.lora_A.dtype, torch.float32)
        d_ERI, a_ERI = (
            split(factor.to(wide), layer.num_products, 0) for factor in (gradient.flatten(1), layer.lora_A.flatten(1))
        )
        core = (d_ERI @ a_ERI.mT)[None]
        seen = current.cores.get(name)
        current.cores[name] = core if seen is None else seen.add_(core)


def joined(passes: list[Pass], name: str, layer: RankedLayer, whole: bool) -> Tensor:
    """The cores of a step, (examples, E, R, R), or (passes, E, R, R) if ``whole``; zeros if a pass lacks the layer."""
    wide, shape = torch.promote_types(layer.lora_A.dtype, torch.float32), (layer.num_products, layer.rank, layer.rank)
    parts = []
    for seen in passes:
        core = seen.cores.get(name)
        if core is None:
            core = layer.lora_A.new_zeros(1 if whole else len(seen.kept), *shape, dtype=wide)
        # Here the layer shows examples, but in another process it does not.
        elif whole and name not in seen.whole:
            core = core.sum(0, keepdim=True) * (seen.rows / len(core))
        parts.append(core)
    # A single part is not copied: on a CPU, new memory is half of the cost of measuring gates.
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts) if parts else layer.lora_A.new_zeros(0, *shape, dtype=wide)


def _evenly(count: int, most: int) -> Tensor:
    """At most ``most`` of the integers below ``count``, evenly spread."""
    kept = min(count, most)
    return torch.arange(kept) * count // max(kept, 1)


def _by_example(z: Tensor, dz: Tensor, seen: Pass) -> tuple[Tensor, Tensor] | None:
    """(z, dz), each (kept examples, positions, R) padded with zeros; None if examples cannot be told apart."""
    if seen.sizes is not None:
        if dz[..., 0].numel() != sum(seen.sizes):
            return None
        parts = ([*torch.split(t.reshape(-1, t.shape[-1]), seen.sizes)] for t in (z, dz))
        z, dz = (pad_sequence([part[i] for i in seen.kept], batch_first=True) for part in parts)
        return z, dz
    # The dimension of positions may come before that of the batch.
    if len(dz) != seen.rows and dz.ndim > 2 and dz.shape[1] == seen.rows:
        z, dz = z.transpose(0, 1), dz.transpose(0, 1)
    if len(dz) % seen.rows or not len(dz):
        return None
    z, dz = (t.reshape(seen.rows, -1, t.shape[-1]) for t in (z, dz))
    kept = seen.kept.to(dz.device)
    return (z, dz) if len(kept) == seen.rows else (z[kept], dz[kept])
