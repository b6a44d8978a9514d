"""Taking a schedule through a run, whoever trains: when a change is due, what must be measured for it, making it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from dynrank.change.measuring import Window
from dynrank.distributed.agreement import check_processes
from dynrank.distributed.processes import from_first, mean_over_processes
from dynrank.driver.attempt import RankEvent, Training, change_ranks
from dynrank.driver.bounds import check_model, final_ranks, layer_states, needs_of
from dynrank.driver.rewarmup import Rewarmup
from dynrank.errors import ConfigurationError
from dynrank.layers.finding import lora_layers
from dynrank.schedules import How, RankFunction, Stage, after_convergence, from_function
from dynrank.triggers import At, Run, Trigger

LOW_RATE = 0.1  # below this share of the starting learning rate, a drop has little left to recover with


@dataclass(frozen=True)
class _Decision:
    """A change that has been decided and is still to be made."""

    stage: int
    reason: str


class RankDriver:
    """The state of a schedule in a run, and the decisions; a trainer's callback calls its methods.

    In this order: :meth:`start`; :meth:`resume` before the first step; :meth:`advance` between an optimizer step and
    the next forward, with no gradients pending; :meth:`end_step` after each optimizer step, while its gradients are
    still there; :meth:`validated` after each validation, or :meth:`observe` where nothing is validated; :meth:`finish`
    or :meth:`abort`.

    Arguments, attributes and errors are those of :class:`dynrank.callbacks.RankScheduler`.
    """

    def __init__(
        self,
        schedule: int | Stage | Sequence[Stage] | RankFunction,
        how: How | None = None,
        *,
        check_every: int | None = None,
    ) -> None:
        if check_every is not None and (not isinstance(check_every, int) or check_every < 1):
            raise ConfigurationError(
                f"check_every must be null or at least 1 step, got {check_every!r}; set check_processes_every"
            )
        self.how, self.check_every = how or How(), check_every
        self._function: RankFunction | None = None
        self.stages: list[Stage] = []
        if isinstance(schedule, int) and not isinstance(schedule, bool):
            self.stages = after_convergence(schedule)
        elif isinstance(schedule, Stage):
            self.stages = [schedule]
        elif isinstance(schedule, Sequence) and all(isinstance(stage, Stage) for stage in schedule):
            self.stages = list(schedule)
        elif callable(schedule):
            self._function = schedule
        else:
            raise ConfigurationError(
                f"a schedule must be a rank, stages, or a function from step to rank, got {schedule!r}; set schedule"
            )
        self.history: list[RankEvent] = []
        self._run = Run(None)
        self._at = 0  # index of the stage that comes next
        self._pending: _Decision | None = None
        self._window: Window | None = None
        self._window_stage = -1
        self._observed_step = self._looked_step = self._seen_step = -1
        self._checking = False
        self._validated_step, self._validation = -1, dict[str, float]()  # what the last validation has logged
        self._ramps: list[Rewarmup] = []  # of each optimizer
        self._resumed: dict[str, Any] = {}  # what a checkpoint holds of things that are made when training starts

    @property
    def finished(self) -> bool:
        """Whether every stage is over."""
        return self._at >= len(self.stages)

    @property
    def monitors(self) -> list[str]:
        """Names of the metrics that the schedule reads."""
        names = [name for stage in self.stages if isinstance(stage.when, Trigger) for name in stage.when.monitors]
        names += [how.check_monitor for how in map(self._how, self.stages) if how.max_regression is not None]
        return sorted(set(names))

    @property
    def hows(self) -> set[How]:
        """Every way in which the schedule changes ranks."""
        return {self._how(stage) for stage in self.stages}

    @property
    def counts_epochs(self) -> bool:
        """Whether the schedule needs to know how long an epoch is."""
        return any(isinstance(stage.when, At) and stage.when.epoch is not None for stage in self.stages)

    def final_ranks(self, model: nn.Module) -> dict[str, tuple[int, int]]:
        """{layer: (lowest, highest) rank that it may end at}; the two are equal unless the data decide."""
        return final_ranks(model, self.stages)

    def check_model(self, model: nn.Module, run: Run | None = None) -> None:
        """Refuse a model that the schedule cannot be carried out on; see :func:`dynrank.driver.bounds.check_model`."""
        check_model(model, self.stages, self.how, run or Run(None))

    def start(self, training: Training, run: Run, *, resumes_later: bool = False) -> None:
        """Take a run of this length, at its start or where it is resumed; the state of that may come later.

        Raises:
            ConfigurationError: if the schedule cannot be carried out in it.
        """
        if self._seen_step > 0 and training.step == 0 and not self._resumed and not resumes_later:
            raise ConfigurationError(
                f"this {type(self).__name__} is at step {self._seen_step} of another run; make a new one, of new "
                "stages, for each run, or resume that one (ckpt_path)"
            )
        self._run = run
        if self._function is not None:
            if run.total_steps is None:
                raise ConfigurationError("a function of the step needs a run of known length; set trainer.max_steps")
            self.stages = from_function(self._function, run.total_steps)
        for stage in self.stages:
            stage.planned_step(run)  # raises if the run's length is needed and nobody knows it
        if not self.history:  # what was checked at the start still holds on resume, at other ranks
            self.check_model(training.model, run)

    def resume(self, training: Training) -> bool:
        """Open again what was open when the checkpoint was made; whether its step had been observed."""
        self._seen_step = training.step
        check_processes(training.model, training.optimizers, "at the start of training")
        ramps = self._resumed.get("ramps", ())
        self._ramps = [Rewarmup(o, *ramp) for o, ramp in zip(training.optimizers, ramps, strict=bool(ramps))]
        if self._resumed.get("window") is not None:
            self._open_window(training.model, self._window_stage)
            assert self._window is not None
            self._window.load_state_dict(self._resumed["window"])
        self._resumed = {}
        return self._observed_step == training.step

    def validated(self, training: Training, metrics: dict[str, float]) -> None:
        """Take what a validation has logged; one that checks a change is not shown to the triggers."""
        self._validated_step, self._validation = training.step, metrics
        if not self._checking:
            self.observe(training)

    def advance(self, training: Training) -> None:
        """Decide what is due, begin to measure for what will be, and change ranks if everything is there for it."""
        if self.finished:
            return
        self._look(training)
        self._follow_clock(training)
        if self._pending and self._measured(training):
            self._change(training)
            if not self.finished:
                self._follow_clock(training)  # the next stage may have to be measured from this step on

    def end_step(self, training: Training) -> None:
        """Take in the optimizer step just made, if there was one since the last call; gradients must still be there."""
        if training.step > self._seen_step:
            self._seen_step = training.step
            if self._window is not None:
                self._window.end_step()
            if self.check_every and training.step % self.check_every == 0:
                check_processes(training.model, training.optimizers, f"after step {training.step}")

    def finish(self, training: Training) -> None:
        """Make what is due after the last step, and say what was not made."""
        if not self.finished:
            self._follow_clock(training, ended=True)
            if self._pending and self._measured(training, ended=True):
                self._change(training)
        if self._window is not None:
            self._close_window()
        if not self.finished:
            why = f"no {self.stages[self._at].when.reason}; set schedule.deadline or train longer"
            if self._pending:
                why = "what its change needs was not measured before; set schedule.metric=weight or an earlier time"
            training.warn(
                f"training ended before stage {self._at + 1} of the rank schedule: the ranks are not final, {why}"
            )

    def abort(self) -> None:
        """Leave the layers, which may be trained again; a checkpoint written now still holds what was measured."""
        if self._window is not None:
            self._window.close()

    def state_dict(self) -> dict[str, Any]:
        """Plain containers and tensors only, so that a checkpoint loads with ``weights_only=True``."""
        return {
            "stage": self._at,
            "triggers": [s.when.state_dict() if isinstance(s.when, Trigger) else None for s in self.stages],
            "pending": asdict(self._pending) if self._pending else None,
            "window": self._window.state_dict() if self._window else None,
            "window_stage": self._window_stage,
            "observed_step": self._observed_step,
            "looked_step": self._looked_step,
            "validated_step": self._validated_step,
            "validated": {name: self._validation[name] for name in self.monitors if name in self._validation},
            "history": [asdict(event) for event in self.history],
            "ramps": [(ramp.steps, ramp.done) for ramp in self._ramps],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._function is None:
            if len(state_dict["triggers"]) != len(self.stages):
                raise ConfigurationError(
                    f"the checkpoint was made under a schedule of {len(state_dict['triggers'])} stages, this one has "
                    f"{len(self.stages)}; set schedule as it was"
                )
            for stage, state in zip(self.stages, state_dict["triggers"], strict=True):
                if isinstance(stage.when, Trigger) and state is not None:
                    stage.when.load_state_dict(state)
        self._at, self._window_stage = state_dict["stage"], state_dict["window_stage"]
        self._pending = _Decision(**state_dict["pending"]) if state_dict["pending"] else None
        self._observed_step, self._looked_step = state_dict["observed_step"], state_dict["looked_step"]
        self._validated_step, self._validation = state_dict["validated_step"], dict(state_dict["validated"])
        self._resumed = {"ramps": state_dict["ramps"], "window": state_dict["window"]}
        self.history = [RankEvent.from_state(event) for event in state_dict["history"]]

    def _how(self, stage: Stage) -> How:
        return stage.how or self.how

    # Deciding

    def observe(self, training: Training) -> None:
        """Show the logged metrics to the trigger that waits for them, once for each step."""
        step = training.step
        if step == self._observed_step:  # a resumed loop may end one validation twice
            return
        self._observed_step = step
        if self.finished or self._pending:
            return
        trigger = self.stages[self._at].when
        if not isinstance(trigger, Trigger) or not trigger.monitors:
            return
        if trigger.observe(step, *(_metric(training, name, "schedule.trigger.monitor") for name in trigger.monitors)):
            self._pending = _Decision(self._at, trigger.reason)

    def _look(self, training: Training) -> None:
        """Show the factors to a trigger that watches them, when its next look is due."""
        trigger, step = self.stages[self._at].when, training.step
        if self._pending or not isinstance(trigger, Trigger) or not trigger.every:
            return
        if step == 0 or step % trigger.every or step == self._looked_step:
            return
        self._looked_step = step
        layers = lora_layers(training.model)
        factors = {name: (la.lora_B.detach(), la.lora_A.detach()) for name, la in layers if not la.pinned}
        seen = trigger.observe(step, factors)
        if from_first(lambda: seen):
            self._pending = _Decision(self._at, trigger.reason)

    def _follow_clock(self, training: Training, *, ended: bool = False) -> None:
        """Decide what is due by time, and begin to measure for what will be soon."""
        step = training.step
        for index, planned in self._planned():
            at_the_end = ended and self.stages[index].when == At(fraction=1.0)
            if planned <= step or at_the_end:
                if self._pending is None or self._pending.stage < index:
                    self._pending = _Decision(index, self._reason(index))
            elif (
                not (self._window or self._pending)
                and planned - self._how(self.stages[index]).window <= step
                and not ended
            ):
                self._open_window(training.model, index)

    def _planned(self) -> Iterator[tuple[int, int]]:
        """(index, step) of the stages to come whose latest time is known; the last of those that share one."""
        steps = [(i, self.stages[i].planned_step(self._run)) for i in range(self._at, len(self.stages))]
        known = {step: i for i, step in steps if step is not None}
        yield from ((i, step) for step, i in known.items())

    def _reason(self, index: int) -> str:
        stage = self.stages[index]
        return stage.when.reason if isinstance(stage.when, At) else f"deadline of {stage.deadline:g} of the run"

    # Measuring

    def _measured(self, training: Training, *, ended: bool = False) -> bool:
        """Whether everything is there that the decided change needs; begin to collect it if not."""
        assert self._pending is not None
        index, layers = self._pending.stage, dict(lora_layers(training.model))
        how = self._how(self.stages[index])
        needs = needs_of(self.stages[index], how, layers)
        if not needs:
            return True
        if self._window is None or not self._window.serves(needs):  # one opened for another stage may do
            if not ended:
                self._open_window(training.model, index)
            return False
        planned = self.stages[index].planned_step(self._run)
        overdue = planned is not None and planned <= training.step
        return self._window.steps >= (1 if ended or overdue else how.window)

    def _open_window(self, model: nn.Module, index: int) -> None:
        if self._window is not None:
            self._close_window()
        layers = {name: layer for name, layer in lora_layers(model) if not layer.pinned}
        how = self._how(self.stages[index])
        needs = needs_of(self.stages[index], how, layers)
        if needs:
            self._window, self._window_stage = Window(layers, needs, how.window, seed=index), index

    def _close_window(self) -> None:
        assert self._window is not None
        self._window.close()
        self._window = None

    # Acting

    def _change(self, training: Training) -> None:
        assert self._pending is not None
        index, reason = self._pending.stage, self._pending.reason
        stage = self.stages[index]
        how, window = self._how(stage), self._window
        if window is not None:
            self._close_window()
        targets = self._targets(dict(lora_layers(training.model)), index, window)
        changed = False
        for event in change_ranks(training, targets, reason, how, window, stage.to.multiple, self._checked):
            self.history.append(event)
            training.tell("on_rank_change", event)
            changed = not event.undone
        self._pending, self._at = None, index
        if not changed or not stage.repeat or self._exhausted(dict(lora_layers(training.model)), index):
            self._at = index + 1
        for later in self.stages[index:]:
            if isinstance(later.when, Trigger):
                later.when.reset(training.step)
        if changed:
            self._warn_of_low_rate(training)
            self._ramp(training, how.rewarmup_steps)

    def _targets(self, layers: dict[str, Any], index: int, window: Window | None) -> dict[str, int]:
        stage, last = self.stages[index], index == len(self.stages) - 1
        wanted = from_first(
            lambda: stage.to.ranks(layer_states(layers, last=last, stage=stage, how=self._how(stage), window=window))
        )
        return {name: rank for name, rank in wanted.items() if rank != layers[name].rank}

    def _exhausted(self, layers: dict[str, Any], index: int) -> bool:
        """Whether a repeated stage has nothing left to do; one that must measure first finds out when it fires."""
        stage = self.stages[index]
        return not stage.to.needs and not self._targets(layers, index, None)

    def _checked(self, training: Training, monitor: str, changed: bool) -> float:
        """The monitored value for the weights as they are; ``changed``: since the last validation."""
        if changed or self._validated_step != training.step:
            self._checking = True
            try:
                training.validate()
            finally:
                self._checking = False
        if changed:
            self._validated_step = -1  # the change may be undone
        if monitor not in self._validation:
            raise ConfigurationError(
                f"check_monitor must be a metric logged in validation, got {monitor!r}; logged: "
                f"{sorted(self._validation)}; set schedule.check_monitor"
            )
        return mean_over_processes(self._validation[monitor])

    def _ramp(self, training: Training, steps: int) -> None:
        if steps:
            for ramp in self._ramps:
                ramp.remove()
            self._ramps = [Rewarmup(optimizer, steps) for optimizer in training.optimizers]

    def _warn_of_low_rate(self, training: Training) -> None:
        if training.step >= (self._run.total_steps or float("inf")):
            return  # after the last step there is nothing to recover in
        groups = [group for optimizer in training.optimizers for group in optimizer.param_groups]
        rates = [(float(group["lr"]), float(group.get("initial_lr", group["lr"]))) for group in groups]
        share = min((now / start for now, start in rates if start > 0), default=1.0)
        if share < LOW_RATE:
            training.warn(
                f"the learning rate at the change of rank is {share:.1%} of its start, too little to recover with; "
                "set an earlier schedule.deadline or a later decay (optimizer.decay)"
            )


def _metric(training: Training, name: str, key: str) -> float:
    metrics = training.logged()
    if name not in metrics:
        raise ConfigurationError(f"monitor must be a logged metric, got {name!r}; logged: {sorted(metrics)}; set {key}")
    return mean_over_processes(float(metrics[name]))
