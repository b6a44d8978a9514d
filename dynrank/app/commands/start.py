"""The installed commands; without the packages that they need, each says in one sentence how to install them."""

import sys
from importlib import import_module

from dynrank.errors import ConfigurationError, train_packages


def dynrank() -> None:
    """Entry point of ``dynrank``."""
    _start("dynrank", "dynrank.app.commands.cli")


def dynrank_train() -> None:
    """Entry point of ``dynrank-train``."""
    _start("dynrank-train", "dynrank.app.train")


def _start(command: str, module: str) -> None:
    try:
        with train_packages(command):
            started = import_module(module)
        started.main()
    except ConfigurationError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
