"""Which positions of a batch belong to which example, where several are packed into a row."""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from dynrank.layers.compiled import uncompiled

__all__ = ["PackedExamples"]


class PackedExamples:
    """The examples of the batch that ``model`` was last called on with gradients, told apart by its ``position_ids``.

    A hook before the outermost module that takes them notes them until :meth:`close`.
    """

    def __init__(self, model: nn.Module) -> None:
        self._position_ids: Tensor | None = None
        takers = (m for m in model.modules() if "position_ids" in signature(uncompiled(m).forward).parameters)
        taker = next(takers, None)
        self._handle = None if taker is None else taker.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled():  # no validation
            self._position_ids = kwargs.get("position_ids")

    def __getstate__(self) -> dict[str, Any]:
        return {"_position_ids": None, "_handle": None}  # a copy of the model, and a pickled one, takes no batch along

    def close(self) -> None:
        """Leave the model."""
        if self._handle is not None:
            self._handle.remove()
        self._position_ids = None

    def sizes(self) -> list[int] | None:
        """How many positions each example of the batch (rows, positions) has, row by row; None if rows are examples.

        An example starts where its positions do, with 0 and 1. So padding, which has zeros, goes with the example
        before, and so does a single token, of which nothing is learned.
        """
        positions = self._position_ids
        if positions is None or positions.ndim != 2:
            return None
        starts = (positions == 0) & (positions.roll(-1, 1) == 1)
        number = starts.cumsum(1).clamp(min=1)  # of its example in the row
        counts = number[:, -1]
        if int(counts.max()) == 1:
            return None
        sizes: list[int] = (number - 1 + (counts.cumsum(0) - counts)[:, None]).flatten().bincount().tolist()
        return sizes
