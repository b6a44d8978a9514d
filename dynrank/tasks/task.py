"""What a run asks of a task; classification.py and language_modeling.py hold the two that ship."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from lightning.pytorch import LightningModule


class Task(Protocol):
    """What ``task._target_`` makes: a ``LightningDataModule`` that has these three members, too."""

    @property
    def metrics(self) -> Sequence[str]:
        """Names that are logged in training and validation; a schedule may watch them."""

    @property
    def final(self) -> Sequence[str]:
        """Those of them that a test logs as ``final/NAME``, measured at the final weights; ``objective`` is one."""

    def module(
        self, lora: Mapping[str, Any], optimizer: Mapping[str, Any], *, on_meta: bool = False
    ) -> LightningModule:
        """A module whose attribute ``model`` has LoRA layers and is what a run exports.

        Args:
            lora: keyword arguments of :func:`dynrank.add_lora`.
            optimizer: keyword arguments of :func:`dynrank.tasks.optimizers.make_optimizer`.
            on_meta: build the model without weights, to look at its layers.
        """
