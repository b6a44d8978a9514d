"""The callback that changes ranks in transformers' Trainer (and TRL's trainers, which derive from it)."""

from __future__ import annotations

import base64
import gc
import io
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.trainer_callback import CallbackHandler, ExportableState, TrainerCallback
from transformers.trainer_utils import has_length

from dynrank.adapters.save import save_adapter
from dynrank.distributed.processes import process_count
from dynrank.distributed.wrappers import ddp_modules
from dynrank.driver.check import checked_metrics, observed_metrics
from dynrank.driver.driver import RankDriver
from dynrank.driver.event import RankEvent
from dynrank.driver.training import Training
from dynrank.errors import ConfigurationError
from dynrank.layers.finding import lora_layers, own_layers
from dynrank.layers.peft_layers import follow_checkpoint_ranks
from dynrank.output.checkpoint_file import load_undamaged
from dynrank.schedules import Schedule
from dynrank.triggers import Run


class RankTrainerCallback(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Changes the ranks of LoRA layers during ``transformers.Trainer.train``, in one process or in several (DDP).

    The model went through :func:`dynrank.add_lora` or PEFT's ``get_peft_model``. Pass the callback to the Trainer's
    constructor (``callbacks=[...]``); otherwise a checkpoint from after a change does not fit a PEFT model. Changes are
    made before the first batch of an optimizer step. Data may be streamed (an IterableDataset, with ``max_steps``).
    Metrics have the Trainer's names, ``Plateau("eval_f1")``, and ``val/loss``, which schedules observe by default, is
    ``eval_loss``; triggers can also read what training logs (``loss``, every ``logging_steps``).

    Its state is in each checkpoint's ``trainer_state.json``, the file that the Trainer writes last: without that file a
    checkpoint is incomplete. ``train(resume_from_checkpoint=...)`` can resume before, at or after a change.
    ``load_best_model_at_end`` restores the ranks of the best checkpoint, too. If the Trainer saves a model of
    ``add_lora``, the same folder also gets the adapter in PEFT's format.

    Args:
        schedule: as in :class:`dynrank.callbacks.RankScheduler`.
        evaluate: evaluates the present model and returns the metrics, for stages with ``max_regression``:
            ``lambda: trainer.evaluate()``.

    Attributes:
        driver: carries out the schedule in the run.

    Raises:
        ConfigurationError: if a value cannot be used.
    """

    def __init__(self, schedule: Schedule, *, evaluate: Callable[[], Mapping[str, Any]] | None = None) -> None:
        self.driver = RankDriver(schedule)
        self.evaluate = evaluate
        # The last value of every metric.
        self.logged: dict[str, float] = {}
        # Whether training is running; metrics from other times are ignored.
        self.listening = False
        # Metrics of evaluations that triggers have not read yet, of all data sets.
        self._evaluated: dict[str, float] = {}

    @property
    def history(self) -> list[RankEvent]:
        """Every change of the run, also those before a resume."""
        return self.driver.history

    # The Trainer's events

    def on_init_end(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **_: Any) -> None:
        _check_devices(args)
        if model is not None:
            _follow(model)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        training = HFTraining(self, state, control, kwargs)
        _check_devices(args)
        _check_names(self)
        if process_count() > 1 and not ddp_modules(training.model):
            raise ConfigurationError("in several processes ranks change under plain DDP only; no DDP wraps the model")
        _follow(training.model)
        if state.global_step:
            self._load(state)
        self.driver.start(training, _run(args, state, kwargs["train_dataloader"]))
        self.listening = True

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        training = HFTraining(self, state, control, kwargs)
        self._show_evaluated(training)
        self.driver.advance(training)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # The Trainer increments its step count after this event.
        self.driver.end_step(HFTraining(self, state, control, kwargs, steps_uncounted=1))

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **_: Any) -> None:
        if self.listening:
            self.logged |= _numbers(logs or {})

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Mapping[str, Any], **_: Any) -> None:
        if self.listening and state.global_step:
            self._evaluated |= _numbers(metrics)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        training = HFTraining(self, state, control, kwargs)
        if args.load_best_model_at_end:
            # The optimizer belongs to the last weights; the loaded ones may have other ranks.
            training.optimizers = []
        self._show_evaluated(training)
        self.driver.finish(training)
        self.listening = False

    def _show_evaluated(self, training: HFTraining) -> None:
        """Pass the evaluations since the last step to the driver together: each event had one data set."""
        if self._evaluated:
            metrics, self._evaluated = self._evaluated, {}
            self.driver.validated(training, metrics)

    # The state in a checkpoint

    def state(self) -> dict[str, Any]:
        """The state for ``trainer_state.json``: the bytes of :func:`torch.save`, in base64 because the file is JSON."""
        buffer = io.BytesIO()
        state = {"driver": self.driver.state_dict(), "logged": self.logged, "evaluated": self._evaluated}
        torch.save(state, buffer)
        return {"args": {}, "attributes": {"saved": base64.b64encode(buffer.getvalue()).decode("ascii")}}

    @classmethod
    def from_state(cls, state: Any) -> Any:
        """Refuse to be made from JSON, which contains no schedule."""
        raise ConfigurationError(
            f"{cls.__name__} takes its state from the checkpoint by itself; set "
            "restore_callback_states_from_checkpoint=False"
        )

    def _load(self, state: Any) -> None:
        stored = state.stateful_callbacks.get(type(self).__name__)
        if not isinstance(stored, Mapping) or "saved" not in stored.get("attributes", {}):
            raise ConfigurationError(
                f"the checkpoint of step {state.global_step} has no state of a {type(self).__name__}, so the schedule "
                "cannot be resumed from it; set resume_from_checkpoint to one made with this callback"
            )
        content = base64.b64decode(stored["attributes"]["saved"])
        saved = load_undamaged(io.BytesIO(content))
        self.driver.load_state_dict(saved["driver"])
        self.logged, self._evaluated = dict(saved["logged"]), dict(saved["evaluated"])


class HFTraining(Training):
    """The present state of a run of transformers' Trainer; made anew for each event."""

    validate_by = "give the callback evaluate=lambda: trainer.evaluate()"

    def __init__(
        self,
        callback: RankTrainerCallback,
        state: Any,
        control: Any,
        kwargs: Mapping[str, Any],
        steps_uncounted: int = 0,
    ) -> None:
        super().__init__(kwargs["model"], [kwargs["optimizer"]], int(state.global_step) + steps_uncounted)
        self.callback, self.state, self.control = callback, state, control

    def logged(self) -> Mapping[str, float]:
        return self.callback.logged

    @property
    def validates(self) -> bool:
        return self.callback.evaluate is not None

    def validate(self) -> Mapping[str, float]:
        """Evaluate in addition to the run's own evaluations; no callback is called, and nothing is logged."""
        # The driver checks `validates` first.
        assert self.callback.evaluate is not None
        handlers = [o for o in gc.get_objects() if type(o) is CallbackHandler and self.callback in o.callbacks]
        present = [handler.callbacks for handler in handlers]
        logged = len(self.state.log_history)
        control = dict(vars(self.control))
        for handler in handlers:
            handler.callbacks = []
        try:
            return _numbers(self.callback.evaluate())
        finally:
            for handler, callbacks in zip(handlers, present, strict=True):
                handler.callbacks = callbacks
            del self.state.log_history[logged:]
            vars(self.control).update(control)

    def tell(self, event: RankEvent) -> None:
        """Add the ranks after a change to the Trainer's log."""
        ranks = [layer.rank for _, layer in lora_layers(self.model)]
        values = {"rank/mean": sum(ranks) / len(ranks), "rank/max": float(max(ranks)), "step": self.step}
        self.state.log_history.append(values)


def _follow(model: Any) -> None:
    """Let ``model`` load checkpoints of other ranks; a model of :func:`dynrank.add_lora` also saves PEFT's format."""
    follow_checkpoint_ranks(model)
    if own_layers(model) and hasattr(model, "save_pretrained"):
        model.save_pretrained = partial(_save_with_adapter, model)


def _save_with_adapter(model: Any, folder: str | Path, **options: Any) -> None:
    """Save the whole model, from which the Trainer can resume, and the adapter in PEFT's format."""
    type(model).save_pretrained(model, folder, **options)
    if options.get("is_main_process", True) and own_layers(model):
        save_adapter(model, folder)


def _check_devices(args: Any) -> None:
    """Refuse settings that shard or copy the model, from arguments, accelerate's configuration or the environment.

    accelerate is imported here, because it is installed only if transformers' Trainer is used.
    """
    from accelerate.state import AcceleratorState
    from accelerate.utils import parse_flag_from_env

    asked = {"FSDP": args.fsdp, "DEEPSPEED": args.deepspeed, "MEGATRON_LM": None}
    ways = [name for name, given in asked.items() if given or parse_flag_from_env(f"ACCELERATE_USE_{name}")]
    state = AcceleratorState().distributed_type.value
    ways += [state] if state != "NO" and not state.startswith("MULTI_") else []
    ways += [f"{args.n_gpu} GPUs in one process"] if args.n_gpu > 1 else []
    if ways:
        raise ConfigurationError(
            f"RankTrainerCallback changes ranks on one device or under DDP, this Trainer was set to {ways[0]}: remove "
            "that from its arguments, accelerate's configuration and the environment (ACCELERATE_USE_...), and start "
            "it with torchrun or accelerate launch --multi_gpu; to shard the model, train with "
            "dynrank.callbacks.RankScheduler (Lightning), which knows FSDP2"
        )


def _check_names(callback: RankTrainerCallback) -> None:
    """Refuse names of metrics that the Trainer does not use."""
    stages = callback.driver.stages
    wrong = {name: what for name, what in observed_metrics(stages).items() if name.startswith("val_")}
    wrong |= {name: what for name, what in checked_metrics(stages).items() if not name.startswith(("eval_", "val/"))}
    for name, argument in wrong.items():
        raise ConfigurationError(
            f"{argument} must name a metric of the Trainer's evaluations, which begin with eval_, got {name!r}; "
            "set it to 'eval_loss', for example"
        )


def _run(args: Any, state: Any, dataloader: Any) -> Run:
    batches = len(dataloader) if has_length(dataloader) else None
    return Run(
        int(state.max_steps), None if batches is None else max(1, -(-batches // args.gradient_accumulation_steps))
    )


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The numbers among ``metrics``; eval_loss is val/loss, too."""
    numbers = {name: float(value) for name, value in metrics.items() if isinstance(value, int | float)}
    return numbers | {f"val/{name[5:]}": value for name, value in numbers.items() if name.startswith("eval_")}
