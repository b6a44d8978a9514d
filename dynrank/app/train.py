"""``dynrank-train``: compose the configuration of a run with Hydra, and run it."""

from __future__ import annotations

import os
import sys
from functools import partial
from io import TextIOWrapper
from pathlib import Path

from dynrank import __version__
from dynrank.errors import ConfigurationError, train_packages

with train_packages("dynrank-train"):
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException
    from hydra.types import RunMode
    from omegaconf import DictConfig, OmegaConf

    from dynrank.app.console import quiet_imports
    from dynrank.app.runs.config import CONFIG_MODULE, CONFIG_NAME, complete
    from dynrank.app.runs.first_look import look
    from dynrank.app.runs.overrides import usage_errors
    from dynrank.app.runs.sweep import run_in_sweep

# torchrun, srun and Lightning set these.
PROCESS_NUMBERS = ("RANK", "SLURM_PROCID", "LOCAL_RANK", "NODE_RANK")


def _train(config: DictConfig) -> float | None:
    """Make a run; in a sweep, return the objective for the sweeper."""
    quiet_imports()
    hydra_config = HydraConfig.get()
    folder = Path(hydra_config.runtime.output_dir)
    overrides = hydra_config.overrides.task
    record = partial(_record, folder)
    if hydra_config.mode == RunMode.MULTIRUN:
        return run_in_sweep(config, overrides, folder, record)
    # Errors are caught here, too, because Hydra prints an extra line for errors that leave this function.
    with usage_errors():
        complete(config, overrides)
        look(config)
        # torch and transformers are loaded here, so that --help does not wait for them.
        from dynrank.app.runs.job import run

        run(config, folder, record=record)
    return None


def _record(folder: Path) -> None:
    """Write .hydra/ here, because Hydra would overwrite an earlier run's before that folder is refused."""
    hydra_config = HydraConfig.get()
    OmegaConf.save(OmegaConf.create({"hydra": hydra_config}), folder / ".hydra" / "hydra.yaml")
    OmegaConf.save(hydra_config.overrides.task, folder / ".hydra" / "overrides.yaml")


def main() -> None:
    """Entry point; :func:`dynrank.app.runs.overrides.usage_errors` has the exit codes."""
    # A character that the output's encoding lacks, such as the arrow of a table, must not end a run.
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    # Without this line Hydra would print its own version.
    if "--version" in sys.argv[1:]:
        print(f"dynrank {__version__}")
        return
    # With this variable Hydra raises exceptions here and does not turn them into exit code 1.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    if any(os.environ.get(name, "0") != "0" for name in PROCESS_NUMBERS):
        # Only process 0 writes the run's files; here the time in the folder's name may differ.
        sys.argv += ["hydra.output_subdir=null", "hydra/job_logging=none"]
        # ckpt_path=last needs the folder of the run.
        if "ckpt_path=last" not in sys.argv:
            sys.argv.append("hydra.run.dir=.")
    begun = []

    @hydra.main(config_path=f"pkg://{CONFIG_MODULE}", config_name=CONFIG_NAME, version_base="1.3")
    def train(config: DictConfig) -> float | None:
        begun.append(config)
        return _train(config)

    with usage_errors():
        try:
            train()
        except OSError as error:
            # Before the run begins, Hydra makes the folder for it; or a choice is missing, or the output's reader gone.
            if begun or isinstance(error, HydraException | BrokenPipeError):
                raise
            place = f"the folder {error.filename!r} cannot be made: {error.strerror}"
            raise ConfigurationError(f"{place}; set hydra.run.dir (of a sweep hydra.sweep.dir) to another") from error


if __name__ == "__main__":
    main()
