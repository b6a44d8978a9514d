"""``dynrank-train``: compose a run with Hydra and do it."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from dynrank.config import CONFIG_MODULE, CONFIG_NAME
from dynrank.exits import usage_errors

PROCESS_NUMBERS = ("RANK", "SLURM_PROCID", "LOCAL_RANK", "NODE_RANK")  # as torchrun, srun and Lightning set them


@hydra.main(config_path=f"pkg://{CONFIG_MODULE}", config_name=CONFIG_NAME, version_base="1.3")
def _train(config: DictConfig) -> None:
    logging.getLogger("matplotlib").setLevel(logging.WARNING)  # it tells of its font cache while it is imported
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # and this one of kernels that nothing here needs
    from dynrank.job import run  # torch and transformers load here, so that --help need not wait for them

    hydra_config = HydraConfig.get()
    run(config, Path(hydra_config.runtime.output_dir), sweep=hydra_config.mode == RunMode.MULTIRUN)


def main() -> None:
    """Entry point; see :func:`dynrank.exits.usage_errors` for the exit codes."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions reach us instead of being printed and turned into exit code 1
    if any(os.environ.get(name, "0") != "0" for name in PROCESS_NUMBERS):
        # the first process writes the run's files; the time of day in the name of its folder may be another one here
        sys.argv += ["hydra.run.dir=.", "hydra.output_subdir=null", "hydra/job_logging=none"]
    with usage_errors():
        _train()


if __name__ == "__main__":
    main()
