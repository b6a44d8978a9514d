"""What calls of a model show of a batch: its examples, which positions are whose, and of how many terms the loss is."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from inspect import signature
from math import inf
from typing import Any

import torch
from torch import Tensor, nn

from dynrank.layers.compiled import uncompiled
from dynrank.private import backward_number, tree_leaves

# The label of what is not learned, as torch has it.
_IGNORED = -100


@dataclass(eq=False)
class Call:
    """A call with gradients of a module that no other module has called.

    Attributes:
        module: that was called.
        rows: examples; or rows that hold several, where ``sizes`` is there.
        sizes: positions of each example, row by row, where rows hold several.
        learned: labels that it was given and that count for a causal language model's loss; None where there were none.
        terms: positions of its output at which the loss has a gradient; None until one has arrived.
    """

    module: nn.Module
    rows: int
    sizes: list[int] | None
    learned: Tensor | None
    terms: Tensor | None = None


class Calls:
    """Follows the calls of ``model`` until :meth:`close`.

    A trainer calls the model that it was given, or one inside of it and a head beside that. So hooks are on the modules
    that hold all of ``layers``, and on their children; the outermost one that is called counts.

    Args:
        model: that is trained.
        layers: modules in it.
        arrived: is told of the call when a backward pass comes to its output, and so before it comes to the layers.
    """

    def __init__(self, model: nn.Module, layers: Collection[nn.Module], arrived: Callable[[Call], None]) -> None:
        self._arrived: Callable[[Call], None] | None = arrived
        self._outermost: nn.Module | None = None
        self._position_ids: Tensor | None = None
        takers = (m for m in model.modules() if "position_ids" in signature(uncompiled(m).forward).parameters)
        # The first one sees positions as the task has made them.
        self._taker = next(takers, None)
        modules = dict.fromkeys(_around(model, {*layers}))
        if self._taker is not None:
            modules[self._taker] = None
        self._handles: list[Any] = []
        for module in modules:
            self._handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._leave, with_kwargs=True))

    def __getstate__(self) -> dict[str, Any]:
        """A copy of the model, and a pickled one, is not followed."""
        return {**vars(self), "_arrived": None, "_outermost": None, "_position_ids": None, "_handles": []}

    def close(self) -> None:
        """Leave the model."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @property
    def _follows(self) -> bool:
        """No validation, no checkpoint's second forward, and no compiled code, which would run this in Python."""
        return (
            not torch.compiler.is_compiling()
            and self._arrived is not None
            and torch.is_grad_enabled()
            and backward_number() < 0
        )

    def _enter(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if self._follows:
            self._outermost = self._outermost or module
            if module is self._taker:
                self._position_ids = kwargs.get("position_ids")

    def _leave(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if not self._follows or module is not self._outermost:
            return
        sizes, self._outermost, self._position_ids = _sizes(self._position_ids), None, None
        given, made = ([t for t in tree_leaves(part) if isinstance(t, Tensor)] for part in ((args, kwargs), output))
        made = [t for t in made if t.requires_grad]
        call = Call(module, _rows(given, made), sizes, _learned(kwargs))
        for tensor in made:
            tensor.register_hook(partial(self._reached, call))  # type: ignore[no-untyped-call]

    def _reached(self, call: Call, gradient: Tensor | None) -> None:
        # DDP puts one node behind all outputs, which sends None to one that the loss does not use.
        if gradient is None:
            return
        if self._arrived is not None:
            self._arrived(call)
        if call.terms is None and gradient.ndim:
            call.terms = counted(gradient)


def _around(model: nn.Module, layers: Collection[nn.Module]) -> Iterator[nn.Module]:
    """``model``, the module inside of it that holds all of ``layers``, and so on; and the children of all these."""
    whole: nn.Module | None = model
    while whole is not None:
        yield whole
        children = [*whole.children()]
        yield from children
        whole = next((c for c in children if c not in layers and set(layers) <= set(c.modules())), None)


def counted(gradient: Tensor) -> Tensor:
    """At how many positions (all dimensions but the last) ``gradient`` is not zero."""
    return (torch.linalg.vector_norm(gradient, inf, dim=-1) if gradient.ndim > 1 else gradient).count_nonzero()


def _rows(given: list[Tensor], made: list[Tensor]) -> int:
    """How many examples a call had: rows of its output, unless that has batch and positions in one."""
    inputs, outputs = (next((t for t in part if t.ndim), None) for part in (given, made))
    if inputs is None or outputs is None:
        only = outputs if inputs is None else inputs
        return 1 if only is None else len(only)
    flat = inputs.ndim > 1 and inputs.shape[1] > 1 and len(outputs) == inputs.shape[0] * inputs.shape[1]
    return len(inputs if flat else outputs)


def _learned(kwargs: Mapping[str, Any]) -> Tensor | None:
    """How many labels a causal language model's loss counts, of those that it was given."""
    labels = kwargs.get("labels")
    if not isinstance(labels, Tensor) or labels.ndim < 2 or labels.is_floating_point():
        return None
    return (labels[..., 1:] != _IGNORED).sum()


def _sizes(positions: Tensor | None) -> list[int] | None:
    """How many positions each example of the batch (rows, positions) has, row by row; None if rows are examples.

    An example starts where its positions do, with 0 and 1. So padding, which has zeros, goes with the example
    before, and so does a single token, of which nothing is learned.
    """
    if positions is None or positions.ndim != 2:
        return None
    starts = (positions == 0) & (positions.roll(-1, 1) == 1)
    # Of its example in the row.
    number = starts.cumsum(1).clamp(min=1)
    counts = number[:, -1]
    if int(counts.max()) == 1:
        return None
    sizes: list[int] = (number - 1 + (counts.cumsum(0) - counts)[:, None]).flatten().bincount().tolist()
    return sizes
