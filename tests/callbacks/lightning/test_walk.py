"""The files of dynrank that run in one cut under Lightning, as dynrank/README.md counts them.

Run with ``-s`` to see the lists.
"""

import sys
from pathlib import Path

import dynrank
from dynrank.callbacks import RankScheduler
from dynrank.schedules import Stage
from dynrank.targets import Budget
from dynrank.triggers import At

ROOT = Path(dynrank.__file__).parent


def walk(call):
    """The files of dynrank in which ``call`` runs a function."""
    files = set()

    def note(frame, event, _):
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(ROOT) and frame.f_code.co_name != "<module>":
            files.add(str(path.relative_to(ROOT)))

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return sorted(files)


def test_a_cut_runs_few_files(fit):
    scheduler = RankScheduler(Stage(At(step=8), Budget(share=0.5)))
    advance = scheduler.driver.advance
    files = []

    def walked(training):
        if training.step == 8:
            files.extend(walk(lambda: advance(training)))
        else:
            advance(training)

    scheduler.driver.advance = walked
    fit(scheduler, max_steps=10)
    assert len(scheduler.history) == 1
    print(*files, sep="\n")
    assert "change/resize.py" in files
    # The hook of the callback itself calls the driver.
    assert len({*files, "callbacks/rank_scheduler.py"}) <= 20
