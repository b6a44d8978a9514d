"""Second moments of what passes through LoRA layers: G_z = E[z z^T] with z = A x, and G_u = E[u u^T] with u = B^T g.

These two (rank, rank) matrices of each layer are all that the metrics ``output`` and ``loss`` need (see
:func:`dynrank.linalg.truncate_product`). Both come out of the layer's own backward pass, at the price of one
(rank, rank) product each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from dynrank.distributed.processes import average_over_processes, process_count
from dynrank.errors import ConfigurationError
from dynrank.layers.ranked import RankedLayer

__all__ = ["Gram", "Moments"]

Gram = tuple[Tensor | None, Tensor | None]  # (G_u, G_z); None: that of the factors themselves


class Moments:
    """The Gram matrices of ``layers``, collected from every backward pass until :meth:`close`.

    The sums are float64. With ``window``, each step weighs ``1 - 2 / (window + 1)`` times the step after it (an
    exponential mean of that span), because the factors move while they are measured; without, all steps weigh the same.

    G_z is a mean over positions. G_u is a sum over the positions of a step: with a loss that is a mean over n examples,
    half the squared singular values in the ``loss`` metric, times n, estimate the increase of the loss (K-FAC's
    approximation with independent positions); n is the same for all layers, so their values compare. Several processes
    measure what one process does that sees all their examples in one batch: its gradients are as many times smaller.

    After every :meth:`end_step` the sums are alike in all processes, so any process may save them by itself, and any
    number of processes may go on from them.

    Args:
        layers: name -> layer; the model is trained as usual meanwhile.
        window: span of the mean in steps.

    Attributes:
        steps: how many optimizer steps were seen.
    """

    def __init__(self, layers: Mapping[str, RankedLayer], window: int | None = None) -> None:
        self.steps = 0
        self._layers, self._decay = dict(layers), 1.0 if window is None else 1 - 2 / (window + 1)
        self._in_step: set[str] = set()  # layers that a backward pass has reached since the last step
        self._sums: dict[str, dict[str, Tensor]] = {}
        for name, layer in layers.items():
            square = torch.zeros(layer.rank, layer.rank, dtype=torch.float64, device=layer.lora_A.device)
            count = torch.zeros((), dtype=torch.float64, device=layer.lora_A.device)
            self._sums[name] = {"zz": square, "dzdz": square.clone(), "rows": count, "steps": count.clone()}
        self._stops = [layer.observe(self._tap(name)) for name, layer in layers.items()]

    def _tap(self, name: str) -> Callable[[Tensor, Tensor], None]:
        @torch.no_grad()
        def tap(z_MR: Tensor, dz_MR: Tensor) -> None:
            sums, processes = self._sums[name], process_count()
            z_MR, dz_MR = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (z_MR, dz_MR))
            if name not in self._in_step:  # the first backward of a step; more follow when gradients accumulate
                self._in_step.add(name)
                for total in sums.values():
                    total.mul_(self._decay)
                sums["steps"].add_(1)
            # the mean over processes at the end of the step makes these the sums of one process that sees all
            sums["zz"].add_(z_MR.mT @ z_MR, alpha=processes)
            sums["rows"].add_(len(z_MR) * processes)
            sums["dzdz"].add_(dz_MR.mT @ dz_MR, alpha=1 / processes)

        return tap

    def end_step(self) -> None:
        """Say that an optimizer step was made, after which passes weigh more; the one collective call."""
        self.steps += 1
        average_over_processes(total for sums in self._sums.values() for total in sums.values())
        self._in_step.clear()

    def close(self) -> None:
        """Stop collecting; what was collected stays."""
        for stop in self._stops:
            stop()
        self._stops = []

    def of(self, name: str, metric: str) -> Gram:
        """(G_u, G_z) of a layer for ``metric``, (rank, rank) float64 each, None where the factors' own are meant.

        A layer whose scaling is 0 has no gradient to measure, and whatever it drops costs nothing: its own G_u will do.

        Raises:
            ConfigurationError: if the layer is unknown or has seen no backward pass.
        """
        if metric == "weight":
            return None, None
        sums = self._sums.get(name)
        if sums is None or sums["rows"] == 0:
            raise ConfigurationError(
                f"no backward pass has reached {name!r} while statistics were collected, so metric={metric} cannot "
                "rank its directions; set schedule.metric=weight, or leave the layer out (lora.target_modules)"
            )
        scaling = self._layers[name].scaling  # dz is scaling * u
        gram_u = sums["dzdz"] / sums["steps"] / scaling**2 if metric == "loss" and scaling else None
        return gram_u, sums["zz"] / sums["rows"]

    def state_dict(self) -> dict[str, Any]:
        """Plain containers and tensors; passes since the last optimizer step are those of this process alone."""
        return {"steps": self.steps, "sums": {name: dict(sums) for name, sums in self._sums.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps = state["steps"]
        for name, sums in state["sums"].items():
            for key, total in sums.items():
                self._sums[name][key].copy_(total)
