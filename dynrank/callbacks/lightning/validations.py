"""Validations inside ``fit`` when Lightning would not run them, and the metrics of a validation."""

import copy

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.utilities.model_helpers import is_overridden

from dynrank.callbacks.lightning import private


class _Metrics(Callback):
    """Keeps the metrics of a validation."""

    def __init__(self) -> None:
        # Without any batch, Lightning calls no hook of a validation.
        self.logged: dict[str, float] = {}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.logged = validation_metrics(trainer)


def validate_silently(trainer: Trainer, most: int | None = None) -> dict[str, float]:
    """Validate now, in addition to the run's own validations, and return the metrics.

    Call this between two batches of ``fit``. No callback is called, loggers get nothing, and the trainer's metrics do
    not change. About ``most`` batches are taken, at equal distances; None: all.
    """
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    metrics = _Metrics()
    bars = [_without_hooks(callback) for callback in callbacks if isinstance(callback, ProgressBar)]
    trainer.callbacks = [*bars, metrics]  # type: ignore[attr-defined]
    try:
        with private.nothing_logged(trainer), private.fewer_batches(trainer, most):
            run_validation(trainer)
    finally:
        trainer.callbacks = callbacks  # type: ignore[attr-defined]
    return metrics.logged


def _without_hooks(bar: ProgressBar) -> ProgressBar:
    """A copy whose hooks do nothing.

    The thread that draws a RichProgressBar asks the trainer for a bar of its class.
    """
    hooks = {name: lambda *_, **__: None for name in vars(Callback) if name.startswith("on_")}
    copied = copy.copy(bar)
    copied.__class__ = type(type(bar).__name__, (type(bar),), hooks)
    return copied


def validation_metrics(trainer: Trainer) -> dict[str, float]:
    """The metrics of the validation that ends now, without training's; call this from ``on_validation_end``."""
    results = private.results(trainer)
    loader = results.dataloader_idx
    found = dict[str, float]()
    try:
        for index in dict.fromkeys([loader, *(result.meta.dataloader_idx for result in results.values())]):
            # Lightning returns only metrics of the selected data loader, and those that were logged without an index.
            results.dataloader_idx = index
            found |= {name: float(value) for name, value in results.metrics(on_step=False)["callback"].items()}
    finally:
        results.dataloader_idx = loader
    return found


def logged_by_callbacks(trainer: Trainer, pl_module: LightningModule) -> tuple[set[str], set[str]]:
    """The metrics of the validation that ends now which callbacks have logged, and those which callbacks may have.

    What is logged in a hook that the module does not have is of callbacks; if it has the hook, and a callback has it,
    too, nobody knows. Metrics of one of several data loaders are left out: Lightning gives them other names.
    """
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    own: set[str] = set()
    others: set[str] = set()
    shared: set[str] = set()
    for result in private.results(trainer).values():
        # Of several loaders it is "validation_step.0".
        hook = result.meta.fx.partition(".")[0]
        if result.meta.dataloader_idx is not None:
            names = own
        elif not is_overridden(hook, pl_module):
            names = others
        else:
            names = shared if any(_has(callback, hook) for callback in callbacks) else own
        names.add(result.meta.name)
    return others - own - shared, shared - own


def _has(callback: Callback, hook: str) -> bool:
    """Whether the callback has a hook of its own; ``validation_step`` is of modules alone."""
    return hook in vars(Callback) and is_overridden(hook, callback)


def run_validation(trainer: Trainer) -> None:
    """Validate now, with all hooks and logged metrics, and set the trainer back to training."""
    val_loop = trainer.fit_loop.epoch_loop.val_loop
    with private.first_batch_kept(trainer):
        trainer.validating = True
        val_loop.restarting = False
        val_loop.run()
        trainer.training = True
