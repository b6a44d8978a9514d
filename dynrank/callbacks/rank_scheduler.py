"""The callback that lowers ranks in the middle of a run, once training has converged."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from dynrank.callbacks.missed_validation import run_missed_validation
from dynrank.errors import ConfigurationError
from dynrank.layers.base import RankedLayer
from dynrank.layers.inject import lora_layers
from dynrank.layers.peft_layers import follow_checkpoint_ranks
from dynrank.optim import check_optimizer
from dynrank.resizing import METRICS, LayerReport, check_targets, resize
from dynrank.rewarmup import Rewarmup
from dynrank.triggers import Plateau

LOW_RATE = 0.1  # below this share of the starting learning rate, a drop has little left to recover with


@dataclass(frozen=True)
class RankEvent:
    """One change of ranks: the optimizer step before which it was made, why, what it did, and if it was the last."""

    step: int
    reason: str
    layers: tuple[LayerReport, ...]
    last: bool


class RankScheduler(Callback):
    """Brings LoRA layers from their rank to ``final_rank`` when a trigger says that training has converged.

    Works in any LightningModule with automatic optimization whose model went through :func:`dynrank.add_lora`. The
    trigger observes its metric after each validation (after each epoch, if nothing is validated). The change is made at
    the start of a later batch, between an optimizer step and the next forward, never with gradients pending. A
    checkpoint holds everything that is needed to go on from it, whether the change is still to come, decided, or made.

    Callbacks of the trainer that define ``on_rank_change(trainer, pl_module, event)`` are told of each
    :class:`RankEvent`.

    Args:
        final_rank: rank to end at. A layer with a ``final_rank`` of its own ends there; a pinned layer is never
            touched; a layer already below stays.
        trigger: when to act; ``Plateau()`` when None.
        drops: in how many changes to get there, each by the same factor (64 -> 8 in 3: 32, 16, 8).
        deadline: share of the run's optimizer steps, in (0, 1), at which the final rank is taken in any case; None:
            never.
        rewarmup_steps: optimizer steps over which the learning rate is ramped up again after a change; 0: none.
        metric: what truncation minimises; "weight" is the update's Frobenius norm.
        optimizer_state: "transport" carries the moments along, "reset" forgets them.

    Raises:
        ConfigurationError: if a value cannot be used.
    """

    def __init__(
        self,
        final_rank: int,
        trigger: Plateau | None = None,
        *,
        drops: int = 1,
        deadline: float | None = 0.75,
        rewarmup_steps: int = 0,
        metric: str = "weight",
        optimizer_state: str = "transport",
    ) -> None:
        for name, value, least in (
            ("final_rank", final_rank, 1),
            ("drops", drops, 1),
            ("rewarmup_steps", rewarmup_steps, 0),
        ):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigurationError(
                    f"{name} must be an int of at least {least}, got {value!r}; set schedule.{name}"
                )
        if deadline is not None and not 0 < deadline < 1:
            raise ConfigurationError(
                f"deadline must be a share in (0, 1) or null, got {deadline!r}; set schedule.deadline"
            )
        if metric not in METRICS:
            raise ConfigurationError(f"metric must be one of {METRICS}, got {metric!r}; set schedule.metric")
        if trigger is not None and not isinstance(trigger, Plateau):
            raise ConfigurationError(f"trigger must be a Plateau, got {trigger!r}; set schedule.trigger._target_")
        self.final_rank, self.trigger = final_rank, trigger or Plateau()
        self.drops, self.deadline, self.rewarmup_steps = drops, deadline, rewarmup_steps
        self.metric, self.optimizer_state = metric, optimizer_state
        self.history: list[RankEvent] = []
        self._pending: str | None = None  # why a change has been decided that is still to be made
        self._observed_step = -1
        self._rewarmup: Rewarmup | None = None
        self._rewarmup_done: int | None = None  # steps of an unfinished ramp in the checkpoint resumed from

    @property
    def finished(self) -> bool:
        """Whether the last change has been made."""
        return bool(self.history) and self.history[-1].last

    @property
    def _one_left(self) -> bool:
        return len(self.history) + 1 == self.drops

    def final_ranks(self, model: nn.Module) -> dict[str, int]:
        """Where each layer of ``model`` ends: {name: rank}."""
        return {name: self._final_rank(layer) for name, layer in lora_layers(model)}

    def check_layers(self, model: nn.Module) -> None:
        """Refuse a model that this schedule cannot work on.

        Raises:
            ConfigurationError: if there are no LoRA layers, or ``final_rank`` is above the rank of all that it applies
            to.
        """
        layers = dict(lora_layers(model))
        if not layers:
            raise ConfigurationError(
                "RankScheduler needs a model with LoRA layers; call dynrank.add_lora on it (lora.target_modules)"
            )
        ranks = [layer.rank for layer in layers.values() if not layer.pinned and layer.final_rank is None]
        if not self.history and ranks and self.final_rank > max(ranks):
            raise ConfigurationError(
                f"final_rank must be at most rank = {max(ranks)}, got {self.final_rank}; "
                "set schedule.final_rank or lora.rank"
            )
        check_targets(layers, self.final_ranks(model))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        follow_checkpoint_ranks(pl_module)
        if stage != "fit":
            return
        if not pl_module.automatic_optimization:
            raise ConfigurationError(
                "RankScheduler needs automatic optimization: it cannot tell when gradients are pending otherwise; "
                "call dynrank.resize after an optimizer step of your own instead"
            )
        if trainer.world_size > 1:
            raise ConfigurationError(
                f"RankScheduler runs in one process so far, got {trainer.world_size}; set trainer.devices=1"
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.check_layers(pl_module)
        parameters = [p for _, layer in lora_layers(pl_module) for p in (layer.lora_A, layer.lora_B)]
        for optimizer in trainer.optimizers:
            check_optimizer(optimizer, parameters, self.optimizer_state)
        if self.deadline is not None and trainer.estimated_stepping_batches == float("inf"):
            raise ConfigurationError(
                "a deadline needs a run of known length; set trainer.max_steps, or schedule.deadline=null"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._rewarmup_done is not None:
            self._rewarmup = Rewarmup(trainer.optimizers[0], self.rewarmup_steps, self._rewarmup_done)
            self._rewarmup_done = None
        if self._observed_step != trainer.global_step:
            run_missed_validation(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            self._observe(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.enable_validation:
            self._observe(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.finished or batch_idx % trainer.accumulate_grad_batches:
            return
        late = self.deadline is not None and trainer.global_step >= self.deadline * trainer.estimated_stepping_batches
        if self._pending or late:
            reason = self._pending or f"deadline of {self.deadline:g} of the run"
            self._change(trainer, pl_module, reason, last=late or self._one_left)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._pending and not self.finished:  # decided by the very last validation: there is no next batch
            self._change(trainer, pl_module, self._pending, last=self._one_left)
        if not self.finished:
            rank_zero_warn(
                f"training ended before {self.trigger.monitor!r} converged: the ranks are not final; "
                "set schedule.deadline or train longer"
            )

    def state_dict(self) -> dict[str, Any]:
        """Plain containers only, so that a checkpoint loads with ``weights_only=True``."""
        return {
            "trigger": self.trigger.state_dict(),
            "pending": self._pending,
            "observed_step": self._observed_step,
            "history": [asdict(event) for event in self.history],
            "rewarmup_done": self._rewarmup.done if self._rewarmup and not self._rewarmup.finished else None,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.trigger.load_state_dict(state_dict["trigger"])
        self._pending, self._observed_step = state_dict["pending"], state_dict["observed_step"]
        self._rewarmup_done = state_dict["rewarmup_done"]
        self.history = [
            RankEvent(**{**event, "layers": tuple(LayerReport(**layer) for layer in event["layers"])})
            for event in state_dict["history"]
        ]

    def _final_rank(self, layer: RankedLayer) -> int:
        if layer.pinned:
            return layer.rank
        return min(layer.rank, layer.final_rank if layer.final_rank is not None else self.final_rank)

    def _observe(self, trainer: Trainer) -> None:
        step = trainer.global_step
        if step == self._observed_step:  # a resumed loop may end one validation twice
            return
        self._observed_step = step
        if self.finished or self._pending:
            return
        monitor, metrics = self.trigger.monitor, trainer.callback_metrics
        if monitor not in metrics:
            raise ConfigurationError(
                f"monitor must be a logged metric, got {monitor!r}; logged: {sorted(metrics)}; "
                "set schedule.trigger.monitor"
            )
        if self.trigger.observe(float(metrics[monitor]), step):
            self._pending = f"plateau of {monitor}"

    def _change(self, trainer: Trainer, pl_module: LightningModule, reason: str, *, last: bool) -> None:
        step, left = trainer.global_step, 1 if last else self.drops - len(self.history)
        targets = {name: _towards(layer.rank, self._final_rank(layer), left) for name, layer in lora_layers(pl_module)}
        reports = resize(
            pl_module, targets, optimizers=trainer.optimizers, metric=self.metric, optimizer_state=self.optimizer_state
        )
        event = RankEvent(step, reason, tuple(reports), last)
        self.history.append(event)
        self._pending = None
        self.trigger.reset(step)
        self._warn_of_low_rate(trainer)
        if self.rewarmup_steps:
            if self._rewarmup:
                self._rewarmup.remove()
            self._rewarmup = Rewarmup(
                trainer.optimizers[0], self.rewarmup_steps
            )  # automatic optimization has one optimizer
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            told = getattr(callback, "on_rank_change", None)
            if told is not None:
                told(trainer, pl_module, event)

    def _warn_of_low_rate(self, trainer: Trainer) -> None:
        groups = trainer.optimizers[0].param_groups
        rates = [(float(group["lr"]), float(group.get("initial_lr", group["lr"]))) for group in groups]
        share = min((now / start for now, start in rates if start > 0), default=1.0)
        if share < LOW_RATE:
            rank_zero_warn(
                f"the learning rate at the change of rank is {share:.1%} of its start, too little to recover with; "
                "set an earlier schedule.deadline or a later decay (optimizer.decay)"
            )


def _towards(rank: int, final_rank: int, changes_left: int) -> int:
    """The next rank on a geometric way of ``changes_left`` equal factors; 64 -> 8 in 3 changes starts with 32."""
    share: float = (final_rank / rank) ** (1 / changes_left)
    return max(final_rank, round(rank * share))
