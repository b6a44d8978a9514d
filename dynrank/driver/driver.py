"""Carrying out a schedule in a run, with any trainer: which stage is due, whether it can act, and its change.

What happens at a change:

1. A stage is decided: by a trigger after a validation (``validated``, where process 0 decides for all), or by time
   before a step (``advance``) and after the last one (``finish``). A later stage that is due by time replaces a
   decision that waits.
2. ``advance`` makes the change between two steps, ``finish`` what is left. First all processes compare their adapters
   and optimizer states.
3. Process 0 asks the stage's target for the new ranks, by the state of each layer (``DueStage``: bounds, and singular
   values or importance if the target reads them), and computes new factors and optimizer state. They are broadcast to
   the others. Nothing has changed yet. Unless a layer grows, unpinned layers that keep their rank are balanced, so
   a stage that changes no rank is a change, too.
4. With ``max_regression`` the weights are validated before the change and after it. So they are if the run has just
   validated them: it may have had other data, and has drawn other random numbers. A search (``auto``) instead validates
   once before its first cut, and once for each cut that it tries and undoes. With ``measure``, if that costs little,
   they are validated before the change and after step 6.
5. The change is applied by assignments, while DDP is paused and Ctrl-C waits. Without a check Ctrl-C then
   comes after step 6, and the change stays. With ``max_regression`` too large a regression undoes it bit for bit, and
   its stage is over: it is not tried again. Ctrl-C or an error before that decision undoes it, too, and the stage
   waits.
6. The driver goes to the next stage, and triggers begin anew. Only if the change was made and kept, importance forgets
   the last update (its sums stay, as long as a later stage needs them), and the adapters' learning rate is multiplied
   by ``lr_factor`` of the stage's How: 1 in ``How()``; "sqrt" in ``early_budget``, which an int stands for, and in
   ``auto``: the root of the mean rank before / after.
7. At the end the event, also of a change that was undone, goes to every callback of the trainer that has
   ``on_rank_change``: RankMonitor prints and logs it, RankScheduler forgets the best so far if ranks have fallen.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, fields, replace
from itertools import accumulate, chain, repeat
from typing import Any

from torch import nn

from dynrank.change.change import Change
from dynrank.change.directions import LayerDirections
from dynrank.change.interrupts import uninterrupted
from dynrank.distributed.processes import check_processes, from_first
from dynrank.distributed.wrappers import new_reducers
from dynrank.driver.bounds import bounds_of
from dynrank.driver.checks import check_model, check_training, checked_metrics, metric_value, observed_metrics
from dynrank.driver.due import DueStage, keeps_rank
from dynrank.driver.event import UNDONE, History, RankEvent
from dynrank.driver.importance import ImportanceSums, shares_by_importance
from dynrank.driver.in_processes import apply_change, compute_change
from dynrank.driver.learning_rates import LearningRates, SavedRate, begin_anew, warn_of_low_rate
from dynrank.driver.logged import LoggedMetrics, numbers_in
from dynrank.driver.progress import Decision, Progress
from dynrank.driver.schedulers import forget_plateau
from dynrank.driver.search import cut_to_smallest
from dynrank.driver.training import MeasuredSteps, Training
from dynrank.driver.undo import RegressionTest, Undo, batches_to_measure
from dynrank.driver.validation import validate
from dynrank.errors import ConfigurationError, described, read_as
from dynrank.layers.base import RankedLayer
from dynrank.layers.finding import adapter_parameters, lora_layers
from dynrank.rank_map import RankBounds, RankMap, read_rank_map
from dynrank.schedules import Schedule, Stage
from dynrank.schedules.presets import stages_of
from dynrank.schedules.stage import as_texts
from dynrank.triggers import At, Run, Trigger


class RankDriver:
    """A schedule in one run. The training loop calls, in this order:

    - :meth:`start` once, after :meth:`load_state_dict` if the run is resumed;
    - :meth:`advance` before the first forward of a step, with no gradients pending: ranks change here;
    - :meth:`end_step` after the optimizer's step, while its gradients are still there;
    - :meth:`validated` after a validation;
    - :meth:`finish` after the last step, or :meth:`abort` after an exception.

    ``schedule``, ``measure``, ``rank_map`` and errors are those of :class:`dynrank.callbacks.RankScheduler`.

    Attributes:
        stages: the stages of the schedule.
        rules: the rules of the rank map.
        progress: which stages are over, and what is pending.
        logged: the last value of each metric; a trainer or a loop adds what it logs between validations.
        lr_factor: factor of the adapters' learning rates, the product of those of all changes.

    >>> import torch, dynrank
    >>> from dynrank.schedules import early_budget
    >>> from dynrank.triggers import Run
    >>> model = dynrank.add_lora(torch.nn.Sequential(torch.nn.Linear(8, 8)), rank=4)
    >>> optimizer = torch.optim.AdamW(dynrank.adapter_parameters(model))
    >>> driver, loop = dynrank.RankDriver(early_budget(2)), dynrank.Training(model, [optimizer])
    >>> driver.start(loop, Run(total_steps=6))
    >>> while loop.step < 6:
    ...     driver.advance(loop)
    ...     model(torch.randn(4, 8)).square().mean().backward()
    ...     _ = optimizer.step()
    ...     loop.step += 1
    ...     driver.end_step(loop)
    ...     optimizer.zero_grad()
    >>> driver.finish(loop)
    >>> print(*driver.history)
    rank change at step 2: fraction 0.3333; adapter's rate × 1.41 from here (rank 4 → rank 2 in 1 layers)
    """

    def __init__(self, schedule: Schedule, *, measure: bool = False, rank_map: RankMap | None = None) -> None:
        # Triggers remember what they have observed, and the user may give the same stages to several runs.
        self.stages = [replace(stage, when=deepcopy(stage.when)) for stage in stages_of(schedule)]
        self.rules = read_rank_map(rank_map, RankBounds)
        self.measure = measure
        self.progress = Progress()
        self.logged = LoggedMetrics()
        self._run = Run(None)
        # What the rank of each layer may become, from start() on.
        self._bounds: Mapping[str, RankBounds] = {}
        # For each stage the step at which it acts at the latest; None: it has no deadline.
        self._planned: list[int | None] = []
        # None before start(), and when no remaining stage asks for it.
        self._importance: ImportanceSums | None = None
        self.lr_factor = 1.0
        # One for each optimizer, from start() to the end.
        self._rates: list[LearningRates] = []
        # What the param groups of each had in a checkpoint, until start() brings the optimizers.
        self._loaded_rates: list[list[SavedRate]] = []
        # As long as importance is measured.
        self._steps: MeasuredSteps | None = None
        # The last step for which end_step() was called.
        self._ended_step = 0
        # The importance in a checkpoint, kept until start() brings the layers.
        self._loaded: Mapping[str, Any] | None = None
        # What the checkpoint has otherwise: "schedule" or "rank_map"; None: nothing.
        self._differs: str | None = None
        # Whether a validation has shown that the metrics exist by which changes are judged.
        self._has_checked = False
        # Whether a state was loaded while a run was going on.
        self._was_put_back = False

    @property
    def history(self) -> History:
        """Every change of the run so far, and every attempt that was undone, also those before a resume."""
        return History(self.progress.history)

    @property
    def finished(self) -> bool:
        """Whether every stage is over."""
        return self.progress.stage >= len(self.stages)

    def unlogged_adapter_rates(self, training: Training) -> dict[str, float]:
        """{``lr/adapter``: the adapters' rate in the next step}, if it is not the rate of their param group.

        So it is after a change that has raised their rate, if the group also has other parameters or an unknown
        scheduler. Of several such groups each has a name with its number.
        """
        shown = [group["lr"] for optimizer in training.optimizers for group in optimizer.param_groups]
        used = [rate for rates in self._rates for rate in rates.of_next_step()]
        return _named({number: rate for number, rate in enumerate(used) if rate != shown[number]})

    def raised_adapter_rates(self, training: Training) -> dict[str, float]:
        """The same for the last step, whoever has set the rate of its group."""
        starts = accumulate((len(optimizer.param_groups) for optimizer in training.optimizers), initial=0)
        pairs = zip(starts, self._rates, strict=False)
        return _named({start + number: rate for start, rates in pairs for number, rate in rates.raised.items()})

    @property
    def _needs_importance(self) -> bool:
        """Whether a stage that is not over shares ranks by importance."""
        return shares_by_importance(self.stages[self.progress.stage :])

    @property
    def monitors(self) -> list[str]:
        """Names of the metrics that the schedule reads."""
        return sorted(observed_metrics(self.stages).keys() | checked_metrics(self.stages, measure=self.measure))

    @property
    def next_observed(self) -> Collection[str]:
        """Names of the metrics that the trigger of the next stage reads; none if that has no trigger or is decided."""
        trigger = self._next_trigger
        return () if trigger is None else trigger.monitors

    def check_model(self, model: nn.Module, run: Run) -> None:
        """Refuse a model that the schedule does not fit; see :func:`dynrank.driver.checks.check_model`."""
        check_model(model, self.stages, run, self.rules)

    def start(self, training: Training, run: Run) -> None:
        """Begin a run of length ``run``, or continue it if a state has been loaded."""
        if training.step == 0 and self._ended_step > 0:
            raise ConfigurationError(
                f"this schedule is at step {self._ended_step} of another run; make a new schedule with new stages for "
                "each run, or resume that run",
                "ckpt_path",
            )
        self._run = run
        self._ended_step = training.step
        self._planned = [stage.planned_step(run) for stage in self.stages]
        layers = dict(lora_layers(training.model))
        self._bounds = bounds_of(layers, self.rules)
        # The check needs the starting ranks, so a run that is resumed after a change skips it.
        if not self.history:
            self.check_model(training.model, run)
        check_training(training, self.stages, measure=self.measure)
        check_processes(training.model, training.optimizers, "at the start of training", training.group)
        # A model that was wrapped before its checkpoint was loaded may have other shapes than DDP knows.
        with new_reducers(training.ddp):
            pass
        if self._differs is not None:
            training.warn(f"the {self._differs} is not the checkpoint's: it applies from step {training.step} on")
        # Also without a checkpoint: a fit() that goes on has new optimizers.
        self._remove_hooks()
        adapters = adapter_parameters(training.model)
        for optimizer in training.optimizers if not self.history else ():
            begin_anew(optimizer)
        saved = chain(self._loaded_rates, repeat(()))
        self._rates = [
            LearningRates(optimizer, adapters, self.lr_factor, training, groups)
            for optimizer, groups in zip(training.optimizers, saved, strict=False)
        ]
        self._loaded_rates = []
        if not self._needs_importance:
            self._importance = None
        elif self._importance is None or not self._importance.is_of(layers):
            self._importance = training.importance_of(layers)
        else:
            self._importance.forget_last_update()
        if self._importance is not None:
            self._steps = training.steps_of(self._importance)
            if self._loaded is not None:
                self._importance.load_state_dict(self._loaded)
        self._loaded = None
        self._was_put_back = False

    def go_on(self, training: Training, run: Run | None = None) -> None:
        """Start again if a state was loaded within the run, as programs do that try something and put all back.

        ``run`` is the length if it has changed. Otherwise the times of stages stay, as epochs have corrected them.
        """
        if self._was_put_back:
            planned = self._planned
            self.start(training, run or self._run)
            self._planned = self._planned if run else planned

    def epoch_begins(self, epoch: int, step: int, length: int | None) -> None:
        """Correct the times in epochs of stages to come, because epochs may differ in length.

        ``epoch`` is the number of epochs that have ended, ``step`` that of optimizer steps, and ``length`` the number
        of steps in the epoch that begins now; None: unknown.
        """
        for index in range(self.progress.stage, len(self.stages)):
            when = self.stages[index].when
            if length is not None and isinstance(when, At) and when.epoch is not None:
                self._planned[index] = step + max(0, when.epoch - epoch) * length

    def advance(self, training: Training) -> None:
        """Decide a stage that is due by time, and make the change that is decided, by time or by a trigger."""
        self.go_on(training)
        # A loop that calls end_step before it counts the step is one step behind.
        if self._steps is not None and self._steps.missed:
            raise ConfigurationError(
                f"the importance of layers is measured by each step, and end_step was not called for the last "
                f"{self._steps.missed}: call driver.end_step(training) after each step, when training.step is "
                "raised and before zero_grad"
            )
        self._follow_clock(training)
        if self.progress.pending is None:
            return
        event = self._change(training, self.progress.pending)
        if event is not None and not event.undone:
            warn_of_low_rate(training)

    def end_step(self, training: Training) -> None:
        """Measure importance by the optimizer step just made, if there is a new one; its gradients must still exist."""
        if training.step > self._ended_step:
            self._ended_step = training.step
            if self._steps is not None:
                self._steps.end_step()

    def validated(self, training: Training, metrics: Mapping[str, float]) -> None:
        """Take the metrics of a validation of the present weights, and pass them to the trigger of the next stage.

        In a run without validation, call it with no metrics after each epoch: triggers then read training's metrics.
        """
        self.go_on(training)
        metrics = numbers_in(metrics)
        # A resumed loop may report the same validation twice.
        is_known = training.step == self.progress.observed_step
        self.progress.observed_step = training.step
        if metrics and not self._has_checked:
            self._check_metrics(training, metrics)
            self._has_checked = True
        self.logged.log({**training.logged(), **metrics})
        trigger = self._next_trigger
        if trigger is not None and not is_known:
            self._observe(training, trigger, metrics)
        # They are new in this validation alone.
        self.logged.read(metrics)

    def _observe(self, training: Training, trigger: Trigger, metrics: Mapping[str, float]) -> None:
        """Let ``trigger`` read what is new; ``metrics`` are those of the validation.

        It waits for metrics of training that are of ranks before the last change, or come later.
        """
        logged = self.logged.values()
        of_training = [name for name in trigger.monitors if name not in metrics]
        waiting = {name for name in of_training if name not in logged and training.logs_later(name)}
        waiting.update(name for name in of_training if self.logged.is_of_before(name))
        observed = observed_metrics(self.stages)
        group = training.group
        known = [name for name in trigger.monitors if name not in waiting]
        values = [metric_value(logged, name, observed, group, training.log_by) for name in known]
        is_new = len(of_training) < len(trigger.monitors) or all(map(self.logged.is_new, of_training))
        if is_new and not waiting:
            self.logged.read(trigger.monitors)
            fires = trigger.observe(training.step, *values)
            reason = trigger.reason
            for name in trigger.monitors:
                reason = reason.replace(name, training.own_name(name, logged))
            self._decide(training, fires, reason)

    @property
    def _checked(self) -> dict[str, str]:
        """The metrics by which changes to come are judged, and what names them."""
        return checked_metrics(self.stages[self.progress.stage :], measure=self.measure)

    def _check_metrics(self, training: Training, metrics: Mapping[str, float]) -> None:
        """Refuse a schedule whose changes are judged by a metric that the first validation, of ``metrics``, lacks.

        A validation for a change may have more than that, so it decides.
        """
        checked = self._checked
        absent = sorted(checked.keys() - metrics.keys())
        found = validate(training) if absent and not training.validates_alike else metrics
        for name in absent:
            metric_value(found, name, checked, training.group)

    def finish(self, training: Training) -> None:
        """Make the change that is due after the last step, and warn if stages were not reached."""
        self.go_on(training)
        self._follow_clock(training, ended=True)
        pending = self.progress.pending
        if pending is not None:
            self._change(training, pending)
        self._remove_hooks()
        if not self.finished:
            training.warn(
                f"training ended before stage {self.progress.stage + 1} of the rank schedule, so ranks are not final: "
                f"no {self.stages[self.progress.stage].when.reason}; set deadline or train longer"
            )

    def abort(self) -> None:
        """Remove the hooks on the optimizers, after an error."""
        self._remove_hooks()

    def reset(self) -> None:
        """Forget the run, so that the schedule can begin again with another model; hooks on its optimizers go."""
        self._remove_hooks()
        for stage in self.stages:
            if isinstance(stage.when, Trigger):
                stage.when.reset()
        self.progress = Progress()
        self.logged = LoggedMetrics()
        self.lr_factor = 1.0
        self._importance = None
        self._ended_step = 0
        self._loaded = None
        self._loaded_rates = []
        self._differs = None
        self._was_put_back = False

    def count_anew(self) -> None:
        """Let the run begin again at step 0 with the present model; the changes that were made stay."""
        self.progress = replace(self.progress, pending=None, observed_step=None)
        self._ended_step = 0

    def state_dict(self) -> dict[str, Any]:
        """Plain containers and tensors only, so that a checkpoint loads with ``weights_only=True``."""
        importance = self._importance.state_dict() if self._importance is not None else self._loaded
        return {
            **asdict(self.progress),
            "stages": as_texts(self.stages),
            "rank_map": self._rules_as_texts,
            "triggers": [s.when.state_dict() if isinstance(s.when, Trigger) else None for s in self.stages],
            "importance": importance,
            "logged": self.logged.state_dict(),
            "lr_factor": self.lr_factor,
            "rates": [rates.of_groups() for rates in self._rates] or self._loaded_rates,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what :meth:`state_dict` returned, before :meth:`start` or, with model and optimizers, within the run.

        Stages that are not over may differ from the checkpoint's; those of this schedule apply. So does the rank map,
        as long as no stage is over.
        """
        absent = sorted({*self.state_dict()} - state.keys())
        if absent:
            raise ConfigurationError(
                f"the checkpoint has no {', '.join(absent)} of a rank schedule, so another version of dynrank has made "
                "it; resume with that version, or begin a new run",
                "ckpt_path",
            )
        mine = as_texts(self.stages)
        theirs = [tuple(stage) for stage in state["stages"]]
        my_rules = self._rules_as_texts
        their_rules = [tuple(rule) for rule in state["rank_map"]]
        # Stages that are over must have the same target; their times no longer matter.
        done, wanted = ([to for _, to, _ in stages[: state["stage"]]] for stages in (theirs, mine))
        if done != wanted:
            raise ConfigurationError(
                f"the checkpoint was made under another schedule: its first stages went to {', '.join(done)}, here "
                f"they go to {', '.join(wanted) or 'nothing'}; give the schedule as it was, of which only later stages "
                "may differ",
                "schedule",
            )
        if done and their_rules != my_rules:
            raise ConfigurationError(
                f"the checkpoint was made under another rank_map: its first stages went by {_in_words(their_rules)}, "
                f"here they go by {_in_words(my_rules)}; give the rank_map as it was",
                "rank_map",
            )
        progress = read_as(Progress, {part.name: state[part.name] for part in fields(Progress)}, "the checkpoint")
        # A program may load a state twice before it goes on.
        is_running = bool(self._rates) or self._was_put_back
        self.reset()
        self._was_put_back = is_running
        self.progress = progress
        self.logged.load_state_dict(state["logged"])
        self._differs = "schedule" if theirs != mine else "rank_map" if their_rules != my_rules else None
        for stage, now, before, saved in zip(self.stages, mine, theirs, state["triggers"], strict=False):
            if isinstance(stage.when, Trigger) and saved is not None and now[0] == before[0]:
                stage.when.load_state_dict(saved)
        # A decision stays if its stage has the same time or trigger.
        present = dict(enumerate(mine))
        pending = self.progress.pending
        if pending is not None and present.get(pending.stage, ("",))[0] != theirs[pending.stage][0]:
            self.progress.pending = None
        self.lr_factor = float(state["lr_factor"])
        self._loaded_rates = [[*map(tuple, groups)] for groups in state["rates"]]
        self._loaded = state["importance"]

    @property
    def _rules_as_texts(self) -> list[tuple[str, str]]:
        """(pattern, what it says) of each rule of the rank map, in its order, for a checkpoint."""
        return [(key, described(rule)) for key, rule in self.rules.items()]

    # Deciding

    @property
    def _next_trigger(self) -> Trigger | None:
        """The trigger of the next stage, if no change is pending."""
        when = None if self.finished or self.progress.pending else self.stages[self.progress.stage].when
        return when if isinstance(when, Trigger) else None

    def _decide(self, training: Training, fires: bool, reason: str) -> None:
        """Decide the change of the next stage, if its trigger fires in process 0, for this ``reason``."""
        if from_first(lambda: fires, training.group):
            self.progress.pending = Decision(self.progress.stage, reason)

    def _follow_clock(self, training: Training, *, ended: bool = False) -> None:
        """Decide the last stage that is due by time, which replaces those before it.

        ``ended``: training is over, perhaps before its planned end.
        """
        first = self.progress.stage if self.progress.pending is None else self.progress.pending.stage + 1
        for index in reversed(range(first, len(self.stages))):
            stage = self.stages[index]
            # The run may be longer than it was thought to be.
            is_last = stage.when == At(fraction=1.0)
            planned = None if is_last else self._planned[index]
            if (planned is not None and planned <= training.step) or (ended and is_last):
                is_time = isinstance(stage.when, At)
                reason = stage.when.reason if is_time else f"deadline at {stage.deadline:.3g} of the run"
                self.progress.pending = Decision(index, reason)
                return

    # Acting

    def _change(self, training: Training, decided: Decision) -> RankEvent | None:
        """Make the decided change, or undo it by its check, and end its stage; None: no layer gets new factors."""
        with training.gathered():
            return self._change_gathered(training, decided)

    def _change_gathered(self, training: Training, decided: Decision) -> RankEvent | None:
        """As :meth:`_change`, where the factors have their values."""
        index = decided.stage
        stage = self.stages[index]
        layers = dict(lora_layers(training.model))
        # Only of the layers that may change: a pinned one is not decomposed, and its factors may even be not finite.
        directions = LayerDirections({name: layer for name, layer in layers.items() if not self._bounds[name].pinned})
        # Process 0 computes the change, so afterwards nobody could see that processes had differed.
        when = f"before the change of rank at step {training.step}"
        check_processes(training.model, training.optimizers, when, training.group)
        # The same in all processes, because gradients are; process 0 decides all the same.
        importance = self._importance.of_layers() if self._importance is not None else {}
        # The importance of an update needs the gradients of the step after it.
        if "importance" in stage.to.needs and training.step >= 2:
            self._warn_of_unknown(training, layers)
        last = index == len(self.stages) - 1
        due = DueStage(stage, last, decided.reason, layers, self._bounds, directions, importance)
        event = None
        history = self.progress.history
        try:
            if stage.how.max_regression is None:
                change = self._compute(training, due)
                event = due.event(training.step, change.reports, due.reason) if change.reports else None
                measurement = self._validate_before_if_measured(training, stage) if event is not None else None
                # So far nothing has changed. No interrupt may separate the change from the updates that belong to it.
                with uninterrupted():
                    if event is not None:
                        apply_change(training, change)
                    self._end_stage(training, index, event)
                if event is not None and measurement is not None:
                    history[-1] = event = replace(event, measured=measurement.measure())
                    measurement.record()
            else:
                undo = Undo(training)
                # Twice, because Ctrl-C may interrupt the first exit.
                with undo, undo:
                    if stage.search:
                        event = cut_to_smallest(training, undo, due, self._parameters_at_start(training))
                    else:
                        event = self._try(training, undo, due)
                    with uninterrupted():
                        undo.keep()
                        self._end_stage(training, index, event)
        finally:
            # Also if Ctrl-C was pressed during the change, or its measurement has failed.
            if event is not None and history and history[-1] is event:
                training.tell(event)
        return event

    def _warn_of_unknown(self, training: Training, layers: Mapping[str, RankedLayer]) -> None:
        """Warn if there is no importance of some of the ``layers`` that share ranks by it, or of any."""
        assert self._importance is not None
        free = {name for name, layer in layers.items() if not keeps_rank(layer, self._bounds[name])}
        unknown = [name for name in self._importance.unmeasured() if name in free]
        if unknown and len(unknown) == len(free):
            training.warn(
                f"the change of rank at step {training.step} shares ranks by importance, and nothing is known of any "
                "layer, so all layers count alike: no gradients of the adapters were there when a step ended"
            )
        elif unknown:
            training.warn(
                f"{unknown[0]!r} and {len(unknown) - 1} other layers had no gradients before the change of rank at "
                f"step {training.step}, so they count as unimportant. If a module reads their weights without calling "
                "them, their LoRA does nothing: leave them out of target_modules"
            )

    def _compute(self, training: Training, due: DueStage) -> Change:
        """The change to the ranks that the stage's target gives for the present state of the layers; not yet made."""
        return compute_change(training, due.ranks, due.directions, due.stage.how)

    def _try(self, training: Training, undo: Undo, due: DueStage) -> RankEvent | None:
        """Make the change of ``due``, and undo it if it costs too much; None if no layer gets new factors."""
        change = self._compute(training, due)
        if not change.reports:
            return None
        test = RegressionTest(training, due.stage.how)
        with uninterrupted():
            apply_change(training, change)
        measured = test.measure()
        if not test.allows(measured.after):
            undo.restore()
            reason = f"{UNDONE}{measured} ({due.reason})"
            return due.event(training.step, change.reports, reason, measured, undone=True)
        test.record()
        return due.event(training.step, change.reports, due.reason, measured)

    def _validate_before_if_measured(self, training: Training, stage: Stage) -> RegressionTest | None:
        """The measurement of a change that nothing checks; None: not wanted, or it would take too long."""
        batches = batches_to_measure(training, len(self.stages), self._run) if self.measure else 0
        return None if batches == 0 else RegressionTest(training, stage.how, batches)

    def _end_stage(self, training: Training, index: int, event: RankEvent | None) -> None:
        """Go to the stage after ``index``, whose change was made, undone, or (None) gave no layer new factors.

        Later triggers begin anew. The event enters the history. After a change that was made and kept, importance
        forgets the last update, what was logged is of before, and the adapters' learning rates follow.
        """
        self.progress.pending = None
        self.progress.stage = index + 1
        for later in self.stages[index + 1 :]:
            if isinstance(later.when, Trigger):
                later.when.reset()
        if event is not None:
            self.progress.history.append(event)
        if not self._needs_importance:
            self._importance = None
            self._stop_watching()
        if event is not None and not event.undone:
            if self._importance is not None:
                self._importance.forget_last_update()
            self.logged.changed(lowers=event.lowers)
            self.lr_factor *= event.lr_factor
            for rates in self._rates:
                rates.multiply(event.lr_factor)
            # A trainer's schedulers are not in this list: its callback decides by ``keep_best_before``.
            if event.lowers and training.schedulers:
                forget_plateau(training.schedulers)

    def _parameters_at_start(self, training: Training) -> int:
        """How many parameters the adapters had when the run began."""
        saved = sum(layer.parameters_saved for event in self.history if not event.undone for layer in event.layers)
        return saved + sum(layer.rank * layer.params_per_rank for _, layer in lora_layers(training.model))

    def _remove_hooks(self) -> None:
        # A checkpoint of after the end, or after an error, may be trained on.
        if self._rates:
            self._loaded_rates = [rates.of_groups() for rates in self._rates]
        for rates in self._rates:
            rates.remove()
        self._rates = []
        self._stop_watching()

    def _stop_watching(self) -> None:
        """Remove the hooks by which importance knows of steps."""
        if self._steps is not None:
            self._steps.remove()
        self._steps = None


def _named(hidden: Mapping[int, Any]) -> dict[str, float]:
    """{the name of a rate that is logged: the rate}, of {number of a param group: the rate of its adapters}."""
    return {"lr/adapter" if len(hidden) == 1 else f"lr/adapter/{n}": float(rate) for n, rate in hidden.items()}


def _in_words(rules: Sequence[tuple[str, ...]]) -> str:
    return ", ".join(f"{key!r}: {rule}" for key, rule in rules) or "none"
