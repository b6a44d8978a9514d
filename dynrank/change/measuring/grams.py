"""Second moments of what passes through LoRA layers: G_z = E[z z^T] with z = A x, and G_u = E[u u^T] with u = B^T g.

These two (rank, rank) matrices of each layer are all that the metrics ``output`` and ``loss`` need (see
:func:`dynrank.linalg.truncate_product`). Both come out of the layer's own backward pass, at the price of one
(rank, rank) product each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from dynrank.change.measuring.collector import Collector
from dynrank.distributed.processes import process_count
from dynrank.errors import ConfigurationError
from dynrank.layers.ranked import RankedLayer

Gram = tuple[Tensor | None, Tensor | None]  # (G_u, G_z); None: that of the factors themselves


class Grams(Collector):
    """The Gram matrices of ``layers``, collected from every backward pass until :meth:`close`.

    The sums are float64. With ``window``, each step weighs ``1 - 2 / (window + 1)`` times the step after it (an
    exponential mean of that span), because the factors move while they are measured; without, all steps weigh the same.

    G_z is a mean over positions. G_u is a sum over the positions of a step: with a loss that is a mean over n examples,
    half the squared singular values in the ``loss`` metric, times n, estimate the increase of the loss (K-FAC's
    approximation with independent positions); n is the same for all layers, so their values compare. Several processes
    measure what one process does that sees all their examples in one batch: its gradients are as many times smaller.

    Args:
        layers: name -> layer; the model is trained as usual meanwhile.
        window: span of the mean in steps; call :meth:`end_step` after each optimizer step.

    Raises:
        ConfigurationError: if ``window`` is below 1.
    """

    def __init__(self, layers: Mapping[str, RankedLayer], window: int | None = None) -> None:
        super().__init__(layers)
        if window is not None and window < 1:
            raise ConfigurationError(f"window must be at least 1 step, got {window}; set schedule.window")
        self._decay = 1.0 if window is None else 1 - 2 / (window + 1)
        self._in_step: set[str] = set()  # layers that a backward pass has reached since the last step
        for name, layer in layers.items():
            square = torch.zeros(layer.rank, layer.rank, dtype=torch.float64, device=layer.lora_A.device)
            count = torch.zeros((), dtype=torch.float64, device=layer.lora_A.device)
            self._tensors[name] = {"zz": square, "dzdz": square.clone(), "rows": count, "steps": count.clone()}
            self._stops.append(layer.observe(self._tap(name)))

    def _tap(self, name: str) -> Callable[[Tensor, Tensor], None]:
        @torch.no_grad()
        def tap(z_MR: Tensor, dz_MR: Tensor) -> None:
            sums, processes = self._tensors[name], process_count()
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
        """Say that an optimizer step was made, after which passes weigh more; collective."""
        super().end_step()
        self._in_step.clear()

    def of(self, name: str, metric: str) -> Gram:
        """(G_u, G_z) of a layer for ``metric``, (rank, rank) float64 each, None where the factors' own are meant.

        A layer whose scaling is 0 has no gradient to measure, and whatever it drops costs nothing: its own G_u will do.

        Raises:
            ConfigurationError: if the layer is unknown or has seen no backward pass.
        """
        if metric == "weight":
            return None, None
        sums = self._tensors.get(name)
        if sums is None or sums["rows"] == 0:
            raise ConfigurationError(
                f"no backward pass has reached {name!r} while statistics were collected, so metric={metric} cannot "
                "rank its directions; set schedule.metric=weight, or leave the layer out (lora.target_modules)"
            )
        scaling = self._layers[name].scaling  # dz is scaling * u
        gram_u = sums["dzdz"] / sums["steps"] / scaling**2 if metric == "loss" and scaling else None
        return gram_u, sums["zz"] / sums["rows"]
