"""Validations inside ``fit`` when Lightning would not run them, and the metrics of a validation."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
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
    metrics = _Metrics()
    progress = trainer.fit_loop.epoch_loop.val_loop.batch_progress
    before = progress.state_dict()
    with (
        silent(trainer.callbacks, "on_"),  # type: ignore[attr-defined]
        silent(trainer.loggers, "log_"),
        private.metrics_kept(trainer),
        private.fewer_batches(trainer, most),
        also_called(trainer, metrics),
    ):
        run_validation(trainer)
    progress.load_state_dict(before)
    return metrics.logged


@contextmanager
def silent(objects: Iterable[Any], prefix: str) -> Iterator[None]:
    """Let the methods of ``objects`` whose names begin with ``prefix`` do nothing inside the block.

    The objects stay where they are: a module may ask the trainer for its checkpoint callback, or a logger for its
    folder, and the thread that draws a RichProgressBar asks for the bar.
    """
    before = []
    for owner in objects:
        own = vars(owner)
        names = [name for name in dir(type(owner)) if name.startswith(prefix) and callable(getattr(type(owner), name))]
        before.append((own, names, {name: own[name] for name in names if name in own}))
        own.update(dict.fromkeys(names, _nothing))
    try:
        yield
    finally:
        # An object may be there twice.
        for own, names, present in reversed(before):
            for name in names:
                del own[name]
            own.update(present)


def _nothing(*_: object, **__: object) -> None:
    pass


@contextmanager
def also_called(trainer: Trainer, callback: Callback) -> Iterator[None]:
    """Let the trainer call ``callback``, too, inside the block."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    callbacks.append(callback)
    try:
        yield
    finally:
        callbacks.remove(callback)


def generators_of(loaders: Iterable[Any]) -> list[torch.Generator]:
    """The generators from which data ``loaders`` draw their order and the seeds of their workers.

    A loader without one draws from torch's own.
    """
    found = dict[int, torch.Generator]()
    waiting = [*loaders]
    while waiting:
        owner = waiting.pop()
        generator = getattr(owner, "generator", None)
        if isinstance(generator, torch.Generator):
            found[id(generator)] = generator
        parts = [getattr(owner, name, None) for name in ("batch_sampler", "sampler")]
        waiting += [part for part in parts if part is not None]
    return [*found.values()]


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
