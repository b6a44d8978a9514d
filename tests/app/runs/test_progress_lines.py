"""The lines of a run whose output is no terminal, by a clock that only batches move."""

import re
from types import SimpleNamespace

import pytest

from dynrank.app.runs import progress_lines


@pytest.fixture
def printed(fit, regression, monkeypatch):
    """Trains with batches of so many seconds; returns (times of all lines, their texts, what was validated, end).

    The first batch takes ``first`` seconds more, and each validation ``validation`` seconds more.
    """

    def run(seconds, first=0, validation=0, **options):
        clock = SimpleNamespace(now=0.0)
        lines = []
        validated = []

        class Slow(regression[0]):
            def training_step(self, batch, batch_idx):
                clock.now += seconds + (first if clock.now == 0 else 0)
                return super().training_step(batch, batch_idx)

            def validation_step(self, batch, batch_idx):
                clock.now += seconds + validation
                super().validation_step(batch, batch_idx)

            def on_validation_end(self):
                validated.append(self.global_step)

        monkeypatch.setattr(progress_lines, "time", SimpleNamespace(monotonic=lambda: clock.now))
        monkeypatch.setattr(progress_lines, "print", lambda line, **_: lines.append((clock.now, line)), raising=False)
        fit(progress_lines.ProgressLines(follow=True), module=Slow(), **options)
        times, texts = zip(*lines, strict=True)
        return times, texts, validated, clock.now

    return run


@pytest.mark.parametrize(("seconds", "batches"), [(0.5, 1), (7, 1), (25, 4), (50, 1)])
def test_there_is_a_line_at_each_validation_and_at_least_one_a_minute(printed, seconds, batches):
    """Also within a validation, and between steps of several batches."""
    times, texts, validated, end = printed(seconds, accumulate_grad_batches=batches)
    assert max(after - before for before, after in zip((0, *times), (*times, end), strict=True)) <= 60
    # Only there: in other lines the loss would be one of an earlier step.
    told = [int(re.match(r"step (\d+)", text)[1]) for text in texts if "val/loss" in text]
    assert len(validated) >= 4
    assert told == validated


def test_batches_of_more_than_a_minute_have_a_line_each(printed):
    times, *_, end = printed(90)
    assert {*times} == {90.0 * number for number in range(int(end / 90) + 1)}


def test_time_that_is_left_is_that_of_the_steps_to_come(printed):
    _, texts, *_ = printed(6, limit_val_batches=0)
    assert [text for text in texts if text.startswith("length")] == [
        "length           24 steps, 2.4 epochs of 10 steps (trainer.max_epochs, trainer.max_steps)"
    ]
    assert [text for text in texts if text.startswith("time left")] == ["time left        84 s, by the first 10 steps"]


@pytest.mark.parametrize(("first", "validation"), [(20, 0), (0, 50)])
def test_no_time_is_reckoned_from_a_slow_first_step_or_a_validation_after_it(first, validation, printed):
    """As in a run that was resumed just before a validation."""
    _, texts, *_ = printed(1, first=first, validation=validation, val_check_interval=1)
    steps = {int(found[1]): text for text in texts if (found := re.match(r"step (\d+)", text))}
    assert len(steps) == 24
    assert all(text.endswith("left") == (step >= 10) for step, text in steps.items())


def test_slow_steps_say_the_time_of_the_training_steps_to_come(printed):
    _, texts, *_ = printed(40, validation=1000, val_check_interval=2)
    assert [text for text in texts if text.startswith("step 1 ")] == ["step 1           15 min left"]
    of_second = [text for text in texts if text.startswith("step 2 ")]
    assert any("val/loss" in text for text in of_second)
    assert all(text.endswith("15 min left") for text in of_second)
