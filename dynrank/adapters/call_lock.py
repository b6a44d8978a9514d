"""A readers-writer lock: calls of a model are the readers, and a change of its adapter is the writer.

A change waits for the calls that are running, and calls that begin later wait for the change.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import nn

from dynrank.layers.compiled import uncompiled
from dynrank.private import pass_over_in_compile

_installing = threading.Lock()


class CallLock:
    """A context manager around each call of a model, in any thread; calls may be nested."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        # {thread: depth of its nested calls}.
        self._calls: dict[int, int] = {}
        # Whether a change is running or waits for calls.
        self._closed = False
        # How many calls wait; they run before the next change.
        self._waiting = 0

    def __enter__(self) -> None:
        thread = threading.get_ident()
        with self._changed:
            if self._closed and thread not in self._calls:
                self._waiting += 1
                try:
                    self._changed.wait_for(lambda: not self._closed)
                finally:
                    self._waiting -= 1
                    self._changed.notify_all()
            self._calls[thread] = self._calls.get(thread, 0) + 1

    def __exit__(self, *_: object) -> None:
        thread = threading.get_ident()
        with self._changed:
            self._calls[thread] -= 1
            if not self._calls[thread]:
                del self._calls[thread]
                self._changed.notify_all()

    @contextmanager
    def closed(self) -> Iterator[None]:
        """Inside the block no call is running; a call that begins meanwhile waits for the end of the block."""
        with self._changed:
            if threading.get_ident() in self._calls:
                raise RuntimeError("a model cannot be changed inside its own forward or generate")
            self._changed.wait_for(lambda: not self._closed and not self._waiting)
            self._closed = True
        try:
            with self._changed:
                self._changed.wait_for(lambda: not self._calls)
            yield
        finally:
            with self._changed:
                self._closed = False
                self._changed.notify_all()


def call_lock_of(model: nn.Module) -> CallLock:
    """The lock of a model, added if it has none: from then on calls of ``model`` and its ``generate`` take the lock.

    In a block ``with call_lock_of(model):``, several calls see the same adapter; a swap waits until the block ends.

    The model's class is replaced by a subclass of the same name. Its ``__call__`` and ``generate`` hold the lock until
    they return or raise. These calls do not take the lock: calls that were running when it was added; calls of a
    submodule without the model; compiled code of a module that contains the model; and calls of a wrapper that
    ``torch.compile`` made before, unless the wrapper is passed here. Copies and pickles have no lock.
    """
    with _installing:
        inner = uncompiled(model)
        lock: CallLock = getattr(type(inner), "_call_lock", None) or CallLock()
        for module in (inner, model):
            if getattr(type(module), "_call_lock", None) is not lock:
                object.__setattr__(module, "__class__", _with_lock(type(module), lock))
    return lock


def _with_lock(kind: type[nn.Module], lock: CallLock) -> type[nn.Module]:
    """A subclass of ``kind`` whose objects hold the lock during a call and during ``generate``."""

    class Locked(kind):  # type: ignore[misc, valid-type]
        _call_lock = lock

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            # Taking a lock inside a larger compiled graph would break the graph.
            if torch.compiler.is_dynamo_compiling():
                return super().__call__(*args, **kwargs)
            with lock:
                return super().__call__(*args, **kwargs)

        def __reduce_ex__(self, protocol: Any) -> Any:
            function, arguments, *rest = super().__reduce_ex__(protocol)
            # copyreg.__newobj__ gets the class as its first argument, and pickle needs the original class there.
            if arguments and arguments[0] is Locked:
                function, arguments = object.__new__, (kind, *arguments[1:])
            return (kind if function is Locked else function), arguments, *rest

    # torch.compile skips this method and compiles forward, as it does for nn.Module's own __call__.
    pass_over_in_compile(Locked.__call__.__code__)
    if hasattr(kind, "generate"):

        @wraps(kind.generate)
        def generate(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            with lock:
                return kind.generate(self, *args, **kwargs)

        Locked.generate = generate
    for name in ("__name__", "__qualname__", "__module__", "__doc__"):
        setattr(Locked, name, getattr(kind, name))
    return Locked
