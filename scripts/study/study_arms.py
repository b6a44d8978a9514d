"""The arms of the study: ways from a high rank to a small adapter, by task."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

# The rank before a cut, and the share of the run at which an early cut comes.
HIGH = 16
EARLY = 1 / 3


@dataclass(frozen=True)
class Arm:
    """A way to an adapter of the bytes of ``rank``.

    Attributes:
        rank: whose bytes it ends with.
        by: "" is fixed from the start; "uniform" cuts every layer to the rank; "weight" and "brought" share its bytes
            out; "found" starts with what "brought" shared out, "GoRA" with what the first gradients did; "AdaLoRA" and
            "EVA" are PEFT's, "AdaLoRA's ranks" is a cut to the ranks that it ends with, and "AdaLoRA's bytes" one by
            "brought" to as many bytes; "anneal" is cut by "brought" step by step; "auto" is cut from the rank to what
            validation then allows; "rsLoRA" is fixed, with a scaling that falls with the root of the rank.
        at: share of the run at which it is cut, and its rate changes.
        rate: what the adapter's rate is multiplied by from there on.
        start: rank before the cut.
        highest: that no layer exceeds after it.
        used: share of its energy for which a layer gets directions at most; the others share what it leaves.
        but: a part of the names of layers that keep their rank.
        plus: LoRA+'s ratio, by which the rate of B is higher than that of A.
        clip: the highest norm of all gradients, as max_grad_norm of the Trainer, whose default is 1.
    """

    rank: int
    by: str = ""
    at: float = EARLY
    rate: float = 1.0
    start: int = HIGH
    highest: int | None = None
    used: float | None = None
    but: str = ""
    plus: float = 1.0
    clip: float | None = None

    def __str__(self) -> str:
        if self.by == "AdaLoRA":
            return f"AdaLoRA {HIGH} → {self.rank}"
        if self.by == "EVA":
            return f"EVA of rank {self.rank}"
        if self.by == "auto":
            return f"auto from {self.rank}"
        if self.by == "anneal":
            return f"{HIGH} → {self.rank} brought in {GRADUAL['steps']} cuts, rate × sqrt"
        name = f"{self.start} → {self.rank} {self.by} at {self.at:.2g}" if self.is_cut else f"rank {self.rank}"
        name += ", allocation found, from the start" if self.by == "found" else ""
        name += ", allocation by GoRA" if self.by == "GoRA" else ""
        name += f", at most {self.highest}" if self.highest else ""
        name += f", capped by energy {self.used}" if self.used else ""
        name += f", {self.but} kept" if self.but else ""
        name += ", rsLoRA" if self.by == "rsLoRA" else ""
        name += f", LoRA+ {self.plus:.3g}" if self.plus != 1 else ""
        name += f", clipped to {self.clip:.3g}" if self.clip is not None else ""
        return name + (f", rate × {self.rate:.3g}" if self.rate != 1 else "")

    @property
    def is_cut(self) -> bool:
        return self.by in ("uniform", "weight", "brought", "AdaLoRA's ranks", "AdaLoRA's bytes")

    @property
    def trunk(self) -> tuple[int, float | None] | None:
        """What arms have in common that start alike; None for those that share nothing."""
        high = self.is_cut or self.by == "found"
        alone = self.plus != 1 or (self.by and not high)
        return None if alone else (self.start if high else self.rank, self.clip)


# The rates at which AdaLoRA is best, of a decoder and of a classifier.
ADALORA = (8e-3, 4e-3)
# Eight cuts over the time in which AdaLoRA's ranks fall, see adalora.py.
GRADUAL: dict[str, Any] = {"steps": 8, "start": 0.15, "end": 0.65}
# A rate multiplied by this keeps the size of a step of the update, if the rank falls to an eighth.
ROOT = (HIGH / 2) ** 0.5
# Shares of a layer's energy beyond which a direction counts as empty.
ENERGIES = (0.999, 0.99)
_RANKS = [Arm(rank) for rank in (HIGH, 2, 4)]
_RAISED = [Arm(rank, rate=2.0) for rank in (2, HIGH)]
_CUTS = [Arm(low, "brought", rate=2.0) for low in (4, 2)]
_WAYS = [Arm(low, by, rate=rate) for low, rate in ((2, ROOT), (4, 2.0)) for by in ("uniform", "weight", "brought")]
# What people use with a plain low rank.
_PLAIN = [Arm(low, by, plus=ratio) for low in (8, 4) for by, ratio in (("rsLoRA", 1.0), ("", 4.0), ("", 16.0))]
ARMS = {
    "medical_terms": [
        *_RANKS,
        *_RAISED,
        *_CUTS,
        Arm(8),
        Arm(8, "brought", rate=2.0),
        *_WAYS,
        *(replace(arm, but="pooler") for arm in _WAYS),
        Arm(2, "uniform", rate=2.0),
        *(Arm(low, "found", rate=2.0) for low in (4, 2)),
        *(Arm(low, "brought") for low in (4, 2)),
        Arm(4, "brought", at=0.75),
        *(Arm(low, "AdaLoRA") for low in (4, 2)),
        *(Arm(4, by, rate=2.0) for by in ("AdaLoRA's ranks", "AdaLoRA's bytes")),
        *(Arm(2, by, rate=ROOT) for by in ("AdaLoRA's ranks", "AdaLoRA's bytes")),
        *(Arm(8, by, rate=2**0.5) for by in ("uniform", "brought")),
        # A server's slot has the highest rank of all layers.
        *(
            Arm(low, "brought", rate=rate, highest=slot)
            for low, rate, slot in ((4, 2.0, 8), (2, ROOT, 8), (2, ROOT, 4))
        ),
        Arm(HIGH, "uniform"),
        *(Arm(low, by) for by in ("GoRA", "EVA") for low in (4, 2)),
        Arm(HIGH, "auto"),
        *_PLAIN,
        *(Arm(HIGH, plus=ratio) for ratio in (4.0, 16.0)),
        Arm(HIGH, clip=1.0),
        Arm(4, "brought", rate=2.0, clip=1.0),
        *(Arm(low, "brought", rate=rate, used=used) for low, rate in ((8, 2**0.5), (4, 2.0)) for used in ENERGIES),
    ],
    "few_medical_terms": [*_RANKS, *_CUTS],
    "financial_terms": [
        *_RANKS,
        *_RAISED,
        *_CUTS,
        *_WAYS[:3],
        Arm(8, "brought", rate=2**0.5),
        Arm(2, "uniform", rate=2.0),
        Arm(2, "found", rate=2.0),
        Arm(2, "AdaLoRA"),
        Arm(HIGH, "auto"),
    ],
    "code_completion": [Arm(2), Arm(HIGH), Arm(2, "brought", rate=2.0), Arm(2, "uniform", rate=2.0)],
    "cpp_headers": [
        *_RANKS,
        Arm(HIGH, rate=2.0),
        *_WAYS,
        *(Arm(low, "brought", rate=rate, highest=2 * low) for low, rate in ((2, ROOT), (4, 2.0))),
        *(Arm(low, "brought", rate=rate) for rate in (1.0, 2**0.5) for low in (4, 2)),
        *(Arm(4, by, rate=2**0.5) for by in ("uniform", "AdaLoRA's ranks", "AdaLoRA's bytes")),
        *(Arm(2, by, rate=8**0.25) for by in ("uniform", "brought", "AdaLoRA's ranks", "AdaLoRA's bytes")),
        *(Arm(8, by, rate=2**0.25) for by in ("uniform", "brought")),
        Arm(8),
        *(Arm(low, "brought", rate=rate, highest=2 * low) for low, rate in ((2, 8**0.25), (4, 2**0.5))),
        # Every layer is balanced, and nothing is cut.
        Arm(HIGH, "uniform"),
        Arm(HIGH, "auto"),
        *(Arm(low, by) for by in ("AdaLoRA", "anneal", "EVA") for low in (4, 2)),
        *(Arm(4, by, rate=ROOT, start=32) for by in ("uniform", "brought")),
        *_PLAIN,
        *(Arm(HIGH, plus=ratio) for ratio in (4.0, 16.0)),
        Arm(HIGH, clip=1.0),
        Arm(4, "brought", rate=2**0.5, clip=1.0),
        *(Arm(low, "brought", rate=rate, used=used) for low, rate in ((8, 2**0.25), (4, 2**0.5)) for used in ENERGIES),
    ],
}
ARMS["python_code"] = ARMS["cpp_headers"]
