"""Exit codes of the commands: 0 success, 1 failure, 2 wrong user input (one clear message).

A failure is shown with a traceback, except for a full disk and a run that diverged.
"""

import errno
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from dynrank.errors import ConfigurationError, DivergedError
from dynrank.run.overrides import overrides_explained


@contextmanager
def usage_errors() -> Iterator[None]:
    """Print configuration errors and exit with code 2; 1 for a full disk and a run that diverged, 130 after Ctrl-C."""
    try:
        with overrides_explained():
            yield
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        # Lightning's error for wrong arguments is found by its name, because importing Lightning takes seconds.
        theirs = any(cls.__name__ == "MisconfigurationException" for cls in type(error).__mro__)
        # Our own errors have the system's error as context or cause.
        numbers = {getattr(each, "errno", None) for each in (error, error.__context__, error.__cause__)}
        # The package tokenizers, written in Rust, reports errors in this form.
        numbers |= {int(number) for number in re.findall(r"os error (\d+)", str(error))}
        full = not numbers.isdisjoint((errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
        if not theirs and not full and not isinstance(error, ConfigurationError):
            raise
        print(f"error: {error}", *getattr(error, "__notes__", ()), sep="; ", file=sys.stderr)
        sys.exit(1 if full or isinstance(error, DivergedError) else 2)
