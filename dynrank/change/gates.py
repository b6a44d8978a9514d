"""What the loss says of each singular direction of each layer's update, collected in training's own backward.

Each direction has a gate of 1 before it. For example s the gradient of the batch's mean loss by gate i of a layer is
``c[s, i] = sum_t (F_B^T dz_t)_i (F_A z_t)_i``, with z = A x, dz the gradient at z, t the example's positions, and F_A
and F_B the maps from today's factors to the balanced ones of the SVD. So what has to be kept of an example is the
(R, R) core ``sum_t dz_t z_t^T``, and the directions may be chosen at the end. Over the N terms that a batch's loss is
the mean of, ``g = sum_s c_s`` and ``H = N sum_s c_s c_s^T`` (the empirical Fisher matrix); both are means over the
window's steps. The Fisher matrix orders directions well and knows the size of the curvature badly: far from
convergence it was half of the measured one.

Where a layer shows no z and dz of examples (tensors of experts, kernels that go past the layer), the sample is the
backward pass: ``dL/dA A^T`` is the sum of its examples' cores. Beside layers that show examples, c of a pass is spread
evenly over the pass's examples, which leaves g and the layer's own H as they are. A tensor of E experts has R gates,
each before the directions of one size in all its experts: c is the sum over these.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.utils.rnn import pad_sequence

from dynrank.change.calls import Call, Calls, backward_number, counted
from dynrank.change.greedy import LossChange, Quadratic
from dynrank.distributed.processes import from_all, from_first, process_count
from dynrank.errors import ConfigurationError, DivergedError, diverged
from dynrank.layers.ranked import RankedLayer, width_of
from dynrank.linalg import split, truncate_product

# Kept of a window at most: as many are enough, and a 7B's cores at rank 32 take 587 MB.
EXAMPLES = 640
# With fewer examples the choice is mostly noise.
FEW = 32


@dataclass
class _Pass:
    """One call's part in a backward pass: its examples, and what the layers have shown.

    ``cores`` are (examples kept, E, R, R), or (1, E, R, R) of the layers in ``whole``, which have shown the sum alone;
    E products have one core each.
    ``terms`` are those that the first layer has shown, where no call is known.
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

    def counted(self) -> tuple[int, str]:
        """(terms of its part of the loss, who has counted them)."""
        call = self.call
        if call is not None and call.terms is not None:
            return int(call.terms), "the model's output"
        if call is not None and call.learned is not None:
            return int(call.learned), "its labels"
        if self.terms is not None:
            return int(self.terms), "the layer nearest to the loss"
        return (
            self.rows,
            "its examples" if call is not None else "the backward passes, for want of better (set loss_terms)",
        )


@dataclass
class _Step:
    """What an optimizer step leaves: of each sample its pass and its weight, and of the step the rest.

    Attributes:
        passes: of each sample kept, which pass it was in.
        weights: how many examples of the pass each of them stands for.
        whole: the layers whose cores are of passes, not of samples.
        scale: of gradients by the loss of the step, to those that were seen.
        terms: N.
    """

    passes: Tensor
    weights: Tensor
    whole: list[str]
    scale: float
    terms: float

    @property
    def spread(self) -> Tensor:
        """By which share of a pass's core each of its samples has it, squares adding up."""
        return torch.bincount(self.passes, self.weights)[self.passes] ** -0.5


class Gates:
    """The gates of ``layers``, watched in every backward pass until :meth:`close`.

    :meth:`end_step` is collective: after it all processes hold the same numbers, so that any process may save them by
    itself, and any number of processes may go on from them. :meth:`kept` and :meth:`change` are, too.

    Args:
        model: holds the layers; it is trained as usual meanwhile.
        layers: name -> layer.
        window: optimizer steps that are going to be made; of each, an equal share of ``EXAMPLES`` is kept.
        loss_terms: N, where the loss of a step is not the mean over the positions of the model's output at which it
            has a gradient (a classifier's examples, a language model's counted tokens): 1 for a sum.
        caution: by how many standard errors each gradient is taken lower in the choice, so that a shallow cut does not
            begin with directions that only seem to do harm: of very many, some do by chance.

    Attributes:
        steps: how many optimizer steps were seen.
        skipped: how many of these had gradients that were not finite, and left nothing.
        examples: how many samples with a gradient were kept, of all processes: examples, or passes where no layer has
            shown examples.
        loss_scale: what the loss is multiplied by before backward, as in mixed precision with float16.
        terms: N of the last step, in all processes.
        source: who has counted N.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, RankedLayer],
        window: int,
        loss_terms: int | None = None,
        caution: float = 0.0,
    ) -> None:
        self.steps, self.skipped, self.examples, self.loss_scale = 0, 0, 0, 1.0
        self.terms, self.source = 0.0, ""
        self._layers, self._loss_terms, self._caution = dict(layers), loss_terms, caution
        self._quota = -(-EXAMPLES // window // process_count())
        # Of the step under way: its passes, and how many examples each of them may keep.
        self._passes: list[_Pass] = []
        self._room = self._quota
        # Of each step before.
        self._seen: list[_Step] = []
        self._cores: dict[str, list[Tensor]] = {name: [] for name in layers}
        self._reached: set[str] = set()
        self._quadratic: Quadratic | None = None
        self._stops = []
        for name, layer in layers.items():
            if layer.observe is not None:
                self._stops.append(layer.observe(partial(self._tap, name)))
            self._stops.append(layer.lora_A.register_hook(partial(self._whole, name)).remove)  # type: ignore[no-untyped-call]
        self._stops.append(Calls(model, [layer.module for layer in layers.values()], self._arrive).close)

    # Watching a backward pass

    def _arrive(self, call: Call) -> None:
        """Begin what a call has in a backward pass; a module that is called once more brings other examples."""
        last, task = self._passes[-1] if self._passes else None, backward_number()
        if last is None or last.task != task or last.calls.get(call.module, call) is not call:
            last = self._begin(task, len(call.sizes) if call.sizes is not None else call.rows, call)
        last.calls[call.module] = call

    def _begin(self, task: int, rows: int, call: Call | None = None) -> _Pass:
        """Another pass of the step; each keeps as many of its examples, and at least one."""
        self._room = min(self._room, max(1, self._quota // (len(self._passes) + 1)))
        self._passes.append(_Pass(task, rows, call))
        for each in self._passes:
            if each is self._passes[-1]:
                each.kept = _evenly(rows, self._room)
            elif len(each.kept) > self._room:
                stay = _evenly(len(each.kept), self._room)
                each.kept = each.kept[stay]
                each.cores = {
                    n: core if n in each.whole else core[stay.to(core.device)] for n, core in each.cores.items()
                }
        return self._passes[-1]

    def _current(self, name: str, rows: int) -> _Pass:
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

    # Between steps

    @torch.no_grad()
    def end_step(self) -> None:
        """Say that an optimizer step was made."""
        self.steps += 1
        passes, self._passes = self._passes, []
        if not passes and process_count() == 1:
            return
        whole = {name for each in passes for name in each.whole}
        shown = {name for each in passes for name in each.cores} - whole
        told = from_all(([(each.rows, len(each.kept), *each.counted()) for each in passes], shown, whole))
        whole = set[str]().union(*(names for *_, names in told))
        by_example = bool(set[str]().union(*(names for _, names, _ in told)) - whole)
        whole = whole if by_example else {*self._layers}
        known = [each if by_example else (1, 1, *each[2:]) for own, *_ in told for each in own]
        counts = [len(own) for own, *_ in told], [sum(kept for _, kept, *_ in own) for own, *_ in told]
        cores: dict[str, Tensor] = {}
        for names in (whole, self._layers.keys() - whole):
            mine = {name: _joined(passes, name, self._layers[name], name in whole) for name in sorted(names)}
            cores |= _gathered(mine, counts[names is not whole])
        sizes = {name: core.flatten(1).abs().sum(1, dtype=torch.float64) for name, core in cores.items()}
        # A step that float16's scaler skips.
        if not all(size.isfinite().all() for size in sizes.values()):
            self.skipped += 1
            return
        places = torch.tensor(
            [place for place, (_, kept, *_) in enumerate(known) for _ in range(kept)], dtype=torch.long
        )
        live = torch.zeros(len(places), dtype=torch.bool)
        for name, size in sizes.items():
            live |= (size[places] if name in whole else size) > 0
        if not live.any():
            return
        self._reached |= {name for name, size in sizes.items() if size.any()}
        self.examples += int(live.sum())
        self.terms, self.source = float(sum(terms for _, _, terms, _ in known)), known[-1][-1]
        if self._loss_terms is not None:
            self.terms, self.source = float(self._loss_terms), "loss_terms"
        weights = torch.tensor([rows / kept for rows, kept, *_ in known], dtype=torch.float64)[places]
        # Gradients are means over processes.
        scale = 1 / self.loss_scale / process_count()
        self._seen.append(_Step(places, weights, sorted(whole), scale, self.terms))
        for name, core in cores.items():
            self._cores[name].append(core)

    def close(self) -> None:
        """Stop watching; what was collected stays."""
        for stop in self._stops:
            stop()
        self._stops = []

    @property
    def passes(self) -> int:
        """How many backward passes with a gradient were seen, of all processes."""
        return sum(int(step.passes.max()) + 1 for step in self._seen)

    @property
    def by_pass(self) -> set[str]:
        """Layers that have not shown examples, so that each backward pass is a sample."""
        return set[str]().union(*(step.whole for step in self._seen))

    @property
    def samples(self) -> int:
        """How many samples with a gradient the layer has that has fewest."""
        return self.passes if self.by_pass else self.examples

    @property
    def enough(self) -> bool:
        """Whether a gradient was seen in every step, or in as many samples as make it worth while."""
        return 0 < self.steps == len(self._seen) or self.samples >= FEW

    @property
    def seen(self) -> str:
        """What was watched, in words."""
        few, most = len(self.by_pass), f"{self.examples} examples"
        passes = f"{self.passes} backward passes"
        if few:
            most = passes if few == len(self._layers) else f"{most} ({passes} in {few} layers)"
        return f"gates of {most}, N = {self.terms:g} by {self.source}"

    @property
    def unreached(self) -> list[str]:
        """Layers that have an update and have seen no gradient while others have."""
        layers = self._layers.items() if self.examples else ()
        return [name for name, la in layers if name not in self._reached and la.scaling and la.lora_B.any()]

    def values(self) -> dict[str, Tensor]:
        """{layer: (rank,) descending} what the directions are worth to the loss, for targets; not collective."""
        return self._estimate().values()

    def kept(self, ranks: Mapping[str, int]) -> dict[str, Tensor]:
        """{layer: the directions to keep, ascending} of the layers in ``ranks``, the others staying whole."""
        strange = sorted(ranks.keys() - self._layers.keys())
        if strange:
            raise ConfigurationError(f"the gates of {strange[:3]} were not watched; leave these layers as they are")
        whole = {name: layer.rank for name, layer in self._layers.items()} | dict(ranks)
        kept = from_first(lambda: self._estimate().kept(whole))
        return {name: kept[name] for name in ranks}

    def change(self, kept: Mapping[str, Tensor]) -> dict[str, LossChange]:
        """{layer: its part in the estimated change of the loss} if of each layer these directions are kept."""
        whole = {name: torch.arange(layer.rank) for name, layer in self._layers.items()} | dict(kept)
        parts = from_first(lambda: self._estimate().change(whole))
        return {name: parts[name] for name in kept}

    def _estimate(self) -> Quadratic:
        """The quadratic in the singular directions of the factors as they are when it is first asked for."""
        if self._quadratic is None:
            parts = self._gradients()
            # A 7B's cores and its Hessian need not be held at once.
            self._cores = {}
            widths = {name: width_of(layer) for name, layer in self._layers.items()}
            # Of a gradient's squared standard error to the curvature, by sample
            ratios = torch.cat(
                [torch.zeros(0, 1), *(s.weights[:, None] / s.terms / len(self._seen) for s in self._seen)]
            )
            errors = {name: (ratios * root.square()).sum(0).sqrt() for name, root in parts[1].items()}
            self._quadratic = Quadratic(*parts, widths, {name: self._caution * e for name, e in errors.items()})
        return self._quadratic

    @torch.no_grad()
    def _gradients(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Of each layer the (R,) gradient of the loss by its gates, and the (samples, R) root of their Hessian."""
        if self.skipped and not self._seen:
            raise DivergedError(
                f"no gradient of {self.skipped} steps was finite. Training has diverged: lower optimizer.lr"
            )
        gradients, roots, steps = {}, {}, max(1, len(self._seen))
        for name, layer in self._layers.items():
            try:
                svds = [truncate_product(b, a, layer.rank) for b, a in layer.products()]
            except ValueError as error:
                raise diverged(name, error) from error
            from_A, from_B = (torch.stack([getattr(svd, key) for svd in svds]).cpu() for key in ("from_A", "from_B"))
            # A gate before nothing changes nothing.
            live = torch.stack([svd.lora_A.any(dim=1) & svd.lora_B.any(dim=0) for svd in svds]).cpu()
            gradients[name] = torch.zeros(layer.rank, dtype=torch.float64)
            rows = [gradients[name].new_zeros(0, layer.rank)]
            for core, step in zip(self._cores[name], self._seen, strict=True):
                c_SR = torch.einsum("erk,sert,ekt,ek->sk", from_B, core.double(), from_A, live.double())
                if name in step.whole:
                    gradients[name] += c_SR.sum(0) * (step.scale / steps)
                    c_SR = c_SR[step.passes] * step.spread[:, None]
                else:
                    gradients[name] += step.weights @ c_SR * (step.scale / steps)
                rows.append(c_SR * (step.weights[:, None] * step.terms / steps).sqrt() * step.scale)
            roots[name] = torch.cat(rows)
        return gradients, roots

    def state_dict(self) -> dict[str, Any]:
        """Plain containers and tensors; passes since the last optimizer step are left out."""
        parts = {name: getattr(self, name) for name in _COUNTS}
        return parts | {
            "reached": sorted(self._reached),
            "seen": [dict(vars(step)) for step in self._seen],
            "cores": {name: list(parts) for name, parts in self._cores.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name in _COUNTS:
            setattr(self, name, state[name])
        self._reached, self._seen = set(state["reached"]), [_Step(**step) for step in state["seen"]]
        self._cores = {name: list(state["cores"][name]) for name in self._layers}


_COUNTS = ("steps", "skipped", "examples", "terms", "source", "_room")


def _evenly(count: int, most: int) -> Tensor:
    """Up to ``most`` of the numbers below ``count``, evenly spread."""
    kept = min(count, most)
    return torch.arange(kept) * count // max(kept, 1)


def _by_example(z: Tensor, dz: Tensor, seen: _Pass) -> tuple[Tensor, Tensor] | None:
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


def _joined(passes: list[_Pass], name: str, layer: RankedLayer, whole: bool) -> Tensor:
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


def _gathered(cores: Mapping[str, Tensor], counts: list[int]) -> dict[str, Tensor]:
    """The cores of all processes on the CPU, of which ``counts`` says how many each has, in one message."""
    if len(counts) == 1 or not cores:
        return {name: core.cpu() for name, core in cores.items()}
    message = torch.cat([core.flatten(1) for core in cores.values()], dim=1)
    padded = message.new_zeros(max(counts), message.shape[1])
    padded[: len(message)] = message
    received = [torch.empty_like(padded) for _ in counts]
    distributed.all_gather(received, padded)
    every = torch.cat([rows[:count] for rows, count in zip(received, counts, strict=True)]).cpu()
    parts = torch.split(every, [core.shape[1:].numel() for core in cores.values()], dim=1)
    return {name: part.reshape(-1, *core.shape[1:]) for (name, core), part in zip(cores.items(), parts, strict=True)}
