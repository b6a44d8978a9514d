"""Tokenizers, configs and models by the name that a user gives; code from a model's folder is never run."""

from __future__ import annotations

import struct
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)

from dynrank.errors import ConfigurationError
from dynrank.models.names import model_source

__all__ = [
    "head_names",
    "load_by_name",
    "load_causal_lm",
    "load_classifier",
    "load_tokenizer",
    "load_weights",
    "meta_model",
    "read_config",
]

# What transformers and the libraries below it raise for files that they cannot use.
_FAULTS: tuple[type[Exception], ...] = (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError)
_FAULTS += (RuntimeError, ImportError, ZeroDivisionError, StrictDataclassError, SafetensorError, struct.error)
_HEADS = ("classifier", "pre_classifier", "score")  # what transformers calls the head of a sequence classifier


def load_by_name(loader: Any, name: str, key: str, **options: Any) -> Any:
    """What ``loader``, a ``from_pretrained`` of transformers, makes of a model's name.

    Args:
        loader: of a config, a tokenizer or a model.
        name: of the model, see :func:`dynrank.models.names.model_source`.
        key: where the user wrote it.
        **options: further arguments of ``loader``.

    Raises:
        ConfigurationError: if there is no such model, or it cannot be loaded; so do all functions of this file.
    """
    place = model_source(name, key)
    if place.endswith(".json") and loader != AutoConfig.from_pretrained:
        raise ConfigurationError(f"{key}={name} is a config without weights; set {key} to a folder or to ORG/NAME")
    if place.endswith(".gguf"):
        if find_spec("gguf") is None:
            raise ConfigurationError(f"{key}={name} needs the package gguf: pip install gguf, or 'dynrank[code]'")
        place, options = str(Path(place).parent), {**options, "gguf_file": Path(place).name}
    try:
        return loader(place, trust_remote_code=False, **options)
    except _FAULTS as error:
        what = f"{type(error).__name__}: {error!s:.500}"
        raise ConfigurationError(f"transformers cannot load {key}={name}: {what}") from error


def load_tokenizer(name: str, key: str = "task.model") -> Any:
    """The tokenizer of a model, with a padding token."""
    tokenizer = load_by_name(AutoTokenizer.from_pretrained, name, key)
    if tokenizer.pad_token is None:  # as in most decoders
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def read_config(name: str, key: str = "model", **changes: Any) -> PretrainedConfig:
    """The config of a model, with ``changes`` such as ``num_labels=3``."""
    return cast(PretrainedConfig, load_by_name(AutoConfig.from_pretrained, name, key, **changes))


def load_classifier(name: str, num_labels: int, key: str = "task.model", *, on_meta: bool = False) -> nn.Module:
    """A pre-trained sequence classifier in float32 with a fresh head for ``num_labels`` classes.

    ``on_meta`` builds it from its config alone, without memory for weights.
    """
    model: Any
    if on_meta:
        model = _on_meta(AutoModelForSequenceClassification, read_config(name, key, num_labels=num_labels), key)
    else:
        # a head for another number of classes is replaced
        options = {"dtype": torch.float32, "num_labels": num_labels, "ignore_mismatched_sizes": True}
        model, info = load_weights(AutoModelForSequenceClassification.from_pretrained, name, key, **options)
        misfits = [str(place[0]) for place in info["mismatched_keys"] if not str(place[0]).startswith(_HEADS)]
        if misfits:
            raise ConfigurationError(f"weights {misfits[:3]} of {key}={name!r} do not fit its config.json")
    model.config.pad_token_id = load_tokenizer(name, key).pad_token_id  # decoders classify by their last real token
    return cast(nn.Module, model)


def head_names(model: nn.Module) -> list[str]:
    """Names of the fresh classification layers of a model from :func:`load_classifier`."""
    return [name for name, _ in model.named_children() if name in _HEADS]


def load_causal_lm(name: str, key: str = "task.model", *, on_meta: bool = False) -> nn.Module:
    """A pre-trained causal language model in float32; ``on_meta`` builds it without memory for weights."""
    if on_meta:
        return cast(nn.Module, _on_meta(AutoModelForCausalLM, read_config(name, key), key))
    model, info = load_weights(AutoModelForCausalLM.from_pretrained, name, key, dtype=torch.float32)
    missing = sorted(info["missing_keys"])
    if missing:
        raise ConfigurationError(f"{key}={name!r} is no causal language model: it lacks {missing[:3]}")
    return cast(nn.Module, model)


def load_weights(loader: Any, name: str, key: str, **options: Any) -> tuple[Any, dict[str, Any]]:
    """A model and transformers' account of its loading; what a GGUF file holds is unpacked into plain layers.

    Args:
        loader: a ``from_pretrained`` of models.
        name: of the model.
        key: where the user wrote it.
        **options: further arguments of ``loader``.
    """
    gguf = model_source(name, key).endswith(".gguf")
    if gguf and hasattr(transformers, "GgufConfig"):  # without it, newer versions keep layers packed if they can
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model, info = load_by_name(loader, name, key, output_loading_info=True, **options)
    quantizer = getattr(model, "hf_quantizer", None) if gguf else None
    if quantizer is not None:  # nothing is quantised any more: such a model could neither be saved nor trained
        quantizer.remove_quantization_config(model)
    return model, info


def meta_model(config: PretrainedConfig, dtype: torch.dtype, key: str = "model") -> PreTrainedModel:
    """The model of ``config.architectures``, or a causal language model, or the bare model; on the meta device.

    Args:
        config: of the model.
        dtype: of its parameters.
        key: what the user set, for errors.
    """
    named = getattr(transformers, (config.architectures or [""])[0], None)
    if not (isinstance(named, type) and issubclass(named, PreTrainedModel)):
        named = AutoModelForCausalLM if type(config) in AutoModelForCausalLM._model_mapping else AutoModel
    return cast(PreTrainedModel, _on_meta(named, config, key, dtype))


def _on_meta(cls: Any, config: PretrainedConfig, key: str, dtype: torch.dtype = torch.float32) -> Any:
    auto = not issubclass(cls, PreTrainedModel)
    try:
        with torch.device("meta"):
            if auto:
                return cls.from_config(config, dtype=dtype, trust_remote_code=False)
            return cls._from_config(config, dtype=dtype)
    except _FAULTS as error:
        raise ConfigurationError(f"transformers cannot build the model of this config ({error}); set {key}") from error
