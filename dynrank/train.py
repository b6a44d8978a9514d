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
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) != "0":  # started by torchrun or srun
        sys.argv.append("hydra.output_subdir=null")  # the first process writes .hydra/
    with usage_errors():
        _train()


if __name__ == "__main__":
    main()
