"""Recording the texts that a model writes in validations and the test: in a CSV file, and in the loggers."""

import csv
from pathlib import Path
from typing import Any

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
        self._record(trainer, pl_module, "val")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._record(trainer, pl_module, "test")

    def _record(self, trainer: Trainer, module: LightningModule, split: str) -> None:
        texts = [tuple(text) for text in _texts(module)]
        if texts and trainer.is_global_zero and not trainer.sanity_checking:
            step, new = trainer.global_step, not self.file.exists()
            with self.file.open("a", newline="", encoding="utf-8") as opened:
                csv.writer(opened).writerows([*([COLUMNS] if new else []), *((step, split, *text) for text in texts)])
            for logger in trainer.loggers:
                _show(logger, f"{split}/written", texts, step)


def _texts(module: LightningModule) -> list[Any]:
    texts: list[Any] = getattr(module, "generations", [])
    return texts


def _show(logger: Logger, name: str, texts: list[tuple[str, ...]], step: int) -> None:
    if isinstance(logger, WandbLogger):
        logger.log_text(name, columns=[*COLUMNS[2:]], data=[[*text] for text in texts], step=step)
        return
    page = "\n\n---\n\n".join("\n\n".join(map(_part, COLUMNS[2:], text)) for text in texts)
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_text(name, page, step)
    elif isinstance(logger, MLFlowLogger):
        logger.experiment.log_text(str(logger.run_id), page, f"{name}_{step}.md")


def _part(title: str, text: str) -> str:
    indented = "\n".join(f"    {line}" for line in text.split("\n"))
    return f"**{title}**\n\n{indented}"
