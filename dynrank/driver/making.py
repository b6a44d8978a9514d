"""Making the change of a stage that is due: at once, or on trial."""

from __future__ import annotations

from collections.abc import Callable

from dynrank.change.interrupts import uninterrupted
from dynrank.driver.due import DueStage
from dynrank.driver.event import RankEvent
from dynrank.driver.regression import RegressionTest
from dynrank.driver.search import cut_to_smallest
from dynrank.driver.training import Training
from dynrank.driver.undo import Undo

# Ends the stage with its event; None: no layer got new factors.
EndStage = Callable[[RankEvent | None], None]


def change_at_once(training: Training, due: DueStage, end_stage: EndStage) -> None:
    """Make the change of ``due``."""
    change = due.change(training, due.ranks)
    if not change.reports:
        end_stage(None)
        return
    event = due.event(training.step, change.reports, due.reason)
    # So far nothing has changed. No interrupt may separate the change from the updates that belong to it.
    with uninterrupted():
        change.apply()
        end_stage(event)


def change_on_trial(training: Training, due: DueStage, end_stage: EndStage) -> None:
    """Make the change of ``due``, or search for it, and undo it bit for bit if it costs too much."""
    undo = Undo(training.adapters)
    # Twice, because Ctrl-C may interrupt the first exit.
    with undo, undo:
        event = (cut_to_smallest if due.stage.search else _try)(training, undo, due)
        with uninterrupted():
            undo.keep()
            end_stage(event)


def _try(training: Training, undo: Undo, due: DueStage) -> RankEvent | None:
    change = due.change(training, due.ranks)
    if not change.reports:
        return None
    test = RegressionTest(training, due.stage.how)
    with uninterrupted():
        change.apply()
    measured = test.measure()
    undone = not test.allows(measured.after)
    if undone:
        undo.restore()
    return due.event(training.step, change.reports, due.reason, measured, undone=undone)
