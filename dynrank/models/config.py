"""From the name of a model to the real model class on the meta device: shapes and dtypes without weights."""

from __future__ import annotations

import json
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from dynrank.errors import ConfigurationError

__all__ = ["meta_model", "read_config", "shipped_models"]

_SHIPPED = Path(__file__).parent


def shipped_models() -> list[str]:
    """Short names of the models whose config.json comes with dynrank."""
    return sorted(file.stem for file in _SHIPPED.glob("*.json"))


def read_config(name: str, key: str = "model") -> PretrainedConfig:
    """The config of a model: a short name (:func:`shipped_models`), a folder, a config.json, or ORG/NAME on the hub.

    Args:
        name: what the user wrote.
        key: where.

    Raises:
        ConfigurationError: if there is none, or transformers cannot use it.
    """
    if not isinstance(name, str) or not name:
        raise ConfigurationError(f"{key} must be a name, a folder or a config.json, got {name!r}")
    if name in shipped_models():
        return _from_file(_SHIPPED / f"{name}.json", name, key)
    path = Path(name).expanduser()
    if path.is_file() or (path.is_dir() and (path / "config.json").is_file()):
        return _from_file(path / "config.json" if path.is_dir() else path, name, key)
    if path.is_dir() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        near = get_close_matches(name.lower(), shipped_models(), n=3, cutoff=0.4) or shipped_models()
        raise ConfigurationError(
            f"{key} must be a folder with a config.json, such a file, ORG/NAME on the hub or a known name, got "
            f"{name!r}; nearest known names: {near}"
        )
    try:
        return cast(PretrainedConfig, AutoConfig.from_pretrained(name))
    except (OSError, ValueError, StrictDataclassError) as error:
        raise ConfigurationError(
            f"the config of {key}={name} cannot be had: {str(error).splitlines()[0]}; known without a hub: "
            f"{shipped_models()}"
        ) from None


def meta_model(config: PretrainedConfig, dtype: torch.dtype, key: str = "model") -> PreTrainedModel:
    """The model of ``config.architectures``, or a causal language model, or the bare model; on the meta device.

    Args:
        config: of the model.
        dtype: of its parameters.
        key: what the user set, for errors.

    Raises:
        ConfigurationError: if transformers cannot build it.
    """
    cls: Any = getattr(transformers, (config.architectures or [""])[0], None)
    if not (isinstance(cls, type) and issubclass(cls, PreTrainedModel)):
        causal = type(config) in AutoModelForCausalLM._model_mapping
        cls = AutoModelForCausalLM if causal else AutoModel
    build = cls._from_config if hasattr(cls, "_from_config") else cls.from_config
    try:
        with torch.device("meta"):
            model = build(config, dtype=dtype)
    except (ValueError, TypeError, KeyError, RuntimeError, AttributeError, ZeroDivisionError) as error:
        raise ConfigurationError(f"transformers cannot build the model of this config ({error}); set {key}") from error
    assert isinstance(model, nn.Module)
    return cast(PreTrainedModel, model)


def _from_file(file: Path, name: str, key: str) -> PretrainedConfig:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        return cast(PretrainedConfig, AutoConfig.for_model(**values))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
        raise ConfigurationError(f"{key}={name} holds no config of a model that transformers knows: {error}") from error
