"""The callback that changes ranks in transformers' Trainer (and TRL's trainers, which derive from it)."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping
from typing import Any
from weakref import ref

import torch
from torch import nn
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState, TrainerCallback

from dynrank.callbacks.transformers.best import forget_best, ranks_of, warn_of_other_ranks
from dynrank.callbacks.transformers.checkpoints import (
    check_storable,
    is_prepared,
    prepare_checkpoints,
    prepare_trainer,
)
from dynrank.callbacks.transformers.trainer import calling_trainer
from dynrank.callbacks.transformers.training import TrainerTraining, numeric_metrics, run_length
from dynrank.callbacks.transformers.zero import ZeroTraining, save_live
from dynrank.distributed.accelerated import check_arguments
from dynrank.distributed.processes import process_count
from dynrank.distributed.sharding import is_sharded
from dynrank.driver.driver import RankDriver
from dynrank.driver.event import History, RankEvent
from dynrank.driver.reserved import slot_notice
from dynrank.driver.schedulers import forget_plateau
from dynrank.errors import ConfigurationError
from dynrank.layers.finding import lora_layers
from dynrank.output.checkpoint_file import load_undamaged
from dynrank.output.console import print_table
from dynrank.output.ranks import rank_totals
from dynrank.rank_map import RankMap
from dynrank.schedules import Schedule


class RankTrainerCallback(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Changes the ranks of LoRA layers during ``transformers.Trainer.train``, in one process or in several.

    The model went through :func:`dynrank.add_lora` or PEFT's ``get_peft_model``. Pass the callback to the Trainer's
    constructor (``callbacks=[...]``), or a Trainer that is made already to :meth:`attach`; ``trainer.add_callback``
    alone is refused when training starts, because its checkpoints could not be resumed. Changes are made before the
    first batch of an optimizer step. Data may be streamed (an IterableDataset, with ``max_steps``).
    Several processes train under DDP or accelerate's FSDP2. That shards the frozen base, when the Trainer is made, and
    each process has the complete adapters (:func:`dynrank.distributed.sharding.shard_frozen`).
    Metrics have the Trainer's names, ``Plateau("eval_f1")``, and ``val/loss``, which schedules observe by default, is
    ``eval_loss``; triggers can also read what training logs (``loss``, every ``logging_steps``). They read once what is
    new at each evaluation of the Trainer, or at each log where the Trainer does not evaluate.

    Its state is in each checkpoint's ``trainer_state.json``, the file that the Trainer writes last: without that file a
    checkpoint is incomplete. ``train(resume_from_checkpoint=...)`` can resume before, at or after a change.
    ``load_best_model_at_end`` restores the ranks of the best checkpoint, too. Of a model of transformers that went
    through ``add_lora``, ``model.safetensors`` in a checkpoint leaves out the frozen base, as PEFT's checkpoints do;
    resuming on another base is an error. The same folder gets the adapter in PEFT's format.

    After a change that lowers ranks, the best so far no longer counts: ``state.best_metric`` and
    ``best_model_checkpoint`` are empty until the next evaluation, and EarlyStoppingCallback and the scheduler
    ``reduce_lr_on_plateau`` start anew. A change behind the last step is made in the model that the Trainer has loaded,
    so ``trainer.save_model()`` saves the changed one; a warning names the checkpoints on disk that have other ranks.

    A Trainer with a ``model_init`` makes a new model in each ``train()``, also for each trial of
    ``hyperparameter_search``. The schedule then begins anew, unless a checkpoint is resumed; ``history`` is that of the
    last run.

    Each change is printed as a table; before training a line says what a server will reserve. ``rank/mean``,
    ``rank/max`` and ``rank/parameters`` are in every record of ``state.log_history``, and in all but evaluations of
    what TensorBoard, W&B and the progress bar show; in a record of their own when training starts and at each change.
    So is ``lr/adapter``, of the same step as ``learning_rate``, if an adapter shares its param group with other
    parameters and a change has raised its rate; elsewhere the group and its scheduler have the rate that is used. If
    another callback defines ``on_rank_change(args, state, control, event, **kwargs)``, it is called after each change
    was made or undone.

    Args:
        schedule: as in :class:`dynrank.callbacks.RankScheduler`.
        evaluate: evaluates the present model and returns the metrics, for stages with ``max_regression``. None:
            ``trainer.evaluate()``, if the Trainer has an ``eval_dataset``.
        keep_best_before: whether the best checkpoint may be one from before the last cut, with other ranks.
        measure: also evaluate directly before and after each change, and put eval_loss (the ``check_monitor`` of the
            stage's How) into the event. Of a long ``trainer.eval_dataset`` every n-th row is taken, so that this costs
            under 2% of the run. All rows are evaluated if you give ``evaluate``, the Trainer is of a class with its own
            ``evaluate`` or ``get_eval_dataloader``, or the data are streamed.
        rank_map: what the rank of single layers may become, as in :class:`dynrank.callbacks.RankScheduler`.

    Attributes:
        driver: carries out the schedule in the run.

    Raises:
        ConfigurationError: if a value cannot be used; when training starts, if ``rank_map`` does not fit.

    >>> from dynrank.schedules import auto
    >>> RankTrainerCallback(auto()).driver.monitors
    ['val/loss']

    Example::

        trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[RankTrainerCallback(4)])

    A cut that leaves ``o_proj`` out, and no rank above 8 in the MLP::

        RankTrainerCallback(4, rank_map={"o_proj": {"pinned": True}, "mlp": {"highest": 8}})
    """

    def __init__(
        self,
        schedule: Schedule,
        *,
        evaluate: Callable[[], Mapping[str, Any]] | None = None,
        keep_best_before: bool = False,
        measure: bool = False,
        rank_map: RankMap | None = None,
    ) -> None:
        self.driver = RankDriver(schedule, measure=measure, rank_map=rank_map)
        self.evaluate = evaluate
        self.keep_best_before = keep_best_before
        # Known from attach() on, or while it trains.
        self.trainer: Trainer | None = None
        # The model of the last run, as long as somebody has it.
        self._last_model: ref[nn.Module] | None = None
        # The run, from the begin of training to its end.
        self._run: TrainerTraining | None = None
        # Whether training is running; metrics from other times are ignored.
        self.listening = False
        # Whether a step has begun: before it, ``eval_on_start`` evaluates again what the checkpoint has evaluated.
        self._has_begun = False
        # How many changes were made before the first step that the next logged loss is of; None: it has no step yet.
        self._changes_before_loss: int | None = None
        # Metrics of evaluations that triggers have not read yet, of all data sets.
        self._evaluated: dict[str, float] = {}
        # {step of a checkpoint: its ranks}
        self._saved: dict[int, list[int]] = {}
        # What every record of the log says of the present ranks; empty before the first step.
        self._ranks: dict[str, float] = {}
        # The rate of the first param group in the last step, and that of adapters that differs.
        self._rates: tuple[float, dict[str, float]] = (0.0, {})

    @property
    def history(self) -> History:
        """Every change of the run so far, and every attempt that was undone, also those before a resume."""
        return self.driver.history

    def attach(self, trainer: Trainer) -> RankTrainerCallback:
        """Add the callback to a Trainer that is made already, with all that the constructor's ``callbacks`` gives it.

        Returns:
            The callback itself.

        Raises:
            ConfigurationError: if ranks cannot change under the Trainer's arguments.

        Example::

            trainer = make_trainer()
            ranks = RankTrainerCallback(4).attach(trainer)
            trainer.train()
        """
        if self not in trainer.callback_handler.callbacks:
            trainer.add_callback(self)
        self.trainer = trainer
        self._prepare(trainer.args, trainer)
        return self

    def _prepare(self, args: TrainingArguments, trainer: Trainer) -> None:
        """Check the arguments, and prepare the Trainer's models before they are wrapped or load a checkpoint."""
        check_arguments(args)
        if args.restore_callback_states_from_checkpoint:
            raise ConfigurationError(
                "restore_callback_states_from_checkpoint makes all callbacks anew, so RankTrainerCallback would have "
                "no schedule; set it to False: this callback restores its own state in any case",
                "restore_callback_states_from_checkpoint",
            )
        prepare_trainer(trainer)

    # The Trainer's events

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._prepare(args, calling_trainer())

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        check_arguments(args)
        # After attach() the Trainer is known. Its state tells it from another one that has the same callback.
        if self.trainer is None or self.trainer.state is not state:
            self.trainer = calling_trainer()
        handler = self.trainer.callback_handler
        if sum(isinstance(callback, RankTrainerCallback) for callback in handler.callbacks) > 1:
            raise ConfigurationError(
                "one RankTrainerCallback changes the ranks of a run, got several in callbacks; join their stages in "
                "one list, RankTrainerCallback([*first, *second])",
                "callbacks",
            )
        if not is_prepared(self.trainer):
            raise ConfigurationError(
                "trainer.add_callback comes too late to prepare the model for checkpoints that can be resumed: call "
                "RankTrainerCallback(...).attach(trainer) instead",
                "callbacks",
            )
        # So a change behind the last step is reported before TensorBoard and others close their files.
        handler.callbacks = [self, *(c for c in handler.callbacks if c is not self)]
        model = kwargs["model"]
        prepare_checkpoints(model)
        check_storable(model)
        is_zero = self.trainer.is_deepspeed_enabled
        if is_zero:
            save_live(model)
        # The last training has ended without its event, by an error.
        is_again = self._run is not None and self._run.trainer is self.trainer
        kind = ZeroTraining if is_zero else TrainerTraining
        training = self._run = kind(self.trainer, kwargs, self.evaluate)
        if process_count() > 1 and not (training.ddp or is_zero or is_sharded(model)):
            raise ConfigurationError(
                "in several processes ranks change under DDP, FSDP2 or DeepSpeed only; no DDP wraps the model, and "
                "none of the others shards it"
            )
        self._changes_before_loss = None
        if state.global_step:
            self._load(state)
        elif self.trainer.model_init is not None and (self._last_model is None or model is not self._last_model()):
            self._begin_anew()
        elif args.auto_find_batch_size and is_again:
            # The Trainer begins at step 0 again, with less in a batch, and keeps the model as it is.
            self.driver.count_anew()
        self._last_model = ref(model)
        self.driver.start(training, run_length(args, state, kwargs["train_dataloader"]))
        self._ranks = {}
        notice = slot_notice(training.model, self.driver.stages[self.driver.progress.stage :], self.driver.rules)
        if notice is not None and state.is_world_process_zero:
            print(notice)
        if state.global_step:
            self._saved[state.global_step] = ranks_of(training.model)
        self.listening = True
        self._has_begun = False

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._has_begun = True
        training = self._training(kwargs)
        # Not earlier, because the callbacks that write logs begin after this one.
        if not self._ranks:
            self._log_ranks(training)
        self._show_evaluated(training)
        self.driver.advance(training)
        if self._changes_before_loss is None:
            self._changes_before_loss = self.driver.logged.changes

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Without a factor, every rate is the one in its group.
        if self.driver.lr_factor != 1.0:
            training = self._training(kwargs)
            rate = float(training.optimizers[0].param_groups[0]["lr"])
            self._rates = rate, self.driver.unlogged_adapter_rates(training)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # The Trainer increments its step count after this event.
        self.driver.end_step(self._training(kwargs, steps_uncounted=1))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._saved[state.global_step] = ranks_of(self._training(kwargs).model)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any],
        **kwargs: Any,
    ) -> None:
        if not self.listening:
            return
        found = numeric_metrics(logs) if self._has_begun else {}
        if "loss" in found:
            # The Trainer's loss, and what TRL logs with it, are means over the steps since the last one.
            self.driver.logged.log(found, self._changes_before_loss)
            self._changes_before_loss = None
        else:
            self.driver.logged.log(found)
        more = dict(self._ranks)
        if "learning_rate" in logs and self.driver.lr_factor != 1.0:
            # The Trainer logs the rate of the step that was made, or of the next one, by version.
            shown, of_step = self._rates
            is_made = logs["learning_rate"] == shown
            more |= of_step if is_made else self.driver.unlogged_adapter_rates(self._training(kwargs))
        state.log_history[-1].update(more)
        # An evaluation returns what it logs, and a search of hyperparameters takes the sum of that.
        if not any(name.endswith("_runtime") and name != "train_runtime" for name in logs):
            # This callback is the first, so all others find these values, too.
            logs.update(more)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, Any],
        **_: Any,
    ) -> None:
        found = numeric_metrics(metrics)
        # A program may also evaluate other data, with a prefix of their own.
        is_read = any(name.startswith("eval_") for name in found) or not found.keys().isdisjoint(self.driver.monitors)
        if self.listening and self._has_begun and state.global_step and is_read:
            self._evaluated |= found

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        training = self._training(kwargs)
        self._show_evaluated(training)
        if args.load_best_model_at_end:
            training.best_is_loaded()
        self.driver.finish(training)
        self.listening = False
        if self.history:
            warn_of_other_ranks(training, self._saved)
        # A callback that is kept does not keep the model's wrappers and the optimizer.
        self._run = None

    def on_rank_change(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        event: RankEvent,
        **_: Any,
    ) -> None:
        """Log the ranks, and print the change."""
        assert self._run is not None
        model = self._run.model
        if not event.undone:
            self._log_ranks(self._run)
        if state.is_world_process_zero:
            print_table(event.table({name: layer.rank for name, layer in lora_layers(model)}))
        if event.lowers and not self.keep_best_before:
            forget_plateau(self._run.present_schedulers() or [])
            if state.best_metric is not None:
                forget_best(args, state, event, ranks_of(model), self._saved)

    def _log_ranks(self, training: TrainerTraining) -> None:
        """Log the present ranks, in a record of their own."""
        self._ranks = rank_totals(training.model)
        training.log({})

    def _training(self, event: Mapping[str, Any], steps_uncounted: int = 0) -> TrainerTraining:
        """The run at its present step."""
        assert self._run is not None
        return self._run.now(event, steps_uncounted)

    def _show_evaluated(self, training: TrainerTraining) -> None:
        """Pass the evaluations since the last step to the driver together: each event had one data set.

        Where the Trainer does not evaluate, a trigger reads what is logged, once all of that is known: the program may
        evaluate by itself, later.
        """
        names = self.driver.next_observed
        is_logged = not training.evaluates and bool(names) and all(map(self.driver.logged.is_new, names))
        if self._evaluated or is_logged:
            metrics = self._evaluated
            self._evaluated = {}
            self.driver.validated(training, metrics)

    def _begin_anew(self) -> None:
        """Forget earlier runs."""
        self.driver.reset()
        self._evaluated = {}
        self._saved = {}

    # The state in a checkpoint

    def state(self) -> dict[str, Any]:
        """The state for ``trainer_state.json``: the bytes of :func:`torch.save`, in base64 because the file is JSON."""
        buffer = io.BytesIO()
        state: dict[str, Any] = {
            "driver": self.driver.state_dict(),
            "changes_before_loss": self._changes_before_loss,
            "evaluated": self._evaluated,
            "saved": self._saved,
        }
        torch.save(state, buffer)
        return {"args": {}, "attributes": {"saved": base64.b64encode(buffer.getvalue()).decode("ascii")}}

    def _load(self, state: TrainerState) -> None:
        stored = state.stateful_callbacks.get(type(self).__name__)
        if not isinstance(stored, Mapping) or "saved" not in stored.get("attributes", {}):
            raise ConfigurationError(
                f"the checkpoint of step {state.global_step} has no state of a {type(self).__name__}, so the schedule "
                "cannot be resumed from it; set resume_from_checkpoint to one made with this callback",
                "resume_from_checkpoint",
            )
        content = base64.b64decode(stored["attributes"]["saved"])
        saved = load_undamaged(io.BytesIO(content))
        self.driver.load_state_dict(saved["driver"])
        self._changes_before_loss = saved["changes_before_loss"]
        self._evaluated = dict(saved["evaluated"])
        self._saved = dict(saved["saved"])
