"""``dynrank-train``: compose a run with Hydra and do it."""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from dynrank.commands.exits import usage_errors
from dynrank.output.console import quiet_imports
from dynrank.run.config import CONFIG_MODULE, CONFIG_NAME
from dynrank.run.sweep.run import run_in_sweep
from dynrank.run.sweep.table import table_at_end

PROCESS_NUMBERS = ("RANK", "SLURM_PROCID", "LOCAL_RANK", "NODE_RANK")  # as torchrun, srun and Lightning set them


@hydra.main(config_path=f"pkg://{CONFIG_MODULE}", config_name=CONFIG_NAME, version_base="1.3")
def _train(config: DictConfig) -> float | None:
    """Make a run; in a sweep, return what a sweeper looks at."""
    quiet_imports()
    hydra_config = HydraConfig.get()
    folder = Path(hydra_config.runtime.output_dir)
    record = partial(_record, OmegaConf.create(OmegaConf.to_container(config)), folder)
    if hydra_config.mode == RunMode.MULTIRUN:
        return run_in_sweep(config, folder, record)
    from dynrank.run.job import run  # torch and transformers load here, so that --help need not wait for them

    with usage_errors():  # here, too: Hydra prints a line of its own for what gets out
        run(config, folder, record=record)
    return None


def _record(config: Any, folder: Path) -> None:
    """Write .hydra/ as Hydra does, which would write over that of an earlier run before the folder is refused."""
    where = folder / ".hydra"
    where.mkdir(exist_ok=True)
    hydra_config = HydraConfig.get()
    contents = {"config": config, "hydra": OmegaConf.create({"hydra": hydra_config})}
    for name, content in {**contents, "overrides": hydra_config.overrides.task}.items():
        OmegaConf.save(content, where / f"{name}.yaml")


def main() -> None:
    """Entry point; see :func:`dynrank.commands.exits.usage_errors` for the exit codes."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions reach us instead of being printed and turned into exit code 1
    if any(os.environ.get(name, "0") != "0" for name in PROCESS_NUMBERS):
        # the first process writes the run's files; the time of day in the name of its folder may be another one here
        sys.argv += ["hydra.output_subdir=null", "hydra/job_logging=none"]
        if "ckpt_path=last" not in sys.argv:  # which is looked for in the folder
            sys.argv.append("hydra.run.dir=.")
    with usage_errors(), table_at_end():
        _train()


if __name__ == "__main__":
    main()
