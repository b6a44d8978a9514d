"""Recording the texts that a model writes in validations and the test: in a CSV file, and in the loggers."""

import csv
from pathlib import Path
from textwrap import indent

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

COLUMNS = ("step", "split", "prompt", "wanted", "written")


class Generations(Callback):
    """Records the texts that a module has put into its list ``generations``: (prompt, wanted, written).

    They are added to the CSV file ``file``, and shown by TensorBoard (``val/written``), Weights & Biases (a table of
    that name) and MLflow (a file). With several processes, process 0 records the texts of its own share. Validations
    that check a change of ranks are not recorded.
    """

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _texts(pl_module).clear()

    on_test_start = on_validation_start

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._record(trainer, _texts(pl_module), "val")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._record(trainer, _texts(pl_module), "test")

    def _record(self, trainer: Trainer, texts: list[tuple[str, ...]], split: str) -> None:
        if not texts or not trainer.is_global_zero or trainer.sanity_checking:
            return
        new = not self.file.exists()
        step = trainer.global_step
        with self.file.open("a", newline="", encoding="utf-8") as opened:
            writer = csv.writer(opened)
            if new:
                writer.writerow(COLUMNS)
            writer.writerows((step, split, *text) for text in texts)
        for logger in trainer.loggers:
            _show(logger, f"{split}/written", texts, step)


def _texts(module: LightningModule) -> list[tuple[str, ...]]:
    texts: list[tuple[str, ...]] = getattr(module, "generations", [])
    return texts


def _show(logger: Logger, name: str, texts: list[tuple[str, ...]], step: int) -> None:
    titles = COLUMNS[2:]
    parts = [
        f"**{title}**\n\n{indent(part, '    ')}" for text in texts for title, part in zip(titles, text, strict=True)
    ]
    if isinstance(logger, WandbLogger):
        logger.log_text(name, columns=[*titles], data=[[*text] for text in texts], step=step)
    elif isinstance(logger, TensorBoardLogger):
        logger.experiment.add_text(name, "\n\n".join(parts), step)
    elif isinstance(logger, MLFlowLogger):
        logger.experiment.log_text(str(logger.run_id), "\n\n".join(parts), f"{name}_{step}.md")
