"""Exit codes of the commands: 0 success, 1 failure (with a traceback), 2 what the user wrote (one clear message)."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from hydra.errors import HydraException, MissingConfigException
from omegaconf.errors import OmegaConfBaseException

from dynrank.errors import ConfigurationError

PLUGINS = ("hydra/sweeper/optuna", "hydra/launcher/joblib", "hydra/launcher/submitit")


@contextmanager
def usage_errors() -> Iterator[None]:
    """Print configuration errors without a traceback and exit with code 2; 130 after Ctrl-C."""
    try:
        yield
    except (ConfigurationError, HydraException, OmegaConfBaseException) as error:
        sys.exit(_report(error))
    except KeyboardInterrupt:
        print("interrupted; go on from checkpoints/last.ckpt with ckpt_path=", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if _is_override(error):
            error = ConfigurationError(f"{error}; a group takes a name, such as schedule=fixed (--help lists them)")
        elif not _is_misconfiguration(error):
            raise
        sys.exit(_report(error))


def _report(error: BaseException) -> int:
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ConfigurationError):  # Hydra wraps what a constructor raised
        cause = cause.__cause__
    # a group of Hydra's that a plugin brings
    missing = isinstance(error, MissingConfigException) and str(error.missing_cfg_file).startswith(PLUGINS)
    advice = "\nit comes with pip install 'dynrank[sweep]'" if missing else ""
    print(f"error: {cause or error}{advice}", file=sys.stderr)
    return 2


def _is_misconfiguration(error: Exception) -> bool:
    """Lightning's own word for wrong arguments; looked up by name, since importing it takes seconds."""
    return any(cls.__name__ == "MisconfigurationException" for cls in type(error).__mro__)


def _is_override(error: Exception) -> bool:
    """A plain ValueError of Hydra's own, as for ``schedule=null``."""
    at = error.__traceback__
    while at is not None and at.tb_next is not None:
        at = at.tb_next
    return isinstance(error, ValueError) and at is not None and at.tb_frame.f_globals["__name__"].startswith("hydra.")
