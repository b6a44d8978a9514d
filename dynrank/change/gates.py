"""Gates: what the loss needs of each direction of each layer's update, measured in training's own backward passes.

A *gate* is a factor of 1 before a direction (a singular value with its vectors). For example s, the gradient of the
batch's mean loss by gate i is ``c[s, i] = sum_t (F_B^T dz_t)_i (F_A z_t)_i``. Here z = A x, dz is the gradient at z, t
runs over the example's positions, and F_A and F_B map the factors to the balanced factors of their SVD. So it is enough
to keep the *core* of each example, the (R, R) matrix ``sum_t dz_t z_t^T``; the SVD is computed at the end. If the
batch's loss is the mean of N terms, then ``g = sum_s c_s`` and ``H = N sum_s c_s c_s^T`` (the empirical Fisher matrix).
Both are averaged over the *window*, the optimizer steps that are measured. The Fisher matrix orders directions well but
estimates the size of the curvature badly: far from convergence it was half of the measured curvature.

Some layers do not show z and dz of each example (tensors of experts, kernels that bypass the layer). Then the sample is
the backward pass: ``dL/dA A^T`` is the sum of its examples' cores. If other layers show examples, c of a pass is
divided evenly among its examples, which changes neither g nor the layer's own H. A tensor of E experts has R gates.
Gate i scales direction i of every expert, and its c is the sum over the experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

from dynrank.change.greedy import ByWeight, LossChange, Quadratic
from dynrank.change.passes import Passes, joined
from dynrank.distributed.processes import from_all, process_count
from dynrank.errors import ConfigurationError, DivergedError
from dynrank.layers.base import RankedLayer, params_per_rank

# The most examples that are kept of a window. They are enough, and the cores of a 7B model at rank 32 take 587 MB.
EXAMPLES = 640
# With fewer samples the choice is mostly noise.
FEW = 32


@dataclass
class _Step:
    """The samples (examples, or backward passes) of one optimizer step.

    Attributes:
        passes: for each sample, the index of its pass.
        weights: for each sample, how many examples of the pass it represents.
        whole: the layers whose cores are sums over a pass.
        scale: factor from the measured gradients to those of the step's loss.
        terms: N.
    """

    passes: Tensor
    weights: Tensor
    whole: list[str]
    scale: float
    terms: float

    @property
    def spread(self) -> Tensor:
        """The factor of a pass's core for each of its samples; the weighted squares of a pass sum to 1."""
        return torch.bincount(self.passes, self.weights)[self.passes] ** -0.5


class Gates(ByWeight):
    """Measures the gates of ``layers`` in every backward pass until :meth:`close`, while training goes on as usual.

    :meth:`end_step` is collective: all processes call it. Then all hold the same numbers, so each can save them, and a
    resumed run may have another number of processes.

    Args:
        model: the model with the layers.
        layers: name -> layer.
        window: how many optimizer steps will be measured; an equal part of ``EXAMPLES`` is kept of each.
        loss_terms: N. None: the number of positions of the model's output with a gradient (a classifier's examples, a
            language model's counted tokens). 1 if the loss is a sum.
        caution: the choice lowers each gradient by this many standard errors. Of very many directions some seem harmful
            by chance; without caution, a shallow cut would begin with these.

    Attributes:
        steps: how many optimizer steps were measured.
        skipped: how many of these had gradients that were not finite; they are not used.
        examples: how many samples with a gradient all processes keep: examples, or passes if no layer shows examples.
        loss_scale: factor of the loss before backward, as in mixed precision with float16.
        terms: N of the last step, in all processes.
        source: how N was counted.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, RankedLayer],
        window: int,
        loss_terms: int | None = None,
        caution: float = 0.0,
    ) -> None:
        super().__init__(layers)
        self.steps, self.skipped, self.examples, self.loss_scale = 0, 0, 0, 1.0
        self.terms, self.source = 0.0, ""
        self._loss_terms, self._caution = loss_terms, caution
        self._passes = Passes(model, layers, -(-EXAMPLES // window // process_count()))
        # One entry per step.
        self._seen: list[_Step] = []
        self._cores: dict[str, list[Tensor]] = {name: [] for name in layers}
        self._reached: set[str] = set()
        self._quadratic: Quadratic | None = None

    @torch.no_grad()
    def end_step(self) -> None:
        """Take what the passes since the last optimizer step have shown; call it after each step."""
        self.steps += 1
        passes = self._passes.take()
        if not passes and process_count() == 1:
            return
        whole = {name for each in passes for name in each.whole}
        shown = {name for each in passes for name in each.cores} - whole
        everywhere = from_all(([each.count() for each in passes], shown, whole))
        whole = set[str]().union(*(names for *_, names in everywhere))
        by_example = bool(set[str]().union(*(names for _, names, _ in everywhere)) - whole)
        whole = whole if by_example else {*self._layers}
        counts = [own for own, *_ in everywhere]
        known = [each if by_example else each._replace(rows=1, kept=1) for own in counts for each in own]
        in_passes, in_examples = [len(own) for own in counts], [sum(each.kept for each in own) for own in counts]
        cores: dict[str, Tensor] = {}
        for names, sizes in ((whole, in_passes), (self._layers.keys() - whole, in_examples)):
            mine = {name: joined(passes, name, self._layers[name], name in whole) for name in sorted(names)}
            cores |= _gathered(mine, sizes)
        norms = {name: core.flatten(1).abs().sum(1, dtype=torch.float64) for name, core in cores.items()}
        # In float16 the loss scaler skips such a step.
        if not all(norm.isfinite().all() for norm in norms.values()):
            self.skipped += 1
            return
        # For each sample, the index of its pass.
        indices = [index for index, each in enumerate(known) for _ in range(each.kept)]
        pass_of = torch.tensor(indices, dtype=torch.long)
        live = torch.zeros(len(pass_of), dtype=torch.bool)
        for name, norm in norms.items():
            live |= (norm[pass_of] if name in whole else norm) > 0
        if not live.any():
            return
        self._reached |= {name for name, norm in norms.items() if norm.any()}
        self.examples += int(live.sum())
        self.terms, self.source = float(sum(each.terms for each in known)), known[-1].source
        if self._loss_terms is not None:
            self.terms, self.source = float(self._loss_terms), "loss_terms"
        weights = torch.tensor([each.rows / each.kept for each in known], dtype=torch.float64)[pass_of]
        # The gradient of a step is the mean over processes.
        scale = 1 / self.loss_scale / process_count()
        self._seen.append(_Step(pass_of, weights, sorted(whole), scale, self.terms))
        for name, core in cores.items():
            self._cores[name].append(core)

    def close(self) -> None:
        """Stop measuring; the data stays."""
        self._passes.close()

    @property
    def passes(self) -> int:
        """How many backward passes with a gradient were measured in all processes."""
        return sum(int(step.passes.max()) + 1 for step in self._seen)

    @property
    def by_pass(self) -> set[str]:
        """Layers that have not shown examples, so that their samples are backward passes."""
        return set[str]().union(*(step.whole for step in self._seen))

    @property
    def samples(self) -> int:
        """The smallest number of samples with a gradient of any layer."""
        return self.passes if self.by_pass else self.examples

    @property
    def enough(self) -> bool:
        """Whether every step had a gradient, or enough samples had one."""
        return 0 < self.steps == len(self._seen) or self.samples >= FEW

    @property
    def seen(self) -> str:
        """A text about the samples for a run's history."""
        by_pass, samples = len(self.by_pass), f"{self.examples} examples"
        passes = f"{self.passes} backward passes"
        if by_pass:
            samples = passes if by_pass == len(self._layers) else f"{samples} ({passes} in {by_pass} layers)"
        return f"gates of {samples}, {self.terms:g} loss terms by {self.source}"

    @property
    def unreached(self) -> list[str]:
        """Layers with an update that no gradient has reached although it has reached other layers."""
        layers = self._layers.items() if self.examples else ()
        return [name for name, la in layers if name not in self._reached and la.scaling and la.lora_B.any()]

    def values(self) -> dict[str, Tensor]:
        """{layer: (rank,) descending}: the worth of each direction to the loss."""
        return self._estimate().values()

    def kept(self, ranks: Mapping[str, int]) -> dict[str, Tensor]:
        """{layer: the directions to keep, ascending} for the layers in ``ranks``; all others keep their rank."""
        strange = sorted(ranks.keys() - self._layers.keys())
        if strange:
            raise ConfigurationError(f"the gates of {strange[:3]} were not measured; do not change these layers")
        whole = {name: layer.rank for name, layer in self._layers.items()} | dict(ranks)
        kept = self._estimate().kept(whole)
        return {name: kept[name] for name in ranks}

    def estimated_loss(self, kept: Mapping[str, Tensor]) -> dict[str, LossChange]:
        """{layer: its part of the estimated change of the loss} if each layer keeps these directions."""
        whole = {name: torch.arange(layer.rank) for name, layer in self._layers.items()} | dict(kept)
        parts = self._estimate().estimated_loss(whole)
        return {name: parts[name] for name in kept}

    def _estimate(self) -> Quadratic:
        """The quadratic in the directions of the factors at the time of the first call."""
        if self._quadratic is None:
            parts = self._gradients()
            # The cores are freed first, because those of a 7B model and its Hessian take much memory.
            self._cores = {}
            sizes = {name: params_per_rank(layer) for name, layer in self._layers.items()}
            # For each sample, the ratio of a gradient's squared standard error to the curvature.
            ratios = torch.cat(
                [torch.zeros(0, 1), *(s.weights[:, None] / s.terms / len(self._seen) for s in self._seen)]
            )
            errors = {name: (ratios * root.square()).sum(0).sqrt() for name, root in parts[1].items()}
            self._quadratic = Quadratic(*parts, sizes, {name: self._caution * e for name, e in errors.items()})
        return self._quadratic

    @torch.no_grad()
    def _gradients(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """By layer: the (R,) gradient of the loss by its gates, and the (samples, R) root of their Hessian."""
        if self.skipped and not self._seen:
            raise DivergedError(
                f"no gradient of {self.skipped} steps was finite. Training has diverged: lower optimizer.lr"
            )
        gradients, roots, steps = {}, {}, max(1, len(self._seen))
        for name, layer in self._layers.items():
            directions = self.directions(name)
            # A direction beyond the numerical rank is zero, and so is the gradient by its gate.
            missing = [layer.rank - len(each.from_A) for each in directions]
            pairs = [*zip(directions, missing, strict=True)]
            from_A_EKR = torch.stack([F.pad(each.from_A, (0, 0, 0, count)) for each, count in pairs]).cpu()
            from_B_ERK = torch.stack([F.pad(each.from_B, (0, count)) for each, count in pairs]).cpu()
            gradients[name] = torch.zeros(layer.rank, dtype=torch.float64)
            rows = [gradients[name].new_zeros(0, layer.rank)]
            for core, step in zip(self._cores[name], self._seen, strict=True):
                c_SR = torch.einsum("erk,sert,ekt->sk", from_B_ERK, core.double(), from_A_EKR)
                if name in step.whole:
                    gradients[name] += c_SR.sum(0) * (step.scale / steps)
                    c_SR = c_SR[step.passes] * step.spread[:, None]
                else:
                    gradients[name] += step.weights @ c_SR * (step.scale / steps)
                rows.append(c_SR * (step.weights[:, None] * step.terms / steps).sqrt() * step.scale)
            roots[name] = torch.cat(rows)
        return gradients, roots

    def state_dict(self) -> dict[str, Any]:
        """The state in plain containers and tensors, without passes since the last optimizer step."""
        return {name: getattr(self, name) for name in _COUNTS} | {
            "per_pass": self._passes.per_pass,
            "reached": sorted(self._reached),
            "seen": [dict(vars(step)) for step in self._seen],
            "cores": {name: list(parts) for name, parts in self._cores.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name in _COUNTS:
            setattr(self, name, state[name])
        self._passes.per_pass = state["per_pass"]
        self._reached, self._seen = set(state["reached"]), [_Step(**step) for step in state["seen"]]
        self._cores = {name: list(state["cores"][name]) for name in self._layers}


_COUNTS = ("steps", "skipped", "examples", "terms", "source")


def _gathered(cores: Mapping[str, Tensor], counts: list[int]) -> dict[str, Tensor]:
    """The cores of all processes on the CPU, by one message; ``counts`` is the number of samples of each process."""
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
