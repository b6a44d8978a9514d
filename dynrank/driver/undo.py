"""A change of ranks that may be undone: a copy to go back to."""

from __future__ import annotations

from dynrank.change.change import Adapters
from dynrank.change.interrupts import uninterrupted
from dynrank.change.snapshot import Snapshot


class Undo:
    """A ``with`` block in which ranks may change; its end restores them, also after an error or Ctrl-C.

    Ranks, factors and optimizer state are restored bit for bit. An interrupt may come while the block ends,
    so enter it twice: ``with undo, undo:``.
    """

    def __init__(self, adapters: Adapters) -> None:
        self._adapters = adapters
        self._before: Snapshot | None = None

    def keep(self) -> None:
        """Keep the present state: the end of the block then restores nothing."""
        self._before = None

    def restore(self) -> None:
        """Restore the state at the start of the block; another change may be tried then."""
        if self._before is not None:
            back = self._before.change_back()
            with uninterrupted():
                back.apply()

    def __enter__(self) -> None:
        self._before = self._before or Snapshot(self._adapters)

    def __exit__(self, *_: object) -> None:
        self.restore()
        self.keep()
