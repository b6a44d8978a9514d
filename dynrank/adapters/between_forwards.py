"""Changing the modules of a model that other threads use, so that each forward and each generation sees one state."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from types import FrameType
from typing import Any

import torch
from torch import nn

from dynrank.layers.compiled import uncompiled

__all__ = ["between_forwards"]

_CALL = nn.Module.__call__.__code__
_POLL = (2e-4, 5e-3)  # seconds: at first, and at most
_one_change = threading.Lock()  # at a time, in the whole process


@contextmanager
def between_forwards(model: nn.Module) -> Iterator[None]:
    """Inside the block no other thread is in a call of ``model`` or of a module in it; calls begun meanwhile wait.

    A method ``generate`` of a module that is or holds one of these (transformers' own, and what wraps it) counts as one
    call from its beginning to its end, so one that is under way is waited for, and a text is written by one state of
    the model. Loops of other names are not known for one: the block may come between two of their forwards.

    Who is in a call is read from the threads' stacks. So a call costs nothing at any other time, one that began before
    this was ever used is seen too, one that an exception ended is not taken for one that goes on, and nothing is left
    on the model. A call that waits for another thread to call a part of the same model would wait for ever. From the
    moment that this is called until the block ends nothing runs compiled (calls of compiled models are eager), since
    what torch.compile has made does not look for hooks.

    Raises:
        RuntimeError: if this thread is itself in such a call.
    """
    modules = list(model.modules())
    ids = {id(module) for module in modules}
    if _in_call(sys._getframe(), ids) or _generations(sys._getframe(), ids):
        raise RuntimeError("a model cannot be changed from within its own forward or generate")
    gate = _Gate(ids)
    hook, eager = gate.__call__, nullcontext()
    with _one_change:
        if "torch._dynamo" in sys.modules:  # else nothing is compiled, and importing it takes seconds
            hook = torch.compiler.disable(hook)  # type: ignore[no-untyped-call]
            eager = torch.compiler.set_stance("force_eager")
        handles = [module.register_forward_pre_hook(hook, prepend=True) for module in modules]
        try:
            with eager:
                gate.close(_other_threads())
                # Every call not seen here begins with the gate, and the first forward of every other generation.
                start = time.monotonic()
                while any(_in_call(frame, ids, gate) for frame in _other_threads()):
                    waited = time.monotonic() - start  # a long text is not asked for every moment
                    time.sleep(min(max(_POLL[0], waited / 50), _POLL[1]))
                yield
        finally:
            for handle in handles:
                handle.remove()
            gate.open()


class _Gate:
    """A pre-hook at which a call waits, unless it is a part of one that is under way already.

    Attributes:
        generations: frames of those under way when the gate closed. Until then calls wait to know whether they belong
            to one: a generation whose first forward came before the hook may not be stopped at its second.
    """

    def __init__(self, ids: Collection[int]) -> None:
        self.ids, self.generations = ids, frozenset[FrameType]()
        self.closed, self.opened = threading.Event(), threading.Event()

    def close(self, threads: Iterable[FrameType]) -> None:
        """Let generations go on that are under way in stacks that end in these frames, and no others."""
        self.generations = frozenset().union(*(_generations(frame, self.ids) for frame in threads))
        self.closed.set()

    def open(self) -> None:
        self.generations = frozenset()  # they would keep their locals
        self.opened.set()
        self.closed.set()

    def __call__(self, module: nn.Module, *_: Any) -> None:
        caller = sys._getframe(1)  # of the hook: the call of the module itself lies below it
        while caller.f_code is not _CALL:
            assert caller.f_back is not None
            caller = caller.f_back
        self.closed.wait()
        if not _in_call(caller.f_back, self.ids, self, begun=module):
            self.wait()

    def wait(self) -> None:
        self.opened.wait()


def _other_threads() -> list[FrameType]:
    return [frame for thread, frame in sys._current_frames().items() if thread != threading.get_ident()]


def _generations(frame: FrameType | None, ids: Collection[int]) -> set[FrameType]:
    """Frames in the stack that ends in ``frame`` of methods ``generate`` whose module is or holds one of the modules.

    They go by their name: many models have one of their own, around or instead of transformers'.
    """
    found = set()
    while frame is not None:
        if frame.f_code.co_name == "generate":
            owner = frame.f_locals.get("self")
            if isinstance(owner, nn.Module) and any(id(module) in ids for module in owner.modules()):
                found.add(frame)
        frame = frame.f_back
    return found


def _in_call(
    frame: FrameType | None, ids: Collection[int], gate: _Gate | None = None, begun: nn.Module | None = None
) -> bool:
    """Whether the stack that ends in ``frame`` is in a call of one of the modules, and does not wait at ``gate``.

    ``gate``: whose generations count as calls, too; None: before there is one.
    ``begun``: the module whose call stands above the stack; the wrapper that makes that call is no other one.
    """
    while frame is not None:
        if gate is not None and frame.f_code is _Gate.wait.__code__ and frame.f_locals["self"] is gate:
            return False
        if gate is not None and frame in gate.generations:
            return True
        if frame.f_code is _CALL:
            module = frame.f_locals["self"]
            inside = uncompiled(module)  # torch.compile's wrapper calls past nn.Module
            if id(module) in ids or (id(inside) in ids and inside is not begun):
                return True
        frame = frame.f_back
    return False
