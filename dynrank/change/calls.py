"""The calls of a model in training: the examples of the batch, their positions, and the terms of the loss."""

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

# torch's label for positions that the loss ignores.
_IGNORED = -100


@dataclass(eq=False)
class Call:
    """A call with gradients of an outermost module, which no other module has called.

    Attributes:
        module: the module.
        rows: number of rows of the batch. A row is one example, or several if ``sizes`` is given.
        sizes: number of positions of each example, row by row, if rows hold several examples; else None.
        learned: which labels count for a causal language model's loss, (rows, positions - 1); None without labels.
        terms: number of positions of the output at which the loss has a gradient; None before backward.
    """

    module: nn.Module
    rows: int
    sizes: list[int] | None
    learned: Tensor | None
    terms: Tensor | None = None


class Calls:
    """Observes the calls of ``model`` by hooks until :meth:`close`.

    A trainer may call the whole model, or a module inside it and then a head. So the hooks are on all modules that hold
    all of ``layers``, and on their children; the outermost module that is called counts.

    Args:
        model: the model in training.
        layers: modules in it.
        arrived: function that gets the call when a backward pass reaches its output, before it reaches the layers.
    """

    def __init__(self, model: nn.Module, layers: Collection[nn.Module], arrived: Callable[[Call], None]) -> None:
        self._arrived: Callable[[Call], None] | None = arrived
        self._outermost: nn.Module | None = None
        self._position_ids: Tensor | None = None
        takers = (m for m in model.modules() if "position_ids" in signature(uncompiled(m).forward).parameters)
        # The first module that takes position_ids gets them as the task has made them.
        self._taker = next(takers, None)
        modules = dict.fromkeys(_around(model, {*layers}))
        if self._taker is not None:
            modules[self._taker] = None
        self._handles: list[Any] = []
        for module in modules:
            self._handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._leave, with_kwargs=True))

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles of the model are not observed."""
        return {**vars(self), "_arrived": None, "_outermost": None, "_position_ids": None, "_handles": []}

    def close(self) -> None:
        """Remove all hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @property
    def _follows(self) -> bool:
        """Whether to observe now: not in validation, a checkpoint's second forward, or under torch.compile."""
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
        # In DDP all outputs share one node, which passes None to an output that the loss does not use.
        if gradient is None:
            return
        if self._arrived is not None:
            self._arrived(call)
        if call.terms is None and gradient.ndim:
            # TRL's models give out the log probability of each label, and no logits.
            if call.learned is not None and call.learned.shape == gradient.shape:
                gradient = (gradient * call.learned)[..., None]
            call.terms = counted(gradient)


def _around(model: nn.Module, layers: Collection[nn.Module]) -> Iterator[nn.Module]:
    """All modules from ``model`` inwards that hold all of ``layers``, and the children of each."""
    whole: nn.Module | None = model
    while whole is not None:
        yield whole
        children = [*whole.children()]
        yield from children
        whole = next((c for c in children if c not in layers and set(layers) <= set(c.modules())), None)


def counted(gradient: Tensor) -> Tensor:
    """The number of positions (all dimensions except the last) at which ``gradient`` is not zero."""
    return (torch.linalg.vector_norm(gradient, inf, dim=-1) if gradient.ndim > 1 else gradient).count_nonzero()


def _rows(given: list[Tensor], made: list[Tensor]) -> int:
    """The number of rows of a call: those of its output, or of its input if the output merges batch and positions."""
    inputs, outputs = (next((t for t in part if t.ndim), None) for part in (given, made))
    if inputs is None or outputs is None:
        only = outputs if inputs is None else inputs
        return 1 if only is None else len(only)
    flat = inputs.ndim > 1 and inputs.shape[1] > 1 and len(outputs) == inputs.shape[0] * inputs.shape[1]
    return len(inputs if flat else outputs)


def _learned(kwargs: Mapping[str, Any]) -> Tensor | None:
    """Which of the given labels a causal language model's loss counts; None without labels."""
    labels = kwargs.get("labels")
    if not isinstance(labels, Tensor) or labels.ndim < 2 or labels.is_floating_point():
        return None
    return labels[..., 1:] != _IGNORED


def _sizes(positions: Tensor | None) -> list[int] | None:
    """The number of positions of each example, row by row, from (rows, positions); None if every row is one example.

    An example starts where position 0 is followed by 1. So padding, which has zeros, counts to the example before it,
    and so does an example of a single token, which the loss does not use.
    """
    if positions is None or positions.ndim != 2:
        return None
    starts = (positions == 0) & (positions.roll(-1, 1) == 1)
    # For each position, the number of its example in the row.
    number = starts.cumsum(1).clamp(min=1)
    counts = number[:, -1]
    if int(counts.max()) == 1:
        return None
    sizes: list[int] = (number - 1 + (counts.cumsum(0) - counts)[:, None]).flatten().bincount().tolist()
    return sizes
