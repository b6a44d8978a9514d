"""``dynrank-train``: compose a run with Hydra and do it."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import get_original_cwd
from omegaconf import DictConfig, OmegaConf

from dynrank import __version__
from dynrank.commands.exits import usage_errors
from dynrank.output.console import quiet_imports
from dynrank.run.config import CONFIG_MODULE, CONFIG_NAME
from dynrank.run.sweep.runs import run_in_sweep, table_at_end

# torchrun, srun and Lightning set these.
PROCESS_NUMBERS = ("RANK", "SLURM_PROCID", "LOCAL_RANK", "NODE_RANK")
# Keys whose paths are relative to where the user stands.
PATHS = ("rank_map.file", "ckpt_path", "task.model", "data.train", "data.val", "data.test")


@hydra.main(config_path=f"pkg://{CONFIG_MODULE}", config_name=CONFIG_NAME, version_base="1.3")
def _train(config: DictConfig) -> float | None:
    """Make a run; in a sweep, return what a sweeper looks at."""
    quiet_imports()
    hydra_config = HydraConfig.get()
    folder = Path(hydra_config.runtime.output_dir)
    record = partial(_record, OmegaConf.create(OmegaConf.to_container(config)), folder)
    _find_paths(config)
    if hydra_config.mode == RunMode.MULTIRUN:
        return run_in_sweep(config, folder, record)
    # Errors are caught here, too, because Hydra prints a line of its own for those that get out.
    with usage_errors():
        if not _is_another_process():
            print("starting         PyTorch, transformers and Lightning take some seconds to load", flush=True)
        try:
            # torch and transformers load here, so that --help need not wait for them.
            from dynrank.run.job import run

            run(config, folder, record=record)
        finally:
            if folder != Path.cwd():
                remove = os.removedirs if folder.is_relative_to(Path.cwd()) else os.rmdir
                # A folder that is not empty stays: its run was not refused.
                with suppress(OSError):
                    # Hydra has also made outputs/DATE. No folder outside of the current one is taken away.
                    remove(os.path.relpath(folder))
    return None


def _find_paths(config: DictConfig) -> None:
    """Make paths absolute where hydra.job.chdir has moved this process away from where the user stands."""
    for key in PATHS:
        value = OmegaConf.select(config, key)
        path = Path(get_original_cwd(), str(value))
        if value is not None and Path.cwd() != Path(get_original_cwd()) and path.exists():
            OmegaConf.update(config, key, str(path))


def _record(config: Any, folder: Path) -> None:
    """Write .hydra/ as Hydra does, which would write over that of an earlier run before the folder is refused."""
    where = folder / ".hydra"
    where.mkdir(exist_ok=True)
    hydra_config = HydraConfig.get()
    contents = {"config": config, "hydra": OmegaConf.create({"hydra": hydra_config})}
    for name, content in {**contents, "overrides": hydra_config.overrides.task}.items():
        OmegaConf.save(content, where / f"{name}.yaml")


def _is_another_process() -> bool:
    """Whether another process is the run's first one."""
    return any(os.environ.get(name, "0") != "0" for name in PROCESS_NUMBERS)


def main() -> None:
    """Entry point; :func:`dynrank.commands.exits.usage_errors` has the exit codes."""
    # Without this line Hydra would print its own version.
    if "--version" in sys.argv[1:]:
        print(f"dynrank {__version__}")
        return
    # Exceptions reach us, and Hydra does not turn them into exit code 1.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    if _is_another_process():
        # the first process writes the run's files; the time of day in the name of its folder may be another one here
        sys.argv += ["hydra.output_subdir=null", "hydra/job_logging=none"]
        # The checkpoint is looked for in the run's folder.
        if "ckpt_path=last" not in sys.argv:
            sys.argv.append("hydra.run.dir=.")
    with usage_errors(), table_at_end():
        _train()


if __name__ == "__main__":
    main()
