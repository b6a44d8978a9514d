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
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn

from dynrank.change.greedy import LossChange, Quadratic
from dynrank.change.passes import Passes, joined
from dynrank.distributed.processes import from_all, from_first, process_count
from dynrank.errors import ConfigurationError, DivergedError, diverged
from dynrank.layers.ranked import RankedLayer, width_of
from dynrank.linalg import truncate_product

# Kept of a window at most: as many are enough, and a 7B's cores at rank 32 take 587 MB.
EXAMPLES = 640
# With fewer examples the choice is mostly noise.
FEW = 32


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
        self._passes = Passes(model, layers, -(-EXAMPLES // window // process_count()))
        # Of each step.
        self._seen: list[_Step] = []
        self._cores: dict[str, list[Tensor]] = {name: [] for name in layers}
        self._reached: set[str] = set()
        self._quadratic: Quadratic | None = None

    @torch.no_grad()
    def end_step(self) -> None:
        """Say that an optimizer step was made."""
        self.steps += 1
        passes = self._passes.take()
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
            mine = {name: joined(passes, name, self._layers[name], name in whole) for name in sorted(names)}
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
        self._passes.close()

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
        return {name: getattr(self, name) for name in _COUNTS} | {
            "room": self._passes.room,
            "reached": sorted(self._reached),
            "seen": [dict(vars(step)) for step in self._seen],
            "cores": {name: list(parts) for name, parts in self._cores.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name in _COUNTS:
            setattr(self, name, state[name])
        self._passes.room = state["room"]
        self._reached, self._seen = set(state["reached"]), [_Step(**step) for step in state["seen"]]
        self._cores = {name: list(state["cores"][name]) for name in self._layers}


_COUNTS = ("steps", "skipped", "examples", "terms", "source")


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
