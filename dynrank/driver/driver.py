"""Carrying out a schedule in a run, with any trainer: which stage is due, and its change.

What happens at a change:

1. A stage is decided: by a trigger after a validation (``validated``, where process 0 decides for all), or by time
   before a step (``advance``). A later stage that is due by time skips those before it, also one that is decided.
2. ``advance`` makes the change between two steps; what is due at the end of the run is made in the last step (``end``),
   before the trainer validates and saves. First all processes compare their adapters and optimizer states.
3. Process 0 asks the stage's target for the new ranks, by the state of each layer (``DueStage``: bounds, and singular
   values or importance if the target reads them), and computes new factors and optimizer state (``Change.in_run``). All
   others get them. Nothing has changed yet. Unless a layer grows, all unpinned layers that keep their rank, frozen ones
   too, are balanced: their factors change, and their update stays.
4. With ``max_regression``, which a search (``auto``) always has, the weights are validated before the change and after
   it; a search validates once before its first cut, and once for each cut that it tries and undoes.
5. The change is applied by assignments (``Change.apply``, with new reducers of DDP), while Ctrl-C waits. Without a
   check Ctrl-C is then raised after step 6, and the change stays. With ``max_regression`` too large a regression undoes
   it bit for bit, and its stage is over. Ctrl-C or an error before that decision undoes it, too, and the stage waits.
6. The driver goes to the next stage, and triggers begin anew. Only if the change was made and kept, importance forgets
   the last update, and the adapters' rate in each step is multiplied by the event's ``lr_factor`` from here on.
7. At the end the event, also of a change that was undone, goes to every callback of the trainer that has
   ``on_rank_change``: RankMonitor prints and logs it, RankScheduler forgets the best so far if ranks have fallen.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from copy import deepcopy
from dataclasses import replace
from functools import partial
from math import inf, nan
from typing import Any

from dynrank.distributed.processes import check_processes, from_first, mean_over_processes
from dynrank.distributed.wrappers import new_reducers
from dynrank.driver import progress as stored
from dynrank.driver.best import wait_anew
from dynrank.driver.bounds import BoundLayers
from dynrank.driver.checks import check_model, check_resumed, check_training
from dynrank.driver.due import DueStage
from dynrank.driver.event import RankEvent
from dynrank.driver.learning_rates import LearningRates
from dynrank.driver.making import change_at_once, change_on_trial
from dynrank.driver.metrics import check_observed, judging_metrics, numbers_in, observed_metrics
from dynrank.driver.progress import Decision, Progress
from dynrank.driver.run_importance import RunImportance
from dynrank.driver.timetable import Timetable
from dynrank.driver.training import Training
from dynrank.driver.validation import check_judges
from dynrank.errors import ConfigurationError
from dynrank.layers.finding import adapter_parameters
from dynrank.rank_map import RankBounds, RankMap, read_rank_map
from dynrank.schedules import Schedule
from dynrank.schedules.presets import stages_of
from dynrank.triggers import Run, Trigger


class RankDriver:
    """A schedule in one run. The training loop calls, in this order:

    - :meth:`start` once, after :meth:`load_state_dict` if the run is resumed;
    - :meth:`advance` before the first forward of a step, with no gradients pending: ranks change here;
    - :meth:`end_step` after the optimizer's step, with its gradients; what is due at the end changes in the last step;
    - :meth:`validated` after a validation;
    - :meth:`finish` after the last step, or :meth:`abort` after an exception.

    ``schedule``, ``rank_map`` and errors are those of :class:`dynrank.callbacks.RankScheduler`.

    Attributes:
        stages: the stages of the schedule.
        rules: the rules of the rank map.
        progress: which stages are over, and what is pending.
        lr_factor: factor of the adapters' learning rates in each step, the product of those of all changes.

    Example::

        RankDriver(4).start(Training(model, [optimizer]), Run(total_steps=100))
    """

    def __init__(self, schedule: Schedule, *, rank_map: RankMap | None = None) -> None:
        # Triggers remember what they have observed, and the user may give the same stages to several runs.
        self.stages = [replace(stage, when=deepcopy(stage.when)) for stage in stages_of(schedule)]
        self.rules = read_rank_map(rank_map, RankBounds)
        self.progress = Progress()
        self.lr_factor = 1.0
        self._run = Run(total_steps=None)
        # Whether a run is going on: from start() to its end.
        self._is_running = False
        # Of the stages in this run, from start() on.
        self._timetable: Timetable | None = None
        # The first step at which a stage is due by time.
        self._next_step = inf
        self._bounds: Mapping[str, RankBounds] = {}
        # One for each optimizer, from start() to the end.
        self._rates: list[LearningRates] = []
        self._importance = RunImportance()
        # The last step for which end_step() was called.
        self._ended_step = 0
        # Whether the metrics by which changes are judged are known to exist; if not, validated() validates once itself.
        self._has_judges = False
        # Whether all processes still have to be compared after their first step.
        self._is_first_step = False

    @property
    def history(self) -> list[RankEvent]:
        """Every change of the run so far, and every attempt that was undone, also those before a resume."""
        return [*self.progress.history]

    @property
    def finished(self) -> bool:
        """Whether every stage is over."""
        return self.progress.stage >= len(self.stages)

    @property
    def adapter_rates(self) -> dict[str, float]:
        """{``lr/adapter``: the rate of adapters in the last step}, one for each group, if the factor was not 1."""
        used = [float(rate) for rates in self._rates for rate in rates.used.values()]
        return {"lr/adapter" if len(used) == 1 else f"lr/adapter/{n}": rate for n, rate in enumerate(used)}

    @property
    def monitors(self) -> list[str]:
        """Names of the metrics that the schedule reads."""
        return sorted(judging_metrics(self.stages) | observed_metrics(self.stages).keys())

    @property
    def observed(self) -> Collection[str]:
        """Names of the metrics that the trigger of the next stage reads; none if that has no trigger or is decided."""
        trigger = self._next_trigger
        return () if trigger is None else trigger.monitors

    def start(self, training: Training, run: Run) -> None:
        """Begin a run of length ``run``, or continue it if a state has been loaded."""
        if training.step == 0 and self._ended_step > 0:
            raise ConfigurationError(
                f"this schedule is at step {self._ended_step} of another run; make a new one for each, or resume it",
                "ckpt_path",
            )
        self.abort()
        self._ended_step = training.step
        self._run = run
        self._timetable = Timetable(self.stages, run)
        layers = BoundLayers.of(training.model, self.rules)
        self._bounds = layers.bounds
        # The check of a model needs the starting ranks.
        if self.history:
            check_resumed(self.history, layers.ranks, training.step)
        else:
            check_model(training.model, self.stages, run, self.rules)
        check_training(training, self.stages)
        check_processes(training.model, training.optimizers, "at the start of training", training.group)
        self._is_first_step = bool(self.stages)
        # A model that was wrapped before its checkpoint was loaded may have other shapes than DDP knows.
        with new_reducers(training.ddp):
            pass
        adapters = adapter_parameters(training.model)
        self._rates = [LearningRates(optimizer, adapters, self.lr_factor) for optimizer in training.optimizers]
        self._importance.start(training, layers.layers, self.stages[self.progress.stage :])
        self._next_step = self._timetable.next_step(self.progress.stage)
        self._is_running = True

    def is_due(self, step: int) -> bool:
        """Whether ranks change before the optimizer step that comes after ``step`` of them."""
        return self.progress.pending is not None or step >= self._next_step

    def advance(self, training: Training) -> None:
        """Decide a stage that is due by time, and make the change that is decided, by time or by a trigger."""
        if self.is_due(training.step):
            self._act(training)

    def end_step(self, training: Training, *, last: bool | None = None) -> None:
        """Take the optimizer step just made, if there is a new one; its gradients must still exist.

        If it is the ``last`` (None: by the length of the run), what is due at the end changes now.
        """
        if training.step <= self._ended_step:
            return
        self._ended_step = training.step
        if self._is_first_step:
            # Processes whose gradients nobody averages differ from here on.
            check_processes(training.model, training.optimizers, "after the first step", training.group)
            self._is_first_step = False
        self._importance.end_step()
        if training.step == self._run.total_steps if last is None else last:
            self.end(training)

    def end(self, training: Training) -> None:
        """Make the change that is due at the end; call it in the last step, before the last validation."""
        self._act(training, ended=True)

    def validated(self, training: Training, metrics: Mapping[str, Any]) -> None:
        """Take the metrics of a validation of the present weights, and let the trigger of the next stage read them.

        The first one has all that triggers read; what a later one lacks, as NaN, says nothing.
        """
        metrics = numbers_in(metrics)
        if self.progress.observed_step is None:
            check_observed(self.stages, metrics)
        # A resumed loop may report the same validation twice.
        is_known = training.step == self.progress.observed_step
        self.progress = replace(self.progress, observed_step=training.step, awaits_validation=False)
        if not self._has_judges:
            stages = self.stages[self.progress.stage :]
            self._has_judges = check_judges(training, stages, metrics)
        trigger = self._next_trigger
        if trigger is None or is_known:
            return
        values = [mean_over_processes(metrics.get(name, nan), training.group) for name in trigger.monitors]
        fires = trigger.observe(training.step, *values)
        if from_first(lambda: fires, training.group):
            self.progress.pending = Decision(self.progress.stage, trigger.reason)

    def finish(self, training: Training) -> None:
        """End the run: make a change that is left, and warn if stages were not reached."""
        event = self._act(training, ended=True)
        if event is not None and not event.undone:
            training.warn(
                f"ranks were changed after training had ended at step {training.step}, so no checkpoint has the "
                "change: the run was stopped early, or its last validation decided; save the model now"
            )
        self.abort()
        if not self.finished:
            training.warn(
                f"training ended before stage {self.progress.stage + 1} of the rank schedule, so ranks are not final: "
                f"no {self.stages[self.progress.stage].when.reason}; train longer, or give a trigger a deadline"
            )

    def abort(self) -> None:
        """End the run, also after an error: nothing of the driver stays on the optimizers."""
        self._is_running = False
        for rates in self._rates:
            rates.remove()
        self._rates = []
        self._importance.stop()

    def reset(self) -> None:
        """Forget the run, so that the schedule can begin again with another model."""
        self.abort()
        self._reset_triggers(first=0)
        self.progress = Progress()
        self.lr_factor = 1.0
        self._importance.load_state_dict(None)
        self._ended_step = 0

    def state_dict(self) -> dict[str, Any]:
        """Plain containers and tensors only, so that a checkpoint loads with ``weights_only=True``."""
        own = {"importance": self._importance.state_dict(), "lr_factor": self.lr_factor}
        return stored.state_of(self.progress, self.stages, self.rules) | own

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what :meth:`state_dict` returned, before :meth:`start`; see :func:`dynrank.driver.progress.load`."""
        if self._is_running:
            raise ConfigurationError(
                "a state of a rank schedule was loaded within its run, and the steps that were taken back cannot be: "
                "search for a rate or a batch size before training, without this callback; a loop that goes back "
                "calls driver.abort() before and driver.start(...) after it"
            )
        self.progress = stored.load(state, self.stages, self.rules)
        self._ended_step = 0
        self.lr_factor = float(state["lr_factor"])
        self._importance.load_state_dict(state["importance"])

    @property
    def _next_trigger(self) -> Trigger | None:
        """The trigger of the next stage, if no change is pending."""
        when = None if self.finished or self.progress.pending else self.stages[self.progress.stage].when
        return when if isinstance(when, Trigger) else None

    def _act(self, training: Training, *, ended: bool = False) -> RankEvent | None:
        """Make the change that is due, if there is one; None: there is none, or no layer gets new factors."""
        assert self._timetable is not None
        decided = self.progress.pending
        first = self.progress.stage if decided is None else decided.stage + 1
        self.progress.pending = decided = self._timetable.due(first, training.step, ended=ended) or decided
        if decided is None:
            return None
        with training.gathered():
            return self._change(training, decided)

    def _change(self, training: Training, decided: Decision) -> RankEvent | None:
        """Make the decided change, or undo it by its check, and end its stage."""
        index = decided.stage
        stage = self.stages[index]
        # Process 0 computes the change, so afterwards nobody could see that processes had differed.
        when = f"before the change of rank at step {training.step}"
        check_processes(training.model, training.optimizers, when, training.group)
        last = index == len(self.stages) - 1
        # The importance is the same in all processes, because gradients are; process 0 decides all the same.
        due = DueStage(training, stage, decided.reason, self._bounds, self._importance.of_layers(), last=last)
        # The importance of an update needs the gradients of the step after it.
        if "importance" in stage.to.needs and training.step >= 2:
            due.warn_of_unknown(self._importance.unmeasured())
        history = self.progress.history
        known = len(history)
        end_stage = partial(self._end_stage, training, index)
        try:
            make = change_at_once if stage.how.max_regression is None else change_on_trial
            make(due, end_stage)
        finally:
            # Also if Ctrl-C was pressed during the change.
            for event in history[known:]:
                training.tell(event)
        return history[-1] if len(history) > known else None

    def _end_stage(self, training: Training, index: int, event: RankEvent | None) -> None:
        """Go to the stage after ``index``, whose change was made, undone, or (None) gave no layer new factors."""
        self.progress.pending = None
        self.progress.stage = index + 1
        assert self._timetable is not None
        self._next_step = self._timetable.next_step(index + 1)
        self._reset_triggers(first=index + 1)
        if event is not None:
            self.progress.history.append(event)
        is_made = event is not None and not event.undone
        self._importance.stage_ended(self.stages[index + 1 :], changed=is_made)
        if event is not None and is_made:
            self.lr_factor *= event.lr_factor
            for rates in self._rates:
                rates.factor = self.lr_factor
            # A trainer's schedulers are not among these: its callback decides by ``keep_best_before``.
            if event.lowers:
                self.progress.awaits_validation = True
                wait_anew(training.schedulers)

    def _reset_triggers(self, first: int) -> None:
        """Let the triggers of the stages from number ``first`` on begin anew."""
        for stage in self.stages[first:]:
            if isinstance(stage.when, Trigger):
                stage.when.reset()
