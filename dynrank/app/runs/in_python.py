"""A run from Python: what :func:`dynrank.compose` returns is trained as ``dynrank-train`` trains it."""

from datetime import datetime
from pathlib import Path

from omegaconf import DictConfig

from dynrank.app.runs import job
from dynrank.app.runs.report.record import RunRecord, read_run


def run(config: DictConfig, folder: str | Path | None = None) -> RunRecord:
    """Train, test and export by a configuration; returns the record of the finished run.

    The run is in this process; several processes are started by ``dynrank-train``.

    Args:
        config: what :func:`dynrank.compose` has returned, also with values that you have changed since. It is not
            changed.
        folder: a new folder for the files of the run, or with ``ckpt_path=last`` the folder of an interrupted run;
            None: outputs/DATE/TIME, as for ``dynrank-train``.

    Raises:
        ConfigurationError: if a value cannot be used, or the folder holds a run already.

    Example::

        config = dynrank.compose(["task=classification", "data.train=tickets.csv", "lora.rank=8"])
        run = dynrank.run(config, "tickets")
        print(run)  # <run 'tickets': 282 steps, rank 1-8, test/loss …>
        dynrank.plot.ranks(run).savefig("ranks.png")
    """
    folder = Path("outputs", f"{datetime.now():%Y-%m-%d/%H-%M-%S}") if folder is None else Path(folder)
    job.run(config, folder)
    return read_run(folder)
