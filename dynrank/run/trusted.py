"""Objects from a configuration's ``_target_`` keys, out of trusted packages only."""

from __future__ import annotations

from typing import Any

from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf

from dynrank.errors import ConfigurationError

# What a configuration may name as _target_: a config file from elsewhere must not call into the system.
_TRUSTED = ("dynrank.", "lightning.", "torchmetrics.", "transformers.")


def make(node: Any, key: str) -> Any:
    """Instantiate the configuration node at ``key`` whose ``_target_`` (and those below it) lie in trusted packages.

    Raises:
        ConfigurationError: if one does not, or the node has none.
    """
    target = node.get("_target_") if isinstance(node, DictConfig) else None
    if not isinstance(target, str) or not target:
        raise ConfigurationError(f"_target_ must name what {key} makes, got {target!r}; set {key}._target_")
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
