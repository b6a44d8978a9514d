"""Exit codes of the commands: 0 success, 1 failure (with a traceback), 2 what the user wrote (one clear message)."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from dynrank.errors import ConfigurationError
from dynrank.run.overrides import overrides_explained


@contextmanager
def usage_errors() -> Iterator[None]:
    """Print configuration errors without a traceback and exit with code 2; 130 after Ctrl-C."""
    try:
        with overrides_explained():
            yield
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        # Lightning's own error for wrong arguments; looked up by name, since importing Lightning takes seconds
        theirs = any(cls.__name__ == "MisconfigurationException" for cls in type(error).__mro__)
        if not theirs and not isinstance(error, ConfigurationError):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
