"""``dynrank merge``: a stored adapter and its base model become one plain model on disk."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel

from dynrank.adapters.beside import input_files, with_labels
from dynrank.adapters.load import load_adapter
from dynrank.adapters.read import Adapter, read_adapter
from dynrank.errors import ConfigurationError
from dynrank.layers.finding import modules_by_name
from dynrank.layers.merging import merge
from dynrank.models.names import model_source, stored_source
from dynrank.models.pretrained import load_by_name, load_weights, read_config
from dynrank.output.output_folder import check_free, whole_or_nothing

# What a base is adapted as when the class that its config.json names does not have the adapter's layers: a model that
# was stored as an encoder and trained with a head, for example.
_AUTO_CLASSES = (
    "AutoModelForCausalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
    "AutoModelForMaskedLM",
    "AutoModelForImageClassification",
    "AutoModel",
)


def merge_adapter(source: str | Path, model: str | None, out: str | Path) -> PreTrainedModel:
    """The model with the adapter in ``source`` merged into it, as it has been written to ``out``.

    Weights keep the dtype in which the model is stored; sums are made in float32 or wider. The class is the first that
    has all layers of the adapter: the one that the adapter names, the one that the model's config.json names, or a
    usual one. Heads stored in the adapter (modules_to_save) come along, as do tokenizer files and names of labels, from
    its folder if they lie there. ``out`` appears when it is whole, or not at all. No code from the model's folder is
    run.

    Args:
        source: folder of a PEFT LoRA adapter.
        model: folder or hub name of the model that it was trained on; None: as the adapter names it.
        out: folder to make; it may exist if it is empty.

    Raises:
        ConfigurationError: if the adapter or the model cannot be used, they do not fit, a tokenizer file is a link to
            somewhere else, or ``out`` is not free or cannot be written.
    """
    source, out = Path(source), Path(out)
    adapter = read_adapter(source)
    origin = base_source(adapter, model)
    check_free(out, source, Path(origin))
    own, of_base = input_files(source), input_files(Path(origin))
    merged: PreTrainedModel = with_labels(merge(load_adapter(base_model(origin, adapter), adapter)), source)
    with whole_or_nothing(out) as folder:
        merged.save_pretrained(folder)
        if not own and not Path(origin).is_dir():
            load_by_name(AutoTokenizer.from_pretrained, origin, "--model").save_pretrained(folder)
        for file in own + of_base:
            if not (folder / file.name).exists():
                shutil.copyfile(file, folder / file.name)
    return merged


def base_source(adapter: Adapter, given: str | None) -> str:
    """Where the base model lies that the user has ``given``, or that the adapter names."""
    base = given or (adapter.config.model_extra or {}).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ConfigurationError(f"the adapter {adapter.source!r} names no base model; give --model")
    return model_source(stored_source(base), "--model")


def base_model(origin: str, adapter: Adapter) -> nn.Module:
    """The model that the adapter was trained on, with all its weights.

    They come from its own files or are heads that the adapter has, whose shapes say the number of classes.
    """
    labels_of_base = read_config(origin, "--model").num_labels
    shapes = {name: tuple(adapter.tensor(key).shape) for name, key in adapter.others.items()}
    heads = [shape[0] for name, shape in shapes.items() if name.endswith("weight") and len(shape) == 2]
    tried: dict[str, list[str]] = {}
    for labels in dict.fromkeys([labels_of_base, *heads]):
        options = {} if labels == labels_of_base else {"num_labels": labels}
        config = read_config(origin, "--model", **options)
        for make in _makers(config, adapter):
            try:
                with torch.device("meta"):
                    empty = make(config)
            # transformers has no class of this kind for the model.
            except ValueError:
                continue
            lacks = _misfits(empty, adapter, shapes)
            if not lacks:
                model, absent = _loaded(type(empty), config, origin, adapter)
                if not absent:
                    return model
                lacks = [f"would have no weights {absent[:5]}"]
            tried.setdefault(type(empty).__name__, lacks)
    raise ConfigurationError(
        f"the adapter {adapter.source!r} was not trained on --model {origin!r}, or needs a head that neither holds:\n  "
        + "\n  ".join(f"{name} {'; '.join(lacks[:3])}" for name, lacks in tried.items())
    )


def _makers(config: Any, adapter: Adapter) -> Iterator[Callable[[Any], nn.Module]]:
    """What to try, in order: the class that the adapter names, those that the model's config does, the usual ones."""
    mapping = (adapter.config.model_extra or {}).get("auto_mapping")
    named = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    for name in [named, *(config.architectures or ())]:
        cls: Any = getattr(transformers, name, None) if isinstance(name, str) else None
        is_model = isinstance(cls, type) and issubclass(cls, PreTrainedModel)
        if is_model and cls.config_class is type(config):
            yield cls
    for name in _AUTO_CLASSES:
        yield partial(getattr(transformers, name).from_config, trust_remote_code=False)


def _misfits(model: nn.Module, adapter: Adapter, shapes: dict[str, tuple[int, ...]]) -> list[str]:
    modules, state = modules_by_name(model), model.state_dict()
    faults = [f"has no module {name!r}" for name in adapter.layers if name not in modules]
    for name, shape in shapes.items():
        if ".base_layer." not in name and (name not in state or state[name].shape != shape):
            faults.append(f"has no {[*shape]} parameter {name!r}")
    return faults


def _loaded(cls: Any, config: Any, origin: str, adapter: Adapter) -> tuple[nn.Module, list[str]]:
    """(the model, names of weights that it got from nowhere)."""
    options = {"config": config, "dtype": "auto", "ignore_mismatched_sizes": True}
    model, info = load_weights(cls.from_pretrained, origin, "--model", **options)
    absent = {*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])} - set(adapter.others)
    return model, sorted(absent)
