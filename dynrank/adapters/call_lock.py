"""A lock that a model's calls share: a change of adapters waits for those under way, and later ones wait for it."""

from __future__ import annotations

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
    """A context manager for each call of a model, whichever thread it is made in; calls may lie within each other."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        # {thread: how many calls it is in}.
        self._calls: dict[int, int] = {}
        self._closed, self._waiting = False, 0

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
        """Inside the block no call is under way; calls begun meanwhile wait for its end."""
        with self._changed:
            if threading.get_ident() in self._calls:
                raise RuntimeError("a model cannot be changed from within its own forward or generate")
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
    """The lock of a model, put there if it has none: calls of ``model`` and of its ``generate`` share it from now on.

    A loop of several calls keeps one adapter in a block ``with call_lock_of(model):``; a swap waits until it ends.

    The model's class becomes a subclass of itself, of the same name, with two methods more, so that a call is counted
    until it ends, by whatever exception. Not counted are: calls that were under way when the lock was put there; calls
    of a part of the model past the model itself, and compiled code of a module around it;
    and those of a wrapper that ``torch.compile`` made of the model before, unless the wrapper is what is given here.
    Copies and pickles have no lock.
    """
    with _installing:
        inner = uncompiled(model)
        lock: CallLock = getattr(type(inner), "_call_lock", None) or CallLock()
        for module in (inner, model):
            if getattr(type(module), "_call_lock", None) is not lock:
                object.__setattr__(module, "__class__", _with_lock(type(module), lock))
    return lock


def _with_lock(kind: type[nn.Module], lock: CallLock) -> type[nn.Module]:
    """A subclass of ``kind`` whose objects hold the lock while they are called, or are asked to generate."""

    class Locked(kind):  # type: ignore[misc, valid-type]
        _call_lock = lock

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            # Inside a larger compiled graph a lock would break the graph.
            if torch.compiler.is_dynamo_compiling():
                return super().__call__(*args, **kwargs)
            with lock:
                return super().__call__(*args, **kwargs)

        def __reduce_ex__(self, protocol: Any) -> Any:
            function, arguments, *rest = super().__reduce_ex__(protocol)
            # copyreg.__newobj__ gets the class as its first argument, and pickle wants the original one.
            if arguments and arguments[0] is Locked:
                function, arguments = object.__new__, (kind, *arguments[1:])
            return (kind if function is Locked else function), arguments, *rest

    # torch.compile starts with forward, as it does for nn.Module's own __call__.
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
