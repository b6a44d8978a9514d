"""Objects from a configuration's ``_target_`` keys, out of trusted packages only."""

from __future__ import annotations

from typing import Any

from hydra.utils import get_object, instantiate
from omegaconf import OmegaConf

from dynrank.errors import ConfigurationError

# What a configuration may name as _target_: a config file from elsewhere must not call into the system.
_TRUSTED = ("dynrank.", "lightning.", "torchmetrics.", "transformers.")


def make(node: Any) -> Any:
    """Instantiate a configuration node whose ``_target_`` (and those below it) lie in trusted packages.

    Raises:
        ConfigurationError: if one does not.
    """
    if node is None or not node.get("_target_"):
        return None
    _check_targets(OmegaConf.to_container(node, resolve=True))
    return instantiate(node, _convert_="all")


def _check_targets(node: Any) -> None:
    if isinstance(node, dict):
        target = node.get("_target_")
        if target is not None:
            trusted = str(target).startswith(_TRUSTED)
            # a path may lead through what a trusted module imports, so the object's own home counts too
            if not trusted or not f"{getattr(get_object(str(target)), '__module__', '')}.".startswith(_TRUSTED):
                raise ConfigurationError(f"_target_ must lie in one of {_TRUSTED}, got {target!r}")
        node = list(node.values())
    if isinstance(node, list):
        for child in node:
            _check_targets(child)
