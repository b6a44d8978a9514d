"""A stage of a schedule: when ranks change, to what and how; and the check of stages against each other and a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from dynrank.errors import ConfigurationError, Count, Name, NotNegative, Share, Steps, validated
from dynrank.targets import LayerState, Smallest, Target
from dynrank.triggers import At, Run, Trigger


@validated("schedule.how")
class How:
    """How a change of rank is made.

    A preset has defaults of its own for some of these, which its signature shows.

    Args:
        metric: which singular directions a cut keeps: "weight", the largest, or "gates", those that the loss needs most
            (a quadratic estimate with all interactions, see :mod:`dynrank.change.greedy`).
        window: optimizer steps before the change over which gates are watched; a change that cannot be foreseen is made
            this much later, and one before which steps had no gradient up to this much, or at its deadline.
        loss_terms: over how many terms the loss of a step is the mean, if not over the positions of the model's output
            at which it has a gradient (examples of a classifier, counted tokens of a language model); 1 for a sum.
        rewarmup_steps: optimizer steps over which the learning rate is ramped up again after a change; 0: none.
        rate_after: what the adapters' learning rates are multiplied by from the change on, whatever their scheduler
            does; "sqrt": the root of mean rank before / after, which keeps the size of a step of the update.
        optimizer_state: "transport" carries the moments along, "reset" forgets them.
        max_regression: largest relative worsening of ``check_monitor`` by a change, measured by validations right
            before and after it; one that costs more is undone and tried again half as far. None: no check.
        check_monitor: name of the metric that is checked.
        check_mode: "min" if a smaller one is better, else "max".

    Raises:
        ConfigurationError: if a value cannot be used.
    """

    metric: Literal["weight", "gates"] = "weight"
    window: Count = 20
    loss_terms: Count | None = None
    rewarmup_steps: Steps = 0
    rate_after: Annotated[float, Field(gt=0)] | Literal["sqrt"] = 1.0
    optimizer_state: Literal["transport", "reset"] = "transport"
    max_regression: NotNegative | None = None
    check_monitor: Name = "val/loss"
    check_mode: Literal["min", "max"] = "min"


@validated("schedule.stages")
class Stage:
    """One change of ranks.

    Args:
        when: a time, or a trigger that watches training.
        to: what ranks to change to.
        deadline: share of the run's optimizer steps, in (0, 1], at which the change comes in any case; None: never.
        how: how the change is made.
        key: configuration key that decides the target, for error messages.

    Raises:
        ConfigurationError: if a value cannot be used, a deadline goes with a fixed time, or a search within a
            tolerance comes before the last step.
    """

    when: Trigger | At
    to: Target
    deadline: Share | None = None
    how: How = How()
    key: str = "schedule.stages"

    def __post_init__(self) -> None:
        if isinstance(self.when, At) and self.deadline is not None:
            raise ConfigurationError(
                f"deadline must be null beside a fixed time, got {self.deadline:g} and {self.when.reason}; "
                "set schedule.deadline"
            )
        if isinstance(self.to, Smallest) and self.when != At(fraction=1.0):
            raise ConfigurationError(
                f"a search for the smallest adapter must come after the last step, At(fraction=1.0), got {self.when}: "
                "training that follows it loses what was promised; set when"
            )
        if isinstance(self.to, Smallest) and self.how.max_regression is None:
            raise ConfigurationError(
                "a search for the smallest adapter needs a tolerance; set max_regression of its how"
            )

    def planned_step(self, run: Run) -> int | None:
        """The optimizer step by which the stage acts at the latest; None if nothing bounds it."""
        if isinstance(self.when, At):
            return self.when.in_steps(run)
        return None if self.deadline is None else At(fraction=self.deadline).in_steps(run)


def check_schedule(schedule: Sequence[Stage], *, highest: int, run: Run) -> None:
    """Refuse stages that contradict each other, the starting ranks or the length of the run.

    Args:
        schedule: its stages.
        highest: highest starting rank of all layers that may change.
        run: length of the run; what needs an unknown one is not checked.
    """
    faults, before = [], -1
    for number, stage in enumerate(schedule, 1):
        least, most = stage.to.starts()
        if not least <= highest <= most:
            bound = f"at least {least}" if highest < least else f"at most {most}"
            faults.append(
                f"stage {number}: the highest rank before {stage.to} must be {bound}, got {highest}; "
                f"set {stage.key} or lora.rank"
            )
        _, highest = stage.to.reach(LayerState(rank=highest))
        if run.total_steps is None:
            continue
        in_epochs = isinstance(stage.when, At) and stage.when.epoch is not None
        planned = None if in_epochs and run.steps_per_epoch is None else stage.planned_step(run)
        if planned is None:
            continue
        if isinstance(stage.when, Trigger) and planned <= stage.when.warmup_steps:
            faults.append(
                f"stage {number}: deadline {stage.deadline:g} is step {planned}, within the warm-up of "
                f"{stage.when.warmup_steps} steps; set schedule.deadline or schedule.trigger.warmup_steps"
            )
        if planned > run.total_steps:
            faults.append(f"stage {number}: step {planned} is after the run's last, {run.total_steps}; set {stage.key}")
        if planned < before:
            faults.append(f"stage {number}: step {planned} is before stage {number - 1}'s, {before}; set {stage.key}")
        before = max(before, planned)
    if faults:
        raise ConfigurationError("the schedule contradicts itself:\n  " + "\n  ".join(faults))
