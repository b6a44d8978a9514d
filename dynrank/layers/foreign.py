"""Objects of others: values that dynrank stores on modules, and classes of libraries that it does not import."""

import sys
from typing import Any

from torch import nn


def store_on(module: nn.Module, key: Any, value: Any) -> None:
    """Store a value on a module of the user's, in dynrank's one record there, so that copies of the module have it."""
    vars(module).setdefault("dynrank", {})[key] = value


def stored_on(module: nn.Module, key: Any) -> Any:
    """The value that :func:`store_on` has stored on ``module``; None if there is none."""
    return vars(module).get("dynrank", {}).get(key)


def class_if_imported(path: str) -> Any:
    """The class at ``path``, such as ``peft.LoraModel``, of a library that dynrank knows but does not import.

    ``()`` if its module is not imported: then there are no objects of the class, and none is an instance of ``()``.
    """
    module, _, name = path.rpartition(".")
    return getattr(sys.modules.get(module), name, ())
