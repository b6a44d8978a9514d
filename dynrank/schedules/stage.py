"""A stage of a schedule: when ranks change, to what and how; and the check of the stages' times."""

from collections.abc import Sequence
from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field

from dynrank.errors import ConfigurationError, Name, Share, checked, described
from dynrank.targets import Budget, Target
from dynrank.triggers import At, Run, Trigger

# What sets the target of a stage that no preset has made.
TO = ("to",)


@checked
class How:
    """How a change of rank is made.

    It replaces the whole ``how`` of a preset: ``early_budget`` and ``auto`` have ``lr_factor="sqrt"``.

    Args:
        lr_factor: factor of the adapters' learning rates inside each optimizer step after the change. "sqrt":
            sqrt(mean rank before / after), which keeps the size of an optimizer step of the update.
        optimizer_state: "transport" carries the moments through the change, "reset" deletes them.
        max_regression: largest relative worsening of ``check_monitor`` by a change, measured by validations right
            before and after it. A change that costs more is undone; with an infinite one, only a change to what is not
            finite. None: nothing is validated.
        check_monitor: name of the metric that is checked.
        check_mode: "min" if a smaller value is better, else "max".

    Raises:
        ConfigurationError: if a value cannot be used.

    A cut that may worsen the loss by 2%, and that keeps the size of an optimizer step:

    >>> from dynrank.schedules import early_budget
    >>> (stage,) = early_budget(8, how=How(lr_factor="sqrt", max_regression=0.02))
    >>> stage.how.lr_factor, stage.how.max_regression
    ('sqrt', 0.02)
    """

    lr_factor: Annotated[float, Field(gt=0)] | Literal["sqrt"] = 1.0
    optimizer_state: Literal["transport", "reset"] = "transport"
    max_regression: Annotated[float, Field(ge=0)] | None = None
    check_monitor: Name = "val/loss"
    check_mode: Literal["min", "max"] = "min"


@checked
class Stage:
    """One change of ranks.

    Args:
        when: a time, or a trigger that observes training.
        to: the target, which gives the new ranks.
        deadline: share of the run's optimizer steps, in (0, 1], at which the change comes in any case; None: never.
        how: how the change is made.
        search: whether to search, by a validation for each trial, for the smallest adapter that costs no more than
            ``how.max_regression``. ``to`` is then a budget, the largest adapter that may remain.
        arguments: the arguments that have set the target, for errors; a preset names its own.

    Raises:
        ConfigurationError: if a value cannot be used, a fixed time has a deadline, or a search comes before the last
            step.

    >>> from dynrank.targets import Rank
    >>> from dynrank.triggers import At
    >>> stage = Stage(At(fraction=0.5), Rank(8), how=How(max_regression=0.02))
    >>> stage.to, stage.how.max_regression
    (Rank(rank=8), 0.02)
    """

    when: Trigger | At
    to: Target
    deadline: Share | None = None
    how: How = How()
    search: bool = False
    arguments: Sequence[str] = field(default=TO, repr=False, compare=False, kw_only=True)

    def __post_init__(self) -> None:
        if isinstance(self.when, At) and self.deadline is not None:
            raise ConfigurationError(
                f"deadline must be None for a change at a fixed time, got {self.deadline:g} and {self.when.reason}",
                "deadline",
            )
        if not self.search:
            return
        if self.when != At(fraction=1.0):
            raise ConfigurationError(
                f"a search for the smallest adapter must come after the last step, At(fraction=1.0), got {self.when}: "
                "further training would break the tolerance",
                "when",
            )
        if self.how.max_regression is None or not isinstance(self.to, Budget):
            raise ConfigurationError(
                "a search for the smallest adapter needs how.max_regression, the tolerance, and a Budget, which "
                "orders the ranks",
                "how.max_regression",
                "to",
            )

    def planned_step(self, run: Run) -> int | None:
        """The latest optimizer step of the change; None if it has no deadline."""
        if isinstance(self.when, At):
            return self.when.in_steps(run)
        return None if self.deadline is None else At(fraction=self.deadline).in_steps(run)


def check_schedule(schedule: Sequence[Stage], run: Run) -> None:
    """Refuse times that contradict each other, or the length of the run if it is known."""
    if run.total_steps is None:
        return
    faults = []
    arguments = []
    before = -1
    for number, stage in enumerate(schedule, 1):
        in_epochs = isinstance(stage.when, At) and stage.when.epoch is not None
        planned = None if in_epochs and run.steps_per_epoch is None else stage.planned_step(run)
        if planned is None:
            continue
        if isinstance(stage.when, Trigger) and planned <= stage.when.warmup_steps:
            faults.append(
                f"stage {number}: deadline {stage.deadline:g} is step {planned}, within the trigger's warm-up of "
                f"{stage.when.warmup_steps} steps; change deadline or warmup_steps"
            )
            arguments += ["deadline", "warmup_steps"]
        if planned > run.total_steps:
            faults.append(f"stage {number}: step {planned} is after the last step, {run.total_steps}")
            arguments += stage.arguments
        if planned < before:
            faults.append(f"stage {number}: step {planned} is before {before} of stage {number - 1}")
            arguments += stage.arguments
        before = max(before, planned)
    if faults:
        raise ConfigurationError("the schedule contradicts itself:\n  " + "\n  ".join(faults), *arguments)


def as_texts(stages: Sequence[Stage]) -> list[tuple[str, str, str]]:
    """For each stage, as text: (when, to what, the whole stage)."""
    return [(described(stage.when), described(stage.to), described(stage)) for stage in stages]
