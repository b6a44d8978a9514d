"""The interface between a run and its task; classification.py and language_modeling.py implement it."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from lightning.pytorch import LightningModule


class Task(Protocol):
    """The object that ``task._target_`` makes: a ``LightningDataModule`` with these three members."""

    @property
    def metrics(self) -> Sequence[str]:
        """Names of the metrics that training and validation log; a schedule may read them."""

    @property
    def final(self) -> Sequence[str]:
        """The metrics that a test also logs as ``final/NAME``, with the final weights; ``objective`` is one of them."""

    def module(
        self, lora: Mapping[str, Any], optimizer: Mapping[str, Any], *, on_meta: bool = False
    ) -> LightningModule:
        """A module whose attribute ``model`` has LoRA layers; a run exports that model.

        Args:
            lora: keyword arguments of :func:`dynrank.add_lora`.
            optimizer: keyword arguments of :func:`dynrank.tasks.optimizers.make_optimizer`.
            on_meta: build the model without weights, to inspect its layers.
        """
