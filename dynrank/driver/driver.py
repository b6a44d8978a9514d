"""Carrying out a schedule in a run, with any trainer: which stage is due, whether it can act, and its change."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any, TypeAlias

from torch import nn

from dynrank.change.choice import Choice
from dynrank.change.replacement import uninterrupted
from dynrank.distributed.agreement import check_processes
from dynrank.distributed.processes import from_first
from dynrank.driver.attempt import Check, Trial, attempt
from dynrank.driver.bisection import cut_to_smallest
from dynrank.driver.bounds import layer_states
from dynrank.driver.check import check_model, check_training
from dynrank.driver.clock import Clock
from dynrank.driver.event import RankEvent
from dynrank.driver.metrics import checked, value, watched
from dynrank.driver.rates import Rates, rate_factor, warn_of_low_rate
from dynrank.driver.training import Training
from dynrank.driver.window import Window
from dynrank.errors import ConfigurationError, read_as
from dynrank.layers.base import RankedLayer, width_of
from dynrank.layers.choosing import warn_of_pefts_frozen
from dynrank.layers.finding import adapter_parameters, lora_layers
from dynrank.schedules import Stage, early_budget
from dynrank.targets import Smallest
from dynrank.triggers import At, Run, Trigger

# A function that returns stages, such as a preset, is a schedule too: LightningCLI builds these from YAML.
Schedule: TypeAlias = int | Stage | Sequence[Stage] | Callable[[], Sequence[Stage]]


@dataclass(frozen=True)
class Decision:
    """A change that is decided but not yet made."""

    stage: int
    reason: str


@dataclass
class Progress:
    """The progress of a schedule in a run, as a checkpoint stores it.

    Attributes:
        stage: index of the first stage that is not over.
        pending: the decided change that is not yet made; None if nothing is decided.
        history: every change, and every attempt that was undone.
        observed_step: step of the last validation.
        metrics: metrics of that validation; empty after a change, because they describe the weights before it.
    """

    stage: int = 0
    pending: Decision | None = None
    history: list[RankEvent] = field(default_factory=list)
    observed_step: int | None = None
    metrics: dict[str, float] = field(default_factory=dict)


class RankDriver:
    """A schedule in one run. The training loop calls, in this order:

    - :meth:`start` once, after :meth:`load_state_dict` if the run is resumed;
    - :meth:`advance` before the first forward of a step, with no gradients pending: ranks change here;
    - :meth:`end_step` after the optimizer's step, while its gradients are still there;
    - :meth:`validated` after a validation;
    - :meth:`finish` after the last step, or :meth:`abort` after an exception.

    Arguments and errors are those of :class:`dynrank.callbacks.RankScheduler`.

    Attributes:
        stages: the stages of the schedule.
        progress: which stages are over, and what is pending.
    """

    def __init__(self, schedule: Schedule, *, check_every: int | None = None) -> None:
        if check_every is not None and (not isinstance(check_every, int) or check_every < 1):
            raise ConfigurationError(f"check_every must be None or at least 1 step, got {check_every!r}")
        self.stages, self.check_every = _stages_of(schedule), check_every
        self.progress = Progress()
        self._run = Run(None)
        self._clock, self._window = Clock([], self._run), Window([])
        # One for each optimizer, made at the last change.
        self._rates: list[Rates] = []
        # The last step for which end_step() was called.
        self._ended_step = 0
        # The state of a checkpoint is kept here until start(), which brings the layers and optimizers.
        self._loaded: Mapping[str, Any] = {}
        # Whether the checkpoint was made under another schedule.
        self._other = False

    @property
    def history(self) -> list[RankEvent]:
        """Every change of the run, also those before a resume."""
        return self.progress.history

    @property
    def finished(self) -> bool:
        """Whether every stage is over."""
        return self.progress.stage >= len(self.stages)

    @property
    def rate_factor(self) -> float:
        """Factor of the adapters' learning rates since the last change."""
        return self._rates[0].factor if self._rates else 1.0

    def rates(self, training: Training) -> list[list[float]]:
        """The learning rate of the next step, for each optimizer of ``training`` and each of its param groups."""
        if self._rates:
            return [rates.of_next_step() for rates in self._rates]
        return [[float(group["lr"]) for group in optimizer.param_groups] for optimizer in training.optimizers]

    @property
    def monitors(self) -> list[str]:
        """Names of the metrics that the schedule reads."""
        return sorted(watched(self.stages).keys() | checked(self.stages))

    def check_model(self, model: nn.Module, run: Run) -> None:
        """Refuse a model that the schedule does not fit; see :func:`dynrank.driver.check.check_model`."""
        check_model(model, self.stages, run)

    def start(self, training: Training, run: Run) -> None:
        """Begin a run of length ``run``, or continue it if a state has been loaded."""
        if training.step == 0 and self._ended_step > 0:
            raise ConfigurationError(
                f"this schedule is at step {self._ended_step} of another run; make a new schedule with new stages for "
                "each run, or resume that run (ckpt_path)"
            )
        self._run, self._ended_step = run, training.step
        self._clock, self._window = Clock(self.stages, run), Window(self.stages)
        # The check needs the starting ranks, so a run that is resumed after a change skips it.
        if not self.history:
            self.check_model(training.model, run)
            warn_of_pefts_frozen(training.model)
        check_training(training, self.stages)
        check_processes(training.model, training.optimizers, "at the start of training")
        if self._other:
            training.warn(f"the schedule is not the checkpoint's: it applies from step {training.step} on")
        if self._loaded:
            self._multiply_rates(training, self._loaded["rate_factor"])
            self._window.load_state_dict(self._loaded["gates"], training.model)
            self._loaded = {}

    def advance(self, training: Training) -> None:
        """Decide which stage is due, begin to measure gates for the next one, and change ranks if all is ready."""
        self._follow_clock(training)
        pending = self.progress.pending
        if pending is not None and self._is_ready(training, pending.stage):
            self._change(training, pending)
            # Gates for the next stage may be needed from this step on.
            self._follow_clock(training)
        if self._window.gates is not None:
            self._window.gates.loss_scale = training.loss_scale()

    def end_step(self, training: Training) -> None:
        """Record the optimizer step just made, if one was made since the last call; its gradients must still exist."""
        if training.step > self._ended_step:
            self._ended_step = training.step
            if self._window.gates is not None:
                self._window.gates.end_step()
            if self.check_every and training.step % self.check_every == 0:
                check_processes(training.model, training.optimizers, f"after step {training.step}")

    def validated(self, training: Training, metrics: Mapping[str, float]) -> None:
        """Take the metrics of a validation of the present weights, and pass them to the trigger of the next stage.

        In a run without validation, call it with no metrics after each epoch: triggers then read training's metrics.
        """
        # A resumed loop may report the same validation twice.
        seen = training.step == self.progress.observed_step
        self.progress.observed_step = training.step
        self.progress.metrics = {name: float(metric) for name, metric in metrics.items()}
        trigger = self._next_trigger
        if trigger is not None and not seen:
            logged, names = {**training.logged(), **self.progress.metrics}, watched(self.stages)
            self._decide(trigger.observe(training.step, *(value(logged, name, names) for name in trigger.monitors)))

    def finish(self, training: Training) -> None:
        """Make the change that is due after the last step, and warn if stages were not reached."""
        self._follow_clock(training, ended=True)
        pending = self.progress.pending
        if pending is not None:
            self._change(training, pending)
        self._window.end()
        if not self.finished:
            training.warn(
                f"training ended before stage {self.progress.stage + 1} of the rank schedule, so ranks are not final: "
                f"no {self.stages[self.progress.stage].when.reason}; set schedule.deadline or train longer"
            )

    def forget_gates(self) -> None:
        """Drop the measured gates; call it after other weights were loaded, which the gates do not describe."""
        self._window.end()

    def abort(self) -> None:
        """Remove the hooks from the layers and restore the rates, after an error; a checkpoint still gets the gates."""
        if self._window.gates is not None:
            self._window.gates.close()
        for rates in self._rates:
            rates.restore()

    def state_dict(self) -> dict[str, Any]:
        """Plain containers and tensors only, so that a checkpoint loads with ``weights_only=True``."""
        return {
            **asdict(self.progress),
            "stages": _as_texts(self.stages),
            "triggers": [s.when.state_dict() if isinstance(s.when, Trigger) else None for s in self.stages],
            "gates": self._window.state_dict(),
            "rate_factor": self.rate_factor,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what :meth:`state_dict` returned; call it before :meth:`start`.

        Stages that are not over may differ from the checkpoint's; those of this schedule apply.
        """
        mine, theirs = _as_texts(self.stages), [tuple(stage) for stage in state["stages"]]
        over, self._other = state["stage"], theirs != mine
        # Stages that are over must have the same target; their times no longer matter.
        done, wanted = ([to for _, to, _ in stages[:over]] for stages in (theirs, mine))
        if done != wanted:
            raise ConfigurationError(
                f"the checkpoint was made under another schedule: its first stages went to {', '.join(done)}, here "
                f"they go to {', '.join(wanted) or 'nothing'}; set schedule as it was; only later stages may differ"
            )
        for stage, now, before, saved in zip(self.stages, mine, theirs, state["triggers"], strict=False):
            if isinstance(stage.when, Trigger) and saved is not None and now[0] == before[0]:
                stage.when.load_state_dict(saved)
        self.progress = read_as(Progress, {part.name: state[part.name] for part in fields(Progress)}, "ckpt_path")
        pending, gates = self.progress.pending, state["gates"]
        # A decision stays if its stage has the same time or trigger, gates if theirs is the same stage.
        present = dict(enumerate(mine))
        if pending is not None and present.get(pending.stage, ("",))[0] != theirs[pending.stage][0]:
            self.progress.pending = None
        if gates is not None and present.get(gates["stage"]) != theirs[gates["stage"]]:
            gates = None
        self._remove_rates()
        self._loaded, self._ended_step = {"rate_factor": state["rate_factor"], "gates": gates}, 0

    # Deciding

    @property
    def _next_trigger(self) -> Trigger | None:
        """The trigger of the next stage, if no change is pending."""
        when = None if self.finished or self.progress.pending else self.stages[self.progress.stage].when
        return when if isinstance(when, Trigger) else None

    def _decide(self, fires: bool) -> None:
        """Decide the change of the next stage, if its trigger fires in process 0."""
        if from_first(lambda: fires):
            stage = self.progress.stage
            self.progress.pending = Decision(stage, self.stages[stage].when.reason)

    def _follow_clock(self, training: Training, *, ended: bool = False) -> None:
        """Decide the stage that is due by time, and begin to measure gates for a stage whose time is near."""
        due = self._clock.due(self.progress.stage, training.step, ended=ended)
        if due is not None and (self.progress.pending is None or self.progress.pending.stage < due):
            when, deadline = self.stages[due].when, self.stages[due].deadline
            reason = when.reason if isinstance(when, At) else f"deadline at {deadline:.3g} of the run"
            self.progress.pending = Decision(due, reason)
        if self.progress.pending is None and not ended:
            for index, planned in self._clock.coming(self.progress.stage, training.step):
                if self._window.gates is None and planned - self.stages[index].how.window <= training.step:
                    self._window.begin(training.model, index)

    def _is_ready(self, training: Training, index: int) -> bool:
        """Whether the gates for a change of stage ``index`` are complete; begin to measure them if needed."""
        if not self._window.needed(training.model, index):
            return True
        if self._window.gates is None:
            self._window.begin(training.model, index)
        # The gates may have been begun for another stage, so the steps are counted against this stage's window.
        gates, window = self._window.gates, self.stages[index].how.window
        assert gates is not None
        if self._clock.is_last_moment(index, training.step, window):
            return True
        return (gates.steps >= window or self._clock.has_come(index, training.step)) and gates.enough

    # Acting

    def _change(self, training: Training, decided: Decision) -> None:
        """Make the decided change, or as much of it as the check allows, and go to the next stage."""
        index, how = decided.stage, self.stages[decided.stage].how
        gates, reason = self._window.result(training, index, decided.reason)
        layers = dict(lora_layers(training.model))
        ranks = {name: layer.rank for name, layer in layers.items()}
        choice = gates or Choice({name: layer for name, layer in layers.items() if not layer.pinned})
        trial = Trial(training)
        with trial, trial:
            event = self._attempt(training, trial, layers, index, reason, choice)
            # No interrupt may separate the change from the updates that belong to it.
            with uninterrupted():
                trial.keep()
                self.progress.pending, self.progress.stage = None, index + 1
                for later in self.stages[index + 1 :]:
                    if isinstance(later.when, Trigger):
                        later.when.reset(training.step)
                if event is not None:
                    self.history.append(event)
                made = event is not None and not event.undone
                if made:
                    # These metrics belong to the weights before the change.
                    self.progress.metrics = {}
                    self._multiply_rates(training, rate_factor(how, ranks, {n: la.rank for n, la in layers.items()}))
        if event is not None:
            training.tell(event)
        if made and training.step < (self._run.total_steps or float("inf")):
            warn_of_low_rate(training)

    def _attempt(
        self,
        training: Training,
        trial: Trial,
        layers: Mapping[str, RankedLayer],
        index: int,
        reason: str,
        choice: Choice,
    ) -> RankEvent | None:
        """Make the change of stage ``index``, as far as its check allows; None if no rank would change."""
        stage, last = self.stages[index], index == len(self.stages) - 1
        target, how = stage.to, stage.how

        def plan() -> tuple[dict[str, int], list[tuple[str, int]]]:
            states = layer_states(layers, last=last, target=target, choice=choice)
            return target.ranks(states), target.order(states) if isinstance(target, Smallest) else []

        wanted, order = from_first(plan)
        targets = {name: rank for name, rank in wanted.items() if rank != layers[name].rank}
        if not targets:
            return None
        if isinstance(target, Smallest):
            saved = sum(layer.parameters_saved for e in self.history if not e.undone for layer in e.layers)
            began_with = saved + sum(layer.rank * width_of(layer) for layer in layers.values())
            return cut_to_smallest(training, trial, order, targets, reason, how, choice, began_with)
        check = None
        if how.max_regression is not None:
            known = self.progress.metrics if self.progress.observed_step == training.step else {}
            check = Check(training, how, known or None)
        return attempt(training, trial, targets, reason, how, choice, check)

    def _multiply_rates(self, training: Training, factor: float) -> None:
        """Multiply the adapters' rates by ``factor`` from now on."""
        factor *= self.rate_factor
        self._remove_rates()
        adapters = adapter_parameters(training.model)
        self._rates = [Rates(optimizer, adapters, factor) for optimizer in training.optimizers]

    def _remove_rates(self) -> None:
        for rates in self._rates:
            rates.remove()
        self._rates = []


def _as_texts(stages: Sequence[Stage]) -> list[tuple[str, str, str]]:
    """For each stage, as text: (when, to what, the whole stage with the user's values)."""

    def words(value: object) -> str:
        if not is_dataclass(value):
            return repr(value)
        return f"{type(value).__name__}({', '.join(words(getattr(value, f.name)) for f in fields(value) if f.init)})"

    return [(words(stage.when), words(stage.to), words(stage)) for stage in stages]


def _stages_of(schedule: object) -> list[Stage]:
    """The stages of any value that type ``Schedule`` allows."""
    if callable(schedule):
        schedule = schedule()
    if isinstance(schedule, int) and not isinstance(schedule, bool):
        return early_budget(schedule)
    if isinstance(schedule, Stage):
        return [schedule]
    if isinstance(schedule, list | tuple) and all(isinstance(stage, Stage) for stage in schedule):
        return list(schedule)
    made = "a rank, a stage or a list of stages, which early_budget(4) or auto() of dynrank.schedules make"
    raise ConfigurationError(f"a schedule must be {made}, got {schedule!r}; set schedule")
