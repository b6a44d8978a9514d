"""Second moments of what passes through LoRA layers: G_z = E[z z^T] with z = A x, and G_u = E[u u^T] with u = B^T g.

These two (rank, rank) matrices of each layer are all that the metrics ``output`` and ``loss`` need (see
:func:`dynrank.linalg.truncate_product`). Both come out of the layer's own backward pass, at the price of one
(rank, rank) product each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from dynrank.distributed.processes import process_count, sum_over_processes
from dynrank.errors import ConfigurationError
from dynrank.layers.ranked import RankedLayer

METRICS = ("weight", "output", "loss")
Gram = tuple[Tensor | None, Tensor | None]  # (G_u, G_z); None: that of the factors themselves

_SUMS = ("zz", "uu", "rows", "steps")


class Grams:
    """Collects the Gram matrices of ``layers`` from every backward pass until it is closed; a context manager.

    The sums are float64. With ``window``, each step weighs ``1 - 2 / (window + 1)`` times the step after it (an
    exponential mean of that span), because the factors move while they are measured; without, all steps weigh the same.

    G_z is a mean over positions. G_u is a sum over the positions of a step: with a loss that is a mean over n examples,
    half the squared singular values in the ``loss`` metric, times n, estimate the increase of the loss (K-FAC's
    approximation with independent positions); n is the same for all layers, so their values compare.

    Args:
        layers: name -> layer; the model is trained as usual meanwhile.
        window: span of the mean in steps; call :meth:`end_step` after each optimizer step.

    Raises:
        ConfigurationError: if ``window`` is below 1.
    """

    def __init__(self, layers: Mapping[str, RankedLayer], window: int | None = None) -> None:
        if window is not None and window < 1:
            raise ConfigurationError(f"window must be at least 1 step, got {window}; set schedule.window")
        self.decay = 1.0 if window is None else 1 - 2 / (window + 1)
        self._scalings = {name: layer.scaling for name, layer in layers.items()}
        self._sums: dict[str, dict[str, Tensor]] = {}
        for name, layer in layers.items():
            square = torch.zeros(layer.rank, layer.rank, dtype=torch.float64, device=layer.lora_A.device)
            count = torch.zeros((), dtype=torch.float64, device=layer.lora_A.device)
            self._sums[name] = {"zz": square, "uu": square.clone(), "rows": count, "steps": count.clone()}
        self._stops = [layer.observe(self._tap(name)) for name, layer in layers.items()]
        self._in_step: set[str] = set()

    def _tap(self, name: str) -> Callable[[Tensor, Tensor], None]:
        sums, scaling = self._sums[name], self._scalings[name]

        @torch.no_grad()
        def tap(z_MR: Tensor, dz_MR: Tensor) -> None:
            z_MR, dz_MR = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (z_MR, dz_MR))
            if name not in self._in_step:  # the first backward of a step; more follow when gradients accumulate
                self._in_step.add(name)
                for total in sums.values():
                    total.mul_(self.decay)
                sums["steps"].add_(1)
            sums["zz"].add_(z_MR.mT @ z_MR)
            sums["uu"].add_(dz_MR.mT @ dz_MR, alpha=scaling**-2)
            sums["rows"].add_(len(z_MR))

        return tap

    def end_step(self) -> None:
        """Say that an optimizer step was made: what comes next weighs more."""
        self._in_step.clear()

    def close(self) -> None:
        """Stop collecting; what was collected stays."""
        for stop in self._stops:
            stop()
        self._stops = []

    def __enter__(self) -> Grams:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def of(self, name: str, metric: str) -> Gram:
        """(G_u, G_z) of a layer for ``metric``, (rank, rank) float64 each, None where the factors' own are meant.

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
        gram_z = sums["zz"] / sums["rows"]
        return (sums["uu"] / sums["steps"] if metric == "loss" else None), gram_z

    def sum_over_processes(self) -> None:
        """Make them those of one process that has seen every process's examples in one batch; in one process, nothing.

        A loss that is a mean over the examples of one process has gradients as many times larger as there are
        processes.
        """
        for sums in self._sums.values():
            sum_over_processes(sums[key] for key in _SUMS)
            sums["uu"].div_(process_count())  # squared, and "steps" has grown by the same factor

    def state_dict(self) -> dict[str, Any]:
        return {name: dict(sums) for name, sums in self._sums.items()}

    def load_state_dict(self, *states: Mapping[str, Any], growth: float = 1.0) -> None:
        """Hold the sum of what ``states`` hold; there are ``growth`` times as many processes as when it was collected.

        Gradients of a mean over the examples of one process are as many times larger, and steps are counted in each.
        """
        powers = {"zz": 0, "rows": 0, "uu": 2, "steps": 1}
        for name, sums in self._sums.items():
            for key, total in sums.items():
                total.zero_()
                for state in states:
                    total.add_(state[name][key].to(total.device), alpha=growth ** powers[key])
