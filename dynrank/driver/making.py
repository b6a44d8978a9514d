"""Making the change of a stage that is due: at once, or on trial."""

from __future__ import annotations

from collections.abc import Callable

from dynrank.change.interrupts import uninterrupted
from dynrank.driver.due import DueStage
from dynrank.driver.event import RankEvent
from dynrank.driver.search import cut_to_smallest
from dynrank.driver.trial import Trial

# Ends the stage with its event; None: no layer got new factors.
EndStage = Callable[[RankEvent | None], None]


def change_at_once(due: DueStage, end_stage: EndStage) -> None:
    """Make the change of ``due``."""
    change = due.change(due.ranks)
    if not change.reports:
        end_stage(None)
        return
    event = due.event(change.reports, due.reason)
    # So far nothing has changed. No interrupt may separate the change from the updates that belong to it.
    with uninterrupted():
        change.apply()
        end_stage(event)


def change_on_trial(due: DueStage, end_stage: EndStage) -> None:
    """Make the change of ``due``, or search for it, and undo it bit for bit if it costs too much."""
    trial = Trial(due.training, due.stage.how)
    # Twice, because Ctrl-C may interrupt the first exit.
    with trial, trial:
        event = (cut_to_smallest if due.stage.search else _try)(trial, due)
        with uninterrupted():
            trial.keep()
            end_stage(event)


def _try(trial: Trial, due: DueStage) -> RankEvent | None:
    change = due.change(due.ranks)
    if not change.reports:
        return None
    measured = trial.make(change)
    undone = not trial.allows(measured.after)
    if undone:
        trial.restore()
    return due.event(change.reports, due.reason, measured, undone=undone)
