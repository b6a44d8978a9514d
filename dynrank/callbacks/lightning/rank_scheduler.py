"""The Lightning callback that changes ranks during a run by a schedule."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from dynrank.callbacks.lightning import training
from dynrank.callbacks.lightning.best import BestSoFar
from dynrank.callbacks.lightning.checkpoints import follow_sharded_checkpoint
from dynrank.callbacks.lightning.resume import has_missed_validation
from dynrank.callbacks.lightning.strategies import check_averages, check_strategy
from dynrank.callbacks.lightning.validation import logged_since
from dynrank.driver.driver import RankDriver
from dynrank.driver.event import RankEvent
from dynrank.driver.metrics import TRAIN_LOSS, TrainingLoss, check_observed
from dynrank.driver.training import Evaluate
from dynrank.driver.validation import validate
from dynrank.layers.peft_kernel import apply_lora_kernel
from dynrank.layers.peft_layers import follow_checkpoint_ranks
from dynrank.rank_map import RankMap
from dynrank.schedules import Schedule


class RankScheduler(Callback):
    """Changes the ranks of LoRA layers during training, of dynrank or of PEFT, in any LightningModule.

    A change is made at the start of a batch, between an optimizer step and the next forward; what is due at the end of
    the run, when the batch of the last step ends, before the last validation and checkpoint. Under manual optimization,
    which may have several optimizers, the module must call :meth:`step`, and no change comes before the first one. A
    checkpoint contains everything that a resumed run needs.

    Triggers read the metrics of each validation, and ``train/loss``: the mean loss of the steps since the last one, or
    since ranks have changed (without validation, they read it after each epoch). After a change that lowers ranks, the
    best so far no longer counts: ModelCheckpoint, EarlyStopping and ReduceLROnPlateau start anew. A change multiplies
    the adapters' rate by the event's ``lr_factor``, inside of each optimizer step alone, and ``lr/adapter`` is logged
    from then on. Callbacks with ``on_rank_change(trainer, pl_module, event)`` are called after each change and undo.

    Args:
        schedule: an int (``early_budget`` of that rank), a stage, or a list of stages (see :mod:`dynrank.schedules`).
        evaluate: returns the metrics of the present model, for stages whose changes are judged, and sets its own eval
            mode and no_grad. None: the module's own validation steps, of which no callback and no logger hears.
        keep_best_before: let the best so far, which may have higher ranks, still count: then none of these starts anew.
        rank_map: what the rank of single layers may become, as in ``add_lora`` and going before its, and before what
            the schedule says of all layers: {pattern, "attention" or "mlp": a mapping of ``pinned``, ``highest``,
            ``lowest`` or ``final_rank``}, or the path of a YAML file with this mapping below ``rank_pattern``.
        kernel: let PEFT's layers compute by the fused op, see :func:`dynrank.apply_lora_kernel`.

    Attributes:
        driver: carries out the schedule in the run.

    Raises:
        ConfigurationError: if a value cannot be used; when training starts, if ``rank_map`` does not fit.

    >>> RankScheduler(4, rank_map={"o_proj": {"pinned": True}, "mlp": {"highest": 8}}).history
    []
    """

    def __init__(
        self,
        schedule: Schedule,
        *,
        evaluate: Evaluate | None = None,
        keep_best_before: bool = False,
        rank_map: RankMap | None = None,
        kernel: bool = False,
    ) -> None:
        self.driver = RankDriver(schedule, rank_map=rank_map)
        self.evaluate = evaluate
        self.keep_best_before = keep_best_before
        self.kernel = kernel
        # Whether step() was called since the last batch began, and whether it was ever called.
        self._stepped = self._ever_stepped = False
        self._loss = TrainingLoss()
        self._reads_loss = TRAIN_LOSS in self.driver.monitors
        # Those before the present validation.
        self._metrics: Mapping[str, Any] = {}
        # From setup() on, and from on_train_start() on.
        self._best: BestSoFar | None = None
        self._run: training.LightningTraining | None = None

    @property
    def history(self) -> list[RankEvent]:
        """Every change of the run so far, and every attempt that was undone, also those before a resume."""
        return self.driver.history

    def step(self, pl_module: LightningModule) -> None:
        """Report, under manual optimization, an optimizer step after which no backward pass has begun.

        Call it in ``training_step`` after each optimizer step of the adapter, before its gradients are zeroed.
        Times are those of ``trainer.global_step``, which counts the steps of every optimizer.
        """
        if pl_module.automatic_optimization:
            raise RuntimeError("scheduler.step(module) is for manual optimization; this module's is automatic")
        self._stepped = self._ever_stepped = True
        self.driver.end_step(self._training, last=False)

    def state_dict(self) -> dict[str, Any]:
        return {"driver": self.driver.state_dict(), "loss": self._loss.state_dict(), "stepped": self._stepped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.driver.load_state_dict(state_dict.get("driver", {}))
        self._loss.load_state_dict(state_dict["loss"])
        self._stepped = state_dict["stepped"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        follow_checkpoint_ranks(pl_module)
        follow_sharded_checkpoint(trainer)
        if stage == "fit":
            check_strategy(trainer)
            if self.driver.stages:
                check_averages(trainer)
            # Another fit of the same trainer goes on with the best of the first one.
            if self._best is None or trainer.global_step == 0:
                self._best = BestSoFar(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # In setup the module may have no layers yet (configure_model).
        if self.kernel:
            apply_lora_kernel(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Lightning restores the data loaders' positions only if nobody has asked for the length of the run before.
        trainer.fit_loop._load_combined_loader_states()
        run = self._run = training.LightningTraining(trainer, pl_module, self.evaluate)
        if not trainer.enable_validation:
            check_observed(self.driver.stages, [TRAIN_LOSS])
        self.driver.start(run, training.run_length(trainer, pl_module))
        seen = self.driver.progress.observed_step
        # Without validation triggers read the loss at the end of an epoch, whose hooks a resumed run does not call.
        missed = has_missed_validation(trainer) if trainer.enable_validation else trainer.is_last_batch
        if seen != trainer.global_step and missed:
            own = training.LightningTraining(trainer, pl_module)
            self._observe(validate(own) if own.validates and (self.driver.observed or seen is None) else {})

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._metrics = dict(trainer.callback_metrics)
        # Lightning keeps the metrics of before a cut, so what was judged since then was judged by these.
        if self._best is not None and not self.keep_best_before and self.driver.progress.awaits_validation:
            self._best.load(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        metrics = logged_since(self._metrics, trainer)
        if trainer.sanity_checking:
            check_observed(self.driver.stages, {*metrics, TRAIN_LOSS})
        elif trainer.state.fn == "fit":
            self._observe(metrics)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if pl_module.automatic_optimization:
            between_steps = batch_idx % trainer.accumulate_grad_batches == 0
        else:
            between_steps = self._stepped
            self._stepped = False
        if between_steps and self.driver.is_due(trainer.global_step):
            self.driver.advance(self._training)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._reads_loss:
            self._loss.add(training.loss_of(outputs, trainer, pl_module))
        if pl_module.automatic_optimization:
            self.driver.end_step(self._training, last=training.is_last_step(trainer))
        elif self._stepped and training.is_last_step(trainer):
            self.driver.end(self._training)
        if rates := self.driver.adapter_rates:
            pl_module.log_dict(rates)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.driver.stages and not self._ever_stepped and self._run is not None:
            self._run.check_is_stepped()
        if not trainer.enable_validation:
            self._observe({})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.driver.finish(self._training)

    def on_rank_change(self, trainer: Trainer, pl_module: LightningModule, event: RankEvent) -> None:
        if not event.undone:
            self._loss.forget()
        if event.lowers and not self.keep_best_before and self._best is not None:
            self._best.forget(trainer, event)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.driver.abort()
        self._run = None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._run = None

    @property
    def _training(self) -> training.LightningTraining:
        assert self._run is not None
        return self._run.now()

    def _observe(self, metrics: Mapping[str, Any]) -> None:
        """Let triggers read ``metrics`` of a validation, and the loss of the steps before it."""
        self.driver.validated(self._training, {**metrics, TRAIN_LOSS: self._loss.look()})
