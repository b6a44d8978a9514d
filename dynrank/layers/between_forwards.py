"""Changing the modules of a model that other threads are calling, so that each call sees one state of it."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from torch import nn

__all__ = ["between_forwards"]

_CALL = nn.Module.__call__.__code__
_POLL = 2e-4  # seconds
_one_change = threading.Lock()  # at a time, in the whole process


@contextmanager
def between_forwards(model: nn.Module) -> Iterator[None]:
    """Inside the block no other thread is in a call of ``model`` or of a module in it; calls begun meanwhile wait.

    Who is in a call is read from the threads' stacks. So a call costs nothing at any other time, one that began before
    this was ever used is seen too, one that an exception ended is not taken for one that goes on, and nothing is left
    on the model. A forward pass that waits for another thread to call a part of the same model would wait for ever.

    Raises:
        RuntimeError: if this thread is itself in such a call.
    """
    modules = list(model.modules())
    ids = {id(module) for module in modules}
    if _in_call(sys._getframe(), ids):
        raise RuntimeError("a model cannot be changed from within its own forward")
    gate = _Gate(ids)
    with _one_change:
        handles = [module.register_forward_pre_hook(gate, prepend=True) for module in modules]
        try:
            # Every call not seen here begins with the gate.
            while any(_in_call(frame, ids, gate) for frame in _other_threads()):
                time.sleep(_POLL)
            yield
        finally:
            for handle in handles:
                handle.remove()
            gate.opened.set()


class _Gate:
    """A pre-hook at which a call waits, unless it is a part of one that is under way already."""

    def __init__(self, ids: Collection[int]) -> None:
        self.ids, self.opened = ids, threading.Event()

    def __call__(self, *_: Any) -> None:
        caller = sys._getframe(1)  # of the hook: the call of the module itself lies below it
        while caller.f_code is not _CALL:
            assert caller.f_back is not None
            caller = caller.f_back
        if not _in_call(caller.f_back, self.ids):
            self.wait()

    def wait(self) -> None:
        self.opened.wait()


def _other_threads() -> list[FrameType]:
    return [frame for thread, frame in sys._current_frames().items() if thread != threading.get_ident()]


def _in_call(frame: FrameType | None, ids: Collection[int], gate: _Gate | None = None) -> bool:
    """Whether the stack that ends in ``frame`` is in a call of one of the modules, and does not wait at ``gate``."""
    while frame is not None:
        if gate is not None and frame.f_code is _Gate.wait.__code__ and frame.f_locals["self"] is gate:
            return False
        if frame.f_code is _CALL:
            module = frame.f_locals["self"]
            compiled = vars(module)["_modules"].get("_orig_mod")  # torch.compile's wrapper calls past nn.Module
            if id(module) in ids or id(compiled) in ids:
                return True
        frame = frame.f_back
    return False
