"""A validation for a change under Lightning, and the metrics of the run's own validations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from math import nan
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.data import extract_batch_size
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torchmetrics import MaxMetric, MeanMetric, Metric, MinMetric, SumMetric

from dynrank.callbacks.lightning import private

_REDUCTIONS = {"mean": MeanMetric, "sum": SumMetric, "max": MaxMetric, "min": MinMetric}


def validate(
    trainer: Trainer, module: LightningModule, ended: Callable[[Mapping[str, Any]], None] = lambda _: None
) -> dict[str, Any]:
    """The metrics that ``module`` logs when its validation hooks and steps are called.

    Call this between two steps of ``fit``. No callback is called, no logger gets anything, and what the trainer knows
    of metrics stays: ``module.log`` is caught, and its values are averaged as Lightning averages them. ``ended`` gets
    them while weights that the module's hooks may have put in place are still there.
    """
    loaders = CombinedLoader(private.val_dataloaders(trainer), "sequential")
    loaders.limits = trainer.num_val_batches
    logged = _Logged(several=len(loaders.flattened) > 1)
    with torch.no_grad(), _validating(trainer, module), logged.caught(module):
        module.on_validation_start()
        module.on_validation_epoch_start()
        for batch, *place in loaders:
            _step(trainer, module, logged, batch, place)
        logged.batch = None
        module.on_validation_epoch_end()
        metrics = logged.metrics()
        ended(metrics)
        module.on_validation_end()
    return metrics


def _step(trainer: Trainer, module: LightningModule, logged: _Logged, batch: Any, place: list[int]) -> None:
    """Validate one batch, with its number and that of its loader in ``place``."""
    strategy: Any = trainer.strategy
    batch = trainer.precision_plugin.convert_input(batch)
    # This calls the hook of the module, or of its datamodule.
    batch = module._on_before_batch_transfer(batch, dataloader_idx=place[1])
    batch = strategy.batch_to_device(batch, dataloader_idx=place[1])
    logged.batch = batch
    logged.loader = place[1]
    # A module with a single loader need not take the loader's number, and its step no number at all.
    arguments = (batch, *place) if logged.several else (batch, place[0])
    takes_number = is_param_in_hook_signature(module.validation_step, "batch_idx", min_args=2)
    module.on_validation_batch_start(*arguments)
    outputs = strategy.validation_step(*(arguments if takes_number else (batch, *arguments[2:])))
    module.on_validation_batch_end(outputs, *arguments)


@contextmanager
def _validating(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """A block in which the trainer says that it validates, and the module is in evaluation mode."""
    modes = [(part, part.training) for part in module.modules()]
    stage = trainer.state.stage
    trainer.validating = True
    try:
        module.on_validation_model_eval()
        yield
        if is_overridden("on_validation_model_train", module):
            module.on_validation_model_train()
    finally:
        trainer.state.stage = stage
        for part, mode in modes:
            part.training = mode


class _Logged:
    """What a module logs in a validation for a change.

    Attributes:
        several: whether there are several data loaders.
        batch: the batch that is validated; None: none is.
        loader: the number of its loader.
    """

    def __init__(self, *, several: bool) -> None:
        self.several = several
        self.batch: Any = None
        self.loader = 0
        self._means: dict[str, Metric] = {}
        self._theirs: dict[str, Metric] = {}

    @contextmanager
    def caught(self, module: LightningModule) -> Iterator[None]:
        """A block in which ``module.log`` and ``log_dict``, which calls it, log here."""
        own = vars(module)
        before = {"log": own["log"]} if "log" in own else {}
        own["log"] = self.log
        try:
            yield
        finally:
            del own["log"]
            own.update(before)

    def log(
        self,
        name: str,
        value: Any,
        *_: Any,
        reduce_fx: Any = "mean",
        sync_dist: bool = False,
        add_dataloader_idx: bool = True,
        batch_size: int | None = None,
        **__: Any,
    ) -> None:
        """Stands for :meth:`LightningModule.log`; what only matters to loggers is ignored."""
        of_loader = self.several and self.batch is not None and add_dataloader_idx
        suffix = f"/dataloader_idx_{self.loader}" if of_loader else ""
        name = f"{name}{suffix}"
        if isinstance(value, Metric):
            self._theirs[name] = value
            return
        if name not in self._means:
            kind = _REDUCTIONS[getattr(reduce_fx, "__name__", reduce_fx)]
            # NaN counts, as in Lightning; torchmetrics 1.9 forgets the weights where its checks are disabled.
            self._means[name] = kind(nan_strategy=nan, sync_on_compute=sync_dist)
        mean = self._means[name]
        if isinstance(value, Tensor):
            mean.to(value.device)
            value = value.detach()
        # In a step of bfloat16 that is torch's default, and so the metric's, until this.
        mean.set_dtype(torch.promote_types(torch.get_default_dtype(), torch.float32))
        if isinstance(mean, MeanMetric):
            size = 1 if self.batch is None else batch_size or extract_batch_size(self.batch)
            mean.update(value, size)
        else:
            mean.update(value)

    def metrics(self) -> dict[str, Any]:
        """{name: its value}; the module's own metrics of torchmetrics are reset, as after each validation."""
        found = {name: metric.compute() for name, metric in (self._means | self._theirs).items()}
        for metric in self._theirs.values():
            metric.reset()
        return found


def logged_since(before: Mapping[str, Any], trainer: Trainer) -> dict[str, Tensor]:
    """The metrics of the validation that ends, without those that the trainer keeps from ``before`` it.

    The trainer has another object for each that was logged anew.
    """
    return {name: value for name, value in trainer.callback_metrics.items() if value is not before.get(name)}
