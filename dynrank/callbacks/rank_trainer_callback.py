"""The same schedule in transformers' Trainer (and TRL's, which are made of it)."""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from transformers.trainer_callback import ExportableState, TrainerCallback

from dynrank.change.optimizer_state import check_optimizer
from dynrank.driver.attempt import RankEvent
from dynrank.driver.driver import RankDriver
from dynrank.errors import ConfigurationError
from dynrank.layers.finding import adapter_parameters, lora_layers
from dynrank.layers.peft_layers import follow_checkpoint_ranks
from dynrank.schedules import How, RankFunction, Stage
from dynrank.triggers import Run

__all__ = ["RankTrainerCallback"]


class RankTrainerCallback(RankDriver, TrainerCallback, ExportableState):  # type: ignore[misc]
    """Changes the ranks of LoRA layers during ``transformers.Trainer.train``, in one process.

    The model went through :func:`dynrank.add_lora` or PEFT's ``get_peft_model``. Give the callback to the Trainer when
    that is made (``callbacks=[...]``), or a checkpoint from after a change does not fit a model of PEFT's. Changes are
    made before the first batch of an optimizer step. Metrics have the Trainer's names: ``Plateau("eval_loss")``,
    ``How(check_monitor="eval_loss")``; what is logged in training is there, too (``loss``, every ``logging_steps``).

    Its state is part of each checkpoint's ``trainer_state.json``, the file that the Trainer writes last: without it a
    checkpoint is none. ``train(resume_from_checkpoint=...)`` goes on from before, at or after a change. With
    ``load_best_model_at_end`` the ranks that come back are those of the best checkpoint.

    Args:
        schedule: as in :class:`dynrank.callbacks.RankScheduler`.
        how: how changes are made, for stages that don't say; ``How()`` when None.
        evaluate: evaluates the model as it is, for stages with ``max_regression``: ``lambda: trainer.evaluate()``.

    Attributes:
        history: every :class:`RankEvent` of the run, also those before a resume.

    Raises:
        ConfigurationError: if a value cannot be used.
    """

    def __init__(
        self,
        schedule: int | Stage | Sequence[Stage] | RankFunction,
        how: How | None = None,
        *,
        evaluate: Callable[[], Any] | None = None,
    ) -> None:
        super().__init__(schedule, how)
        self.evaluate = evaluate
        self._logged: dict[str, float] = {}
        self._evaluated: dict[str, float] = {}  # by the last evaluation, of one data set or several
        self._evaluated_step = -1
        self._unobserved = self._in_training = False

    # The Trainer's events

    def on_init_end(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **_: Any) -> None:
        if model is not None:
            follow_checkpoint_ranks(model)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        training = HFTraining(self, state, kwargs)
        _check_trainer(args, training, self)
        follow_checkpoint_ranks(training.model)
        if state.global_step:
            self._load(state)
        self.start(training, _run(args, state, kwargs["train_dataloader"]))
        for how in self.hows:
            factors = adapter_parameters(training.model)
            check_optimizer(training.optimizers[0], factors, how.optimizer_state)
        self.resume(training)
        self._in_training = True

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        training = HFTraining(self, state, kwargs)
        self._observe_evaluation(training)
        self.advance(training)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.end_step(HFTraining(self, state, kwargs, steps_uncounted=1))  # the Trainer counts after this event

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **_: Any) -> None:
        self._logged |= _numbers(logs or {})

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Mapping[str, Any], **kwargs: Any) -> None:
        if not self._in_training or not state.global_step:
            return
        if self._evaluated_step != state.global_step or self._checking:
            self._evaluated = {}
        self._evaluated_step = state.global_step
        self._evaluated |= _numbers(metrics)
        self._logged |= self._evaluated
        self._unobserved = True
        if self._logged.keys() >= set(self.monitors):  # of several data sets the last one completes them
            self._observe_evaluation(HFTraining(self, state, kwargs))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        training = HFTraining(self, state, kwargs)
        if args.load_best_model_at_end:
            training.optimizers = []  # it knows the last weights; those that have been loaded may have other ranks
        self._observe_evaluation(training)
        self.finish(training)
        self._in_training = False

    def _observe_evaluation(self, training: HFTraining) -> None:
        if self._unobserved:
            self._unobserved = False
            self.validated(training, self._evaluated)

    # The state in a checkpoint

    def state(self) -> dict[str, Any]:
        """For ``trainer_state.json``: JSON, so what :func:`torch.save` makes of the state is in base64."""
        buffer = io.BytesIO()
        torch.save({"driver": self.state_dict(), "logged": self._logged, "evaluated": self._evaluated}, buffer)
        return {"args": {}, "attributes": {"saved": base64.b64encode(buffer.getvalue()).decode("ascii")}}

    @classmethod
    def from_state(cls, state: Any) -> Any:
        """Refused: a schedule is not made from JSON.

        Raises:
            ConfigurationError: always.
        """
        raise ConfigurationError(
            f"{cls.__name__} takes its state from the checkpoint by itself; set "
            "restore_callback_states_from_checkpoint=False"
        )

    def _load(self, state: Any) -> None:
        stored = state.stateful_callbacks.get(type(self).__name__)
        if not isinstance(stored, Mapping) or "saved" not in stored.get("attributes", {}):
            raise ConfigurationError(
                f"the checkpoint of step {state.global_step} was made without one {type(self).__name__}, so the "
                "schedule cannot go on from it; set resume_from_checkpoint to one made with it"
            )
        content = base64.b64decode(stored["attributes"]["saved"])
        saved = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        self.load_state_dict(saved["driver"])
        self._logged, self._evaluated = dict(saved["logged"]), dict(saved["evaluated"])


class HFTraining:
    """A run of transformers' Trainer as :class:`dynrank.driver.attempt.Training`; made for one event."""

    averages: Sequence[nn.Module] = ()

    def __init__(
        self, callback: RankTrainerCallback, state: Any, kwargs: Mapping[str, Any], *, steps_uncounted: int = 0
    ) -> None:
        self.callback, self.state = callback, state
        self.step = int(state.global_step) + steps_uncounted
        self.model: nn.Module = kwargs["model"]
        optimizer = kwargs["optimizer"]
        self.optimizers: Sequence[Optimizer] = [getattr(optimizer, "optimizer", optimizer)]  # accelerate wraps it

    def logged(self) -> Mapping[str, float]:
        return self.callback._logged

    def validate(self) -> None:
        assert self.callback.evaluate is not None  # on_train_begin has seen to it
        self.callback.evaluate()

    def before_resize(self) -> None:
        """One process: nobody else knows the factors' shapes."""

    def resized(self) -> None:
        """Likewise."""

    def tell(self, hook: str, event: RankEvent) -> None:
        """Put the ranks after a change among what the Trainer has logged."""
        if hook == "on_rank_change":
            ranks = [layer.rank for _, layer in lora_layers(self.model)]
            values = {"rank/mean": sum(ranks) / len(ranks), "rank/max": float(max(ranks)), "step": self.step}
            self.state.log_history.append(values)

    def warn(self, message: str) -> None:
        warnings.warn(message, stacklevel=2)


def _check_trainer(args: Any, training: HFTraining, callback: RankTrainerCallback) -> None:
    if args.world_size > 1 or args.n_gpu > 1 or args.deepspeed or args.fsdp:
        raise ConfigurationError(
            f"RankTrainerCallback changes ranks in one process on one device, without DeepSpeed and FSDP; this Trainer "
            f"has {args.world_size} processes and {args.n_gpu} GPUs: set CUDA_VISIBLE_DEVICES to one, or train with "
            "dynrank.callbacks.RankScheduler (Lightning), which knows DDP and FSDP2"
        )
    for how in callback.hows:
        if how.max_regression is not None and callback.evaluate is None:
            raise ConfigurationError(
                f"max_regression={how.max_regression:g} evaluates before and after a change; give the callback "
                "evaluate=lambda: trainer.evaluate(), or set max_regression=None"
            )
        if args.fp16 and (how.metric == "loss" or how.new_rows == "gradient"):
            raise ConfigurationError(
                "fp16=True scales gradients by a factor that changes, which spoils statistics of them; set bf16=True, "
                "metric='output' or new_rows='orthogonal'"
            )


def _run(args: Any, state: Any, dataloader: Any) -> Run:
    batches = len(dataloader) if hasattr(dataloader, "__len__") else None
    return Run(
        int(state.max_steps), None if batches is None else max(1, -(-batches // args.gradient_accumulation_steps))
    )


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items() if isinstance(value, int | float)}
