"""The callback that changes ranks in transformers' Trainer (and TRL's trainers, which derive from it)."""

from __future__ import annotations

import base64
import inspect
import io
from collections.abc import Callable, Mapping
from functools import partial, wraps
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Subset
from transformers import PreTrainedModel, Trainer
from transformers.trainer_callback import (
    EarlyStoppingCallback,
    ExportableState,
    TrainerCallback,
)
from transformers.trainer_utils import get_last_checkpoint, has_length

from dynrank.adapters.save import save_adapter
from dynrank.distributed.accelerated import check_accelerate, fsdp_plugin
from dynrank.distributed.processes import process_count
from dynrank.distributed.sharding import is_sharded, shard_frozen, take_saved_ranks
from dynrank.distributed.wrappers import ddp_modules
from dynrank.driver.check import checked_metrics, metric_value, observed_metrics
from dynrank.driver.driver import RankDriver
from dynrank.driver.event import RankEvent
from dynrank.driver.rates import mark
from dynrank.driver.training import Training
from dynrank.driver.undo import validate
from dynrank.errors import ConfigurationError
from dynrank.layers.finding import adapter_parameters, lora_layers, own_layers
from dynrank.layers.frozen_base import with_marks_as_tensors, without_base
from dynrank.layers.peft_layers import follow_checkpoint_ranks
from dynrank.output.checkpoint_file import load_undamaged
from dynrank.output.console import print_table
from dynrank.output.ranks import ranks_in_words
from dynrank.schedules import Schedule
from dynrank.triggers import Run


class RankTrainerCallback(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Changes the ranks of LoRA layers during ``transformers.Trainer.train``, in one process or in several.

    The model went through :func:`dynrank.add_lora` or PEFT's ``get_peft_model``. Pass the callback to the Trainer's
    constructor (``callbacks=[...]``); otherwise a checkpoint from after a change does not fit a PEFT model. Changes are
    made before the first batch of an optimizer step. Data may be streamed (an IterableDataset, with ``max_steps``).
    Several processes train under DDP or accelerate's FSDP2. That shards the frozen base, when the Trainer is made, and
    adapters stay whole in each process (:func:`dynrank.distributed.sharding.shard_frozen`).
    Metrics have the Trainer's names, ``Plateau("eval_f1")``, and ``val/loss``, which schedules observe by default, is
    ``eval_loss``; triggers can also read what training logs (``loss``, every ``logging_steps``).

    Its state is in each checkpoint's ``trainer_state.json``, the file that the Trainer writes last: without that file a
    checkpoint is incomplete. ``train(resume_from_checkpoint=...)`` can resume before, at or after a change.
    ``load_best_model_at_end`` restores the ranks of the best checkpoint, too. Of a model of transformers that went
    through ``add_lora``, ``model.safetensors`` in a checkpoint leaves out the frozen base, as PEFT's checkpoints do;
    resuming on another base is an error. The same folder gets the adapter in PEFT's format.

    After a change that lowers ranks, the best so far no longer counts: ``state.best_metric`` and
    ``best_model_checkpoint`` are empty until the next evaluation, and EarlyStoppingCallback starts anew. A change
    behind the last step is made in the model that the Trainer has loaded, so ``trainer.save_model()`` saves the changed
    one; a warning names the checkpoints on disk that have other ranks.

    Each change is printed as a table. ``rank/mean``, ``rank/max`` and ``rank/parameters`` go to everything that hears
    the Trainer's log (TensorBoard, W&B, the progress bar, ``state.log_history``). So does ``lr/adapter``, if an adapter
    shares its param group with other parameters and a change has raised its rate; elsewhere the group and its scheduler
    have the rate that is used. If another callback defines ``on_rank_change(args, state, control, event, **kwargs)``,
    it is called after each change was made or undone.

    Args:
        schedule: as in :class:`dynrank.callbacks.RankScheduler`.
        evaluate: evaluates the present model and returns the metrics, for stages with ``max_regression``:
            ``lambda: trainer.evaluate()``.
        keep_best_before: whether the best checkpoint may be one from before the last cut, with other ranks.
        measure: also evaluate directly before and after each change, and put eval_loss (the ``check_monitor`` of the
            stage's How) into the event. Of a long ``trainer.eval_dataset`` every n-th row is taken, so that this costs
            under 2% of the run.

    Attributes:
        driver: carries out the schedule in the run.

    Raises:
        ConfigurationError: if a value cannot be used.

    >>> RankTrainerCallback(4).driver.stages[0].to.final_rank
    4
    """

    def __init__(
        self,
        schedule: Schedule,
        *,
        evaluate: Callable[[], Mapping[str, Any]] | None = None,
        keep_best_before: bool = False,
        measure: bool = False,
    ) -> None:
        self.driver = RankDriver(schedule, measure=measure)
        self.evaluate = evaluate
        self.keep_best_before = keep_best_before
        # Known while it trains.
        self.trainer: Trainer | None = None
        # The last value of every metric.
        self.logged: dict[str, float] = {}
        # Whether training is running; metrics from other times are ignored.
        self.listening = False
        # Metrics of evaluations that triggers have not read yet, of all data sets.
        self._evaluated: dict[str, float] = {}
        # Whether an evaluation has shown that the metric of a check exists.
        self._checked = False
        # {step of a checkpoint: its ranks}
        self._saved: dict[int, list[int]] = {}

    @property
    def history(self) -> list[RankEvent]:
        """Every change of the run, also those before a resume."""
        return self.driver.history

    # The Trainer's events

    def on_init_end(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **_: Any) -> None:
        _check_devices(args)
        if model is not None:
            _follow(model)
            if fsdp_plugin() is not None:
                # accelerate leaves a model alone that is sharded when it is prepared.
                shard_frozen(model)
                _resume_from_shards()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        training = HFTraining(self, args, state, control, kwargs)
        _check_devices(args)
        _check_names(self)
        self.trainer = _caller()
        handler = self.trainer.callback_handler
        # So a change behind the last step is told before TensorBoard and others close their files.
        handler.callbacks = [self, *(c for c in handler.callbacks if c is not self)]
        if process_count() > 1 and not ddp_modules(training.model) and not is_sharded(training.model):
            raise ConfigurationError(
                "in several processes ranks change under DDP or FSDP2 only; no DDP wraps the model, and FSDP2 does not "
                "shard it"
            )
        _follow(training.model)
        if state.global_step:
            self._load(state)
        self.driver.start(training, _run(args, state, kwargs["train_dataloader"]))
        if state.global_step:
            self._saved[state.global_step] = training.ranks
        self.listening = True

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        training = HFTraining(self, args, state, control, kwargs)
        self._show_evaluated(training)
        self.driver.advance(training)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # The Trainer increments its step count after this event.
        self.driver.end_step(HFTraining(self, args, state, control, kwargs, steps_uncounted=1))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._saved[state.global_step] = HFTraining(self, args, state, control, kwargs).ranks

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        if self.listening:
            self.logged |= _numbers(logs or {})
            if logs and "learning_rate" in logs:
                training = HFTraining(self, args, state, control, kwargs)
                hidden = self.driver.hidden_rates(training)
                if hidden:
                    training.log(hidden)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Mapping[str, Any], **_: Any) -> None:
        if self.listening and state.global_step:
            self._evaluated |= _numbers(metrics)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        training = HFTraining(self, args, state, control, kwargs)
        if args.load_best_model_at_end:
            # The optimizer belongs to the last weights; the loaded ones may have other ranks.
            training.optimizers = []
        self._show_evaluated(training)
        self.driver.finish(training)
        self.listening = False
        if self.history:
            self._warn_of_other_ranks(training)

    def _show_evaluated(self, training: HFTraining) -> None:
        """Pass the evaluations since the last step to the driver together: each event had one data set."""
        if self._evaluated:
            metrics = self._evaluated
            self._evaluated = {}
            checked = checked_metrics(self.driver.stages)
            if not self._checked and checked.keys() - metrics.keys():
                # The user's function may return more, so only that decides.
                metrics_of_check = validate(training)
                for name in checked:
                    metric_value(metrics_of_check, name, checked)
            self._checked = True
            self.driver.validated(training, metrics)

    def _warn_of_other_ranks(self, training: HFTraining) -> None:
        """Warn if the best or the last checkpoint has other ranks than the model, whose training has ended."""
        state = training.state
        steps = {max(self._saved, default=0): "last"}
        if state.best_model_checkpoint is not None:
            steps[state.best_global_step] = "best"
        for step, kind in steps.items():
            folder = Path(training.args.output_dir) / f"checkpoint-{step}"
            if folder.is_dir() and self._saved.get(step, training.ranks) != training.ranks:
                training.warn(
                    f"the {kind} checkpoint, {str(folder)!r}, has {ranks_in_words(self._saved[step])}, but the trained "
                    f"model has {ranks_in_words(training.ranks)}: no checkpoint was written after the last change of "
                    "rank; save the model by trainer.save_model, or change ranks earlier"
                )

    # The state in a checkpoint

    def state(self) -> dict[str, Any]:
        """The state for ``trainer_state.json``: the bytes of :func:`torch.save`, in base64 because the file is JSON."""
        buffer = io.BytesIO()
        state = {"driver": self.driver.state_dict(), "logged": self.logged, "evaluated": self._evaluated}
        torch.save(state | {"saved": self._saved}, buffer)
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
        self.logged = dict(saved["logged"])
        self._evaluated = dict(saved["evaluated"])
        self._saved = dict(saved["saved"])


class HFTraining(Training):
    """The present state of a run of transformers' Trainer; made anew for each event."""

    validate_by = "give the callback evaluate=lambda: trainer.evaluate()"

    def __init__(
        self,
        callback: RankTrainerCallback,
        args: Any,
        state: Any,
        control: Any,
        kwargs: Mapping[str, Any],
        steps_uncounted: int = 0,
    ) -> None:
        scheduler = kwargs.get("lr_scheduler")
        step = int(state.global_step) + steps_uncounted
        schedulers = None if scheduler is None else [scheduler]
        super().__init__(kwargs["model"], [kwargs["optimizer"]], step, schedulers=schedulers)
        self.callback = callback
        self.handler = callback.trainer.callback_handler if callback.trainer is not None else None
        self.args = args
        self.state = state
        self.control = control
        self.kwargs = kwargs

    @property
    def ranks(self) -> list[int]:
        """The rank of each layer."""
        return [layer.rank for _, layer in lora_layers(self.model)]

    def logged(self) -> Mapping[str, float]:
        return self.callback.logged

    @property
    def validates(self) -> bool:
        return self.callback.evaluate is not None

    def validate(self) -> Mapping[str, float]:
        """Evaluate in addition to the run's own evaluations; no callback is called, and nothing is logged."""
        # The driver checks `validates` first.
        assert self.callback.evaluate is not None
        handler = self.handler
        assert handler is not None
        present = handler.callbacks
        handler.callbacks = []
        logged = len(self.state.log_history)
        control = dict(vars(self.control))
        try:
            return _numbers(self.callback.evaluate())
        finally:
            handler.callbacks = present
            del self.state.log_history[logged:]
            vars(self.control).update(control)

    @property
    def validation_batches(self) -> int | None:
        """Of all the Trainer's evaluation sets; None if one of them has no length."""
        sets = _evaluation_sets(self.callback.trainer)
        if not sets or not all(map(has_length, sets.values())):
            return None
        size = int(self.args.eval_batch_size) * process_count()
        return sum(-(-len(rows) // size) for rows in sets.values())

    def validate_share(self, most: int) -> Mapping[str, float]:
        """As :meth:`validate`, with a share of the rows of the Trainer's evaluation sets."""
        trainer: Any = self.callback.trainer
        whole = trainer.eval_dataset
        assert self.validation_batches is not None
        apart = -(-self.validation_batches // most)
        few = {name: _every(rows, apart) for name, rows in _evaluation_sets(trainer).items()}
        trainer.eval_dataset = few if isinstance(whole, dict) else few[""]
        try:
            return self.validate()
        finally:
            trainer.eval_dataset = whole

    def log(self, values: Mapping[str, float]) -> None:
        """Log ``values`` as the Trainer logs its own."""
        logs = {**values} if self.state.epoch is None else {**values, "epoch": self.state.epoch}
        self.state.log_history.append({**logs, "step": self.step})
        if self.handler is not None:
            self.handler.on_log(self.args, self.state, self.control, logs)

    def tell(self, event: RankEvent) -> None:
        """Log the ranks, print the change, and call ``on_rank_change`` of every callback that defines it."""
        ranks = self.ranks
        parameters = sum(factor.numel() for factor in adapter_parameters(self.model))
        means = {"rank/mean": sum(ranks) / len(ranks), "rank/max": float(max(ranks))}
        self.log({**means, "rank/parameters": float(parameters)})
        if self.state.is_world_process_zero:
            print_table(event.table({name: layer.rank for name, layer in lora_layers(self.model)}))
        if event.lowers and not self.callback.keep_best_before:
            self._forget_best(event)
        for callback in self.handler.callbacks if self.handler else ():
            hook = getattr(callback, "on_rank_change", None)
            if hook is not None:
                hook(self.args, self.state, self.control, event=event, **self.kwargs)

    def _forget_best(self, event: RankEvent) -> None:
        """Let everything after ``event``, which has lowered ranks, count as better than everything before it."""
        state = self.state
        if state.best_metric is None:
            return
        if state.is_world_process_zero:
            step = state.best_global_step
            ranks = self.callback._saved.get(step, event.ranks_before)
            at = f"{self.args.metric_for_best_model} {state.best_metric:.4g}" if step is None else f"step {step}"
            print(
                f"best so far: {at} at {ranks_in_words(ranks)}; from here on the best of {ranks_in_words(self.ranks)} "
                "counts (RankTrainerCallback's keep_best_before)"
            )
        state.best_metric = state.best_global_step = state.best_model_checkpoint = None
        for callback in self.handler.callbacks if self.handler else ():
            if isinstance(callback, EarlyStoppingCallback):
                callback.early_stopping_patience_counter = 0


def _evaluation_sets(trainer: Any) -> dict[str, Any]:
    """{name: the rows}; one set alone has the name ""."""
    rows = None if trainer is None else trainer.eval_dataset
    if isinstance(rows, dict):
        return rows
    return {} if rows is None else {"": rows}


def _every(rows: Any, apart: int) -> Any:
    """Each of the rows that are ``apart``; a Dataset of Hugging Face stays one, because the Trainer prepares it."""
    chosen = range(0, len(rows), apart)
    return rows.select(chosen) if hasattr(rows, "select") else Subset(rows, chosen)


def _caller() -> Trainer:
    """The Trainer that is calling this event."""
    # Neither an event's arguments nor any public method of a callback leads to the Trainer, and callbacks are made
    # before it is. Without its list of callbacks, changes could not be logged or told to others.
    frame = inspect.currentframe()
    while frame is not None:
        found = frame.f_locals.get("self")
        if isinstance(found, Trainer):
            return found
        frame = frame.f_back
    raise RuntimeError("the events of RankTrainerCallback have to be called by transformers' Trainer")


def _resume_from_shards() -> None:
    """Let the Trainer resume from FSDP2's checkpoints, which are loaded into tensors, and under keys, that exist.

    What needs accelerate is imported here, because it is installed only if transformers' Trainer is used.
    """
    from accelerate.utils.constants import FSDP_MODEL_NAME

    trainer: Any = _caller()
    train = trainer.train

    @wraps(train)
    def from_any_ranks(resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        folder: Any = resume_from_checkpoint
        if folder is True:
            folder = get_last_checkpoint(trainer.args.output_dir)
        if folder:
            shards = Path(folder) / f"{FSDP_MODEL_NAME}_0"
            if shards.is_dir():
                take_saved_ranks(trainer.model, shards, prefix="model.")
            mark(trainer.create_optimizer())
        return train(resume_from_checkpoint, *args, **kwargs)

    trainer.train = from_any_ranks


def _follow(model: Any) -> None:
    """Let ``model`` load checkpoints of other ranks; one of :func:`dynrank.add_lora` saves itself so that they fit."""
    follow_checkpoint_ranks(model)
    if own_layers(model) and hasattr(model, "save_pretrained"):
        model.save_pretrained = partial(_save_with_adapter, model)


def _save_with_adapter(model: Any, folder: str | Path, **options: Any) -> None:
    """Save what the Trainer resumes from, and the adapter in PEFT's format."""
    adapted = bool(own_layers(model))
    if adapted and isinstance(model, PreTrainedModel):
        state = without_base(model, options.get("state_dict") or model.state_dict(), trained=())
        # The Trainer loads by the model's own names, to which it does not translate those of transformers' files.
        options |= {"state_dict": with_marks_as_tensors(state), "save_original_format": False}
    type(model).save_pretrained(model, folder, **options)
    if adapted and options.get("is_main_process", True):
        save_adapter(model, folder)


def _check_devices(args: Any) -> None:
    """Refuse what copies the model, or shards adapters, from arguments, accelerate's configuration or the environment.

    accelerate is imported here, because it is installed only if transformers' Trainer is used.
    """
    from accelerate.state import AcceleratorState
    from accelerate.utils import parse_flag_from_env

    asked = {"DEEPSPEED": args.deepspeed, "MEGATRON_LM": None}
    ways = [name for name, given in asked.items() if given or parse_flag_from_env(f"ACCELERATE_USE_{name}")]
    ways += [f"{args.n_gpu} GPUs in one process"] if args.n_gpu > 1 else []
    plugin = fsdp_plugin()
    if plugin is not None and args.load_best_model_at_end and "SHARDED" in str(plugin.state_dict_type):
        # transformers looks for the folder of the best checkpoint before it is there in all processes.
        ways.append("load_best_model_at_end with SHARDED_STATE_DICT (set state_dict_type to FULL_STATE_DICT)")
    if plugin is not None and getattr(args, "use_vllm", False):
        # TRL merges adapters before each generation, and PEFT cannot add a whole matrix to a shard.
        ways.append("use_vllm with FSDP2 (set use_vllm=False)")
    if ways:
        raise ConfigurationError(
            f"RankTrainerCallback changes ranks on one device, under DDP or under FSDP2; this Trainer was set to "
            f"{ways[0]}: change that in its arguments, accelerate's configuration and the environment "
            "(ACCELERATE_USE_...), and start it with torchrun or accelerate launch (conf/README.md)"
        )
    check_accelerate(AcceleratorState())


def _check_names(callback: RankTrainerCallback) -> None:
    """Refuse names of metrics that the Trainer does not use."""
    stages = callback.driver.stages
    checked = checked_metrics(stages, measure=callback.driver.measure)
    wrong = {name: what for name, what in observed_metrics(stages).items() if name.startswith("val_")}
    wrong |= {name: what for name, what in checked.items() if not name.startswith(("eval_", "val/"))}
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
