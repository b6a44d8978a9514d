"""What the loss says of each singular direction of each layer's update, collected in training's own backward.

Each direction has a gate of 1 before it. For example s the gradient of the batch's mean loss by gate i of a layer is
``c[s, i] = sum_t (F_B^T dz_t)_i (F_A z_t)_i``, with z = A x, dz the gradient at z, t the example's positions, and F_A
and F_B the maps from today's factors to the balanced ones of the SVD. So what has to be kept of an example is the
(R, R) core ``sum_t dz_t z_t^T``, and the directions may be chosen at the end. Over the N terms that a batch's loss is
the mean of, ``g = sum_s c_s`` and ``H = N sum_s c_s c_s^T`` (the empirical Fisher matrix); both are means over the
window's steps. The Fisher matrix orders directions well and knows the size of the curvature badly: far from
convergence it was half of the measured one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.utils.rnn import pad_sequence

from dynrank.change.greedy import LossChange, Quadratic
from dynrank.change.packed import PackedExamples
from dynrank.distributed.processes import from_all, from_first, process_count
from dynrank.errors import ConfigurationError, DivergedError, diverged
from dynrank.layers.ranked import RankedLayer, width_of
from dynrank.linalg import truncate_product

__all__ = ["EXAMPLES", "FEW", "Gates"]

EXAMPLES = 640  # kept of a window at most: as many are enough, and a 7B's cores at rank 32 take 587 MB
FEW = 32  # with fewer examples the choice is mostly noise
_HELD = 4  # reports of a pass that may come before the first layer with one row for each example


@dataclass
class _Pass:
    """What one backward pass has shown: examples, terms of the loss, and by layer the cores of the first examples.

    ``held`` has the first reports as they came, ``more`` says that others followed; ``sizes`` are the positions of each
    example where rows hold several.
    """

    number: int
    examples: int
    terms: Tensor
    sizes: list[int] | None = None
    cores: dict[str, Tensor] = field(default_factory=dict)
    held: list[tuple[str, Tensor, Tensor]] = field(default_factory=list)
    more: bool = False


class Gates:
    """The gates of ``layers``, watched in every backward pass until :meth:`close`.

    :meth:`end_step` is collective: after it all processes hold the same numbers, so that any process may save them by
    itself, and any number of processes may go on from them. :meth:`kept` and :meth:`change` are, too.

    Args:
        layers: name -> layer; the model is trained as usual meanwhile.
        window: optimizer steps that are going to be made; of each, an equal share of ``EXAMPLES`` is kept.
        loss_terms: N, if the loss of a step is not the mean over the positions that reach the layer nearest to the
            loss (a classifier's examples, a language model's counted tokens): 1 for a sum.
        model: that holds the layers, so that examples packed into one row are told apart, see
            :class:`dynrank.change.packed.PackedExamples`. None: each row is an example.
        caution: by how many standard errors each gradient is taken lower in the choice, so that a shallow cut does not
            begin with directions that only seem to do harm: of very many, some do by chance.

    Attributes:
        steps: how many optimizer steps were seen.
        skipped: how many of these had gradients that were not finite, and left nothing.
        examples: how many examples were kept, of all processes.
        loss_scale: what the loss is multiplied by before backward, as in mixed precision with float16.
        terms: N of the last step, in all processes.
    """

    def __init__(
        self,
        layers: Mapping[str, RankedLayer],
        window: int,
        loss_terms: int | None = None,
        model: nn.Module | None = None,
        caution: float = 0.0,
    ) -> None:
        self.steps, self.skipped, self.examples, self.loss_scale, self.terms = 0, 0, 0, 1.0, 0.0
        self._layers, self._loss_terms, self._caution = dict(layers), loss_terms, caution
        self._quota = -(-EXAMPLES // window // process_count())
        self._passes: list[_Pass] = []  # of the step under way
        self._cores: dict[str, list[Tensor]] = {name: [] for name in layers}  # (examples, R, R) of each step
        self._weights: list[tuple[float, float]] = []  # of each step: factors of its cores in g, and of squares in H
        self._quadratic: Quadratic | None = None
        self._packed = PackedExamples(model) if model is not None else None
        self._stops = [layer.observe(self._tap(name)) for name, layer in layers.items()]

    def _tap(self, name: str) -> Callable[[Tensor, Tensor], None]:
        @torch.no_grad()
        def tap(z: Tensor, dz: Tensor) -> None:
            z, dz = (t[None] if t.ndim == 1 else t for t in (z, dz))  # one position without a batch is one example
            current = self._pass(name, dz)
            flat = current.sizes is None and len(dz) < current.examples and current.examples % len(dz) == 0
            if flat and not current.more:
                current.examples, current.cores = len(dz), {}  # those before it saw batch and positions in one
                for report in current.held:
                    self._add(current, *report)
            if dz[..., 0].numel() != sum(current.sizes) if current.sizes else len(dz) % current.examples:
                raise ConfigurationError(
                    f"{name!r} sees {len(dz)} rows in a batch of {current.examples}, not as many for each example, so "
                    "schedule.how.metric=gates cannot tell them apart; set schedule.how.metric=weight, or leave the "
                    "layer out (lora.target_modules)"
                )
            current.more |= len(current.held) == _HELD
            if not current.more:
                current.held.append((name, z, dz))
            self._add(current, name, z, dz)

        return tap

    def _add(self, current: _Pass, name: str, z: Tensor, dz: Tensor) -> None:
        """Add the cores of the examples that there is room for; a layer may be used twice in a pass."""
        room = max(0, self._quota - sum(other.examples for other in self._passes if other is not current))
        wide = torch.promote_types(z.dtype, torch.float32)
        if current.sizes is None:
            z_SPR, dz_SPR = (t.reshape(current.examples, -1, t.shape[-1])[:room].to(wide) for t in (z, dz))
        else:  # zeros fill the shorter ones up
            parts = ([*torch.split(t.reshape(-1, t.shape[-1]), current.sizes)][: max(room, 1)] for t in (z, dz))
            z_SPR, dz_SPR = (pad_sequence(part, batch_first=True)[:room].to(wide) for part in parts)
        cores = dz_SPR.mT @ z_SPR
        seen = current.cores.get(name)
        current.cores[name] = cores if seen is None else seen.add_(cores)

    def _pass(self, name: str, dz: Tensor) -> _Pass:
        """The backward pass under way; the first layer that it reaches tells its examples and terms.

        Reentrant checkpointing runs a backward pass in several, which show different layers: they are taken as one.
        """
        number = torch._C._current_graph_task_id()
        last = self._passes[-1] if self._passes else None
        goes_on = last is not None and name not in last.cores and (last.sizes or len(dz) == last.examples)
        if last is not None and (last.number == number or goes_on):
            last.number = number
            return last
        terms = dz.reshape(-1, dz.shape[-1]).ne(0).any(dim=1).sum()
        sizes = self._packed.sizes() if self._packed is not None else None
        self._passes.append(_Pass(number, len(sizes or dz), terms, sizes))
        return self._passes[-1]

    @torch.no_grad()
    def end_step(self) -> None:
        """Say that an optimizer step was made."""
        self.steps += 1
        passes, self._passes = self._passes, []
        if not passes and process_count() == 1:
            return
        mine = {name: _joined(passes, name, layer) for name, layer in self._layers.items()}
        counts = sum(p.examples for p in passes), sum(int(p.terms) for p in passes), len(next(iter(mine.values())))
        totals = from_all(counts)
        examples, terms, held = (sum(column) for column in zip(*totals, strict=True))
        cores = {name: core.cpu() for name, core in _gathered(mine, [count for *_, count in totals]).items()}
        sums = torch.stack([core.sum(dtype=torch.float64) for core in cores.values()])  # finite if all are, and quick
        if not torch.isfinite(sums).all():  # a step that float16's scaler skips
            self.skipped += 1
            return
        if not held:
            return
        self.examples, self.terms = self.examples + held, float(self._loss_terms or terms)
        scale = 1 / self.loss_scale / process_count()  # gradients are means over processes
        share = examples / held
        self._weights.append((scale * share, scale**2 * share * self.terms))
        for name, core in cores.items():
            self._cores[name].append(core)

    def close(self) -> None:
        """Stop watching; what was collected stays."""
        for stop in self._stops:
            stop()
        self._stops = []
        if self._packed is not None:
            self._packed.close()

    def values(self) -> dict[str, Tensor]:
        """{layer: (rank,) descending} what the directions are worth to the loss, for targets; not collective.

        Raises:
            ConfigurationError: if a layer has seen no backward pass, or its factors are not finite.
        """
        return self._estimate().values()

    def kept(self, ranks: Mapping[str, int]) -> dict[str, Tensor]:
        """{layer: the directions to keep, ascending} of the layers in ``ranks``, the others staying whole.

        Raises:
            ConfigurationError: as :meth:`values`.
        """
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
            self._cores = {}  # a 7B's cores and its Hessian need not be held at once
            widths = {name: width_of(layer) for name, layer in self._layers.items()}
            ratios = [linear**2 / square for linear, square in self._weights if square]
            ratio = sum(ratios) / max(1, len(ratios)) ** 2  # of a gradient's squared standard error to the curvature
            errors = {name: (ratio * root.square().sum(0)).sqrt() for name, root in parts[1].items()}
            self._quadratic = Quadratic(*parts, widths, {name: self._caution * e for name, e in errors.items()})
        return self._quadratic

    @torch.no_grad()
    def _gradients(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Of each layer the (R,) gradient of the loss by its gates, and the (examples, R) root of their Hessian."""
        if self.skipped and not self._weights:
            raise DivergedError(
                f"no gradient of {self.skipped} steps was finite. Training has diverged: lower optimizer.lr"
            )
        gradients, roots, steps = {}, {}, max(1, len(self._weights))
        for name, layer in self._layers.items():
            try:
                whole = truncate_product(layer.lora_B.flatten(1), layer.lora_A.flatten(1), layer.rank)
            except ValueError as error:
                raise diverged(name, error) from error
            cores = self._cores[name]
            if not any(core.any() for core in cores) and layer.scaling and layer.lora_B.any():
                raise ConfigurationError(
                    f"no backward pass has reached {name!r} while its gates were watched, so metric=gates cannot rank "
                    "its directions; set schedule.how.metric=weight, or leave the layer out (lora.target_modules)"
                )
            from_A, from_B = whole.from_A.cpu(), whole.from_B.cpu()
            live = (whole.lora_A.any(dim=1) & whole.lora_B.any(dim=0)).cpu()  # a gate before nothing changes nothing
            gradients[name] = torch.zeros(layer.rank, dtype=torch.float64)
            rows = [gradients[name].new_zeros(0, layer.rank)]
            for core, (linear, square) in zip(cores, self._weights, strict=True):
                c_SR = torch.einsum("rk,srt,kt->sk", from_B, core.double(), from_A) * live
                gradients[name] += c_SR.sum(0) * (linear / steps)
                rows.append(c_SR * (square / steps) ** 0.5)
            roots[name] = torch.cat(rows)
        return gradients, roots

    def state_dict(self) -> dict[str, Any]:
        """Plain containers and tensors; passes since the last optimizer step are left out."""
        cores = {name: list(parts) for name, parts in self._cores.items()}
        counts = {"steps": self.steps, "skipped": self.skipped, "examples": self.examples, "terms": self.terms}
        return counts | {"weights": list(self._weights), "cores": cores}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps, self.skipped = state["steps"], state["skipped"]
        self.examples, self.terms = state["examples"], state["terms"]
        self._weights = [(float(linear), float(square)) for linear, square in state["weights"]]
        self._cores = {name: list(state["cores"][name]) for name in self._layers}


def _joined(passes: list[_Pass], name: str, layer: RankedLayer) -> Tensor:
    """(examples kept, R, R) of a step; zeros where a pass has not reached the layer."""
    whole = [next(iter(p.cores.values())) for p in passes]
    parts = [
        p.cores[name] if name in p.cores else some.new_zeros(len(some), layer.rank, layer.rank)
        for p, some in zip(passes, whole, strict=True)
    ]
    if len(parts) == 1:
        return parts[0]  # not copied: on a CPU fresh memory is half of what watching costs
    return torch.cat(parts) if parts else layer.lora_A.new_zeros(0, layer.rank, layer.rank, dtype=torch.float32)


def _gathered(cores: Mapping[str, Tensor], counts: list[int]) -> dict[str, Tensor]:
    """The cores of all processes, of which ``counts`` says how many examples each has, in one message."""
    if len(counts) == 1:
        return dict(cores)
    message = torch.cat([core.flatten(1) for core in cores.values()], dim=1)
    padded = message.new_zeros(max(counts), message.shape[1])
    padded[: len(message)] = message
    received = [torch.empty_like(padded) for _ in counts]
    distributed.all_gather(received, padded)
    whole = torch.cat([rows[:count] for rows, count in zip(received, counts, strict=True)])
    parts = torch.split(whole, [core[0].numel() if len(core) else core.shape[1] ** 2 for core in cores.values()], dim=1)
    return {name: part.reshape(-1, *core.shape[1:]) for (name, core), part in zip(cores.items(), parts, strict=True)}
