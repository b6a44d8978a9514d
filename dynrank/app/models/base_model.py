"""The base, the model on which a stored adapter was trained: its class, its tokens, and loading it with the adapter."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from dynrank.adapters.config import AdapterConfig
from dynrank.adapters.export import base_name
from dynrank.adapters.folder import CONFIG_FILE
from dynrank.adapters.load import load_adapter
from dynrank.adapters.read import Adapter
from dynrank.adapters.sidecar_files import with_labels
from dynrank.adapters.stored import read_json
from dynrank.app.models.names import ModelSettings, model_source, public_name, stored_source
from dynrank.app.models.pretrained import load_weights, read_config
from dynrank.errors import ConfigurationError
from dynrank.layers.finding import modules_by_name
from dynrank.layers.vocabulary import token_embeddings

# Classes to try if the class in the base's config.json does not have the adapter's layers, for example if a model was
# stored as an encoder and trained with a head. Each has the task_type by which PEFT names it in the adapter, if any.
_AUTO_CLASSES = {
    "AutoModelForCausalLM": "CAUSAL_LM",
    "AutoModelForSeq2SeqLM": "SEQ_2_SEQ_LM",
    "AutoModelForSequenceClassification": "SEQ_CLS",
    "AutoModelForTokenClassification": "TOKEN_CLS",
    "AutoModelForQuestionAnswering": "QUESTION_ANS",
    "AutoModelForMaskedLM": "",
    "AutoModelForImageClassification": "",
    "AutoModel": "FEATURE_EXTRACTION",
}


def base_source(adapter: Adapter, given: str | None) -> str:
    """Folder or hub name of the base model: ``given`` by the user, or named by the adapter."""
    return model_source(stored_source(base_name(adapter, given)), "--model")


def base_for_server(folder: Path, given: str | None, to: str) -> str | None:
    """The base of the adapter in ``folder`` as an export to a server needs it; None: as the adapter names it.

    llama.cpp's file needs the base's config, so a short name becomes a place; others print a name.
    """
    if to in ("gguf", "ollama"):
        stored = given or read_json(AdapterConfig, folder / CONFIG_FILE).base_model_name_or_path
        return model_source(stored_source(stored), "--model") if isinstance(stored, str) and stored else None
    return None if given is None else public_name(model_source(given, "--model"))


def on_base(adapter: Adapter, given: str | None) -> PreTrainedModel:
    """The base model with ``adapter``, and with the label names in the adapter's folder.

    A base with other weights than those by which the adapter knows its base is refused.
    """
    origin = base_source(adapter, given)
    model = load_adapter(_base_model(origin, adapter, base_settings(adapter, given)), adapter)
    return with_labels(model, Path(adapter.source))


def base_settings(adapter: Adapter, given: str | None) -> ModelSettings:
    """How to load the base: at the adapter's revision, unless the user has ``given`` a base."""
    return ModelSettings(revision=None if given else adapter.config.revision or None)


def _base_model(origin: str, adapter: Adapter, settings: ModelSettings) -> PreTrainedModel:
    """The model that the adapter was trained on, with all its weights.

    Each weight is in the base's files, or in a head that the adapter stores; the head's shape gives the class count.
    """
    shapes = {name: tuple(adapter.tensor(key).shape) for name, key in adapter.others.items()}
    named = _named_classes(adapter)
    # {class: what it lacks}, of several attempts the one that lacks least.
    tried: dict[str, list[str]] = {}
    # Names of classes that do not have the adapter's layers, whatever their heads are like.
    unlike = set[str]()
    for options in _options(read_config(origin, "--model", settings).num_labels, shapes):
        config = read_config(origin, "--model", settings, **options)
        for name, make in _makers(config, named):
            if name in unlike:
                continue
            try:
                with torch.device("meta"):
                    empty = make(config)
            # The first means that transformers has no class of this kind for the model, the second a wrong size.
            except (ValueError, AssertionError):
                continue
            lacks = _lacking_modules(empty, adapter)
            if lacks:
                unlike.add(name)
            lacks += _lacking_parameters(empty, shapes)
            fits = not lacks
            if fits:
                model, lacks = _loaded(empty, origin, settings, shapes)
                if not lacks:
                    return model
            cls = type(empty).__name__
            if cls not in tried or len(lacks) < len(tried[cls]):
                tried[cls] = lacks
            # The class is known, so another one that has all weights would be something else.
            if fits and name in named:
                raise _not_its_base(adapter, origin, {cls: lacks})
    raise _not_its_base(adapter, origin, tried)


def _not_its_base(adapter: Adapter, origin: str, tried: Mapping[str, list[str]]) -> ConfigurationError:
    return ConfigurationError(
        f"the adapter {adapter.source!r} was not trained on --model {origin!r}, or needs a head that neither has:\n  "
        + "\n  ".join(f"{name} {'; '.join(lacks[:3])}" for name, lacks in tried.items())
    )


def _options(labels: int, shapes: Mapping[str, tuple[int, ...]]) -> list[dict[str, int]]:
    """Changes of the base's config, of so many ``labels``, by which a class may have the heads of these shapes."""
    rows = dict.fromkeys(shape[0] for name, shape in shapes.items() if name.endswith("weight") and len(shape) > 1)
    found: list[dict[str, int]] = [{}]
    found += [{"num_labels": count} for count in rows if count != labels]
    # A detector has one more class, for nothing; the head of speech has the tokens of its tokenizer.
    found += [{"num_labels": count - 1} for count in rows if count > 1]
    return [*found, *({"vocab_size": count} for count in rows)]


def _loaded(
    empty: PreTrainedModel, origin: str, settings: ModelSettings, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[PreTrainedModel, list[str]]:
    """(a model like ``empty`` with its weights, what is in neither the base's files nor the adapter's ``shapes``)."""
    cls: Any = type(empty)
    # Of a model that also reads images, the class for texts has a part of the config.
    given = {"config": empty.config, "dtype": "auto", "ignore_mismatched_sizes": True}
    model, info = load_weights(cls.from_pretrained, origin, "--model", settings, **given)
    absent = {*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])} - shapes.keys()
    if absent:
        return model, [f"would have no weights {sorted(absent)[:5]}"]
    before = {name: len(parameter) for name, parameter in _embeddings(model).items()}
    _give_tokens(model, shapes)
    after = _embeddings(model)
    stored = {id(parameter) for name, parameter in after.items() if _stored(name, shapes)}
    drawn = [name for name, p in after.items() if len(p) > before.get(name, len(p)) and id(p) not in stored]
    return model, [f"would have no rows of {drawn[0]!r} for the tokens that were added"] if drawn else []


def _embeddings(model: nn.Module) -> dict[str, nn.Parameter]:
    """{name, each of several: parameter of ``model`` that has a row, or a number, for each token}."""
    embeddings = [module for part in model.modules() for module in token_embeddings(part)]
    of_tokens = {id(parameter) for module in embeddings for parameter in module.parameters()}
    return {name: p for name, p in model.named_parameters(remove_duplicate=False) if id(p) in of_tokens}


def _stored(name: str, shapes: Mapping[str, tuple[int, ...]]) -> list[tuple[int, ...]]:
    """The shapes of a parameter in the adapter, by its own name or, of a module with LoRA, as PEFT names it."""
    owner, _, leaf = name.rpartition(".")
    return [shapes[key] for key in (name, f"{owner}.base_layer.{leaf}") if key in shapes]


def _give_tokens(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Give ``model`` as many tokens as the base had where the adapter was trained, which has their rows."""
    counts = [
        shape[0] for name, p in _embeddings(model).items() for shape in _stored(name, shapes) if shape[0] != len(p)
    ]
    if not counts:
        return
    # Models of an encoder and a decoder leave their tokens to these two.
    if not isinstance(model, PreTrainedModel) or hasattr(model.config, "from_encoder_decoder_configs"):
        for name, part in model.named_children():
            inside = {key.removeprefix(f"{name}."): shapes[key] for key in shapes if key.startswith(f"{name}.")}
            _give_tokens(part, inside)
        return
    # MobileBERT's has no such argument. The mean of all rows would take long, and nothing needs it.
    takes_mean = "mean_resizing" in signature(model.resize_token_embeddings).parameters
    model.resize_token_embeddings(counts[0], **({"mean_resizing": False} if takes_mean else {}))


def _named_classes(adapter: Adapter) -> list[str]:
    """The classes that the adapter names: its model's, and those of its task."""
    mapping = adapter.config.auto_mapping
    named = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    by_task = [name for name, task in _AUTO_CLASSES.items() if task == adapter.config.task_type]
    return [*([named] if isinstance(named, str) else []), *by_task]


def _makers(
    config: PretrainedConfig, named: Sequence[str]
) -> Iterator[tuple[str, Callable[[PretrainedConfig], PreTrainedModel]]]:
    """(name, class) to try in order: those ``named`` by the adapter, those in the model's config, the usual ones."""
    names = [*named, *(config.architectures or ()), *_AUTO_CLASSES]
    for name in dict.fromkeys(name for name in names if isinstance(name, str)):
        cls: Any = getattr(transformers, name, None)
        is_model = isinstance(cls, type) and issubclass(cls, PreTrainedModel)
        if name in _AUTO_CLASSES:
            yield name, partial(cls.from_config, trust_remote_code=False)
        elif is_model and cls.config_class is type(config):
            yield name, cls


def _lacking_modules(model: nn.Module, adapter: Adapter) -> list[str]:
    modules = modules_by_name(model)
    return [f"has no module {name!r}" for name in adapter.layers if name not in modules]


def _lacking_parameters(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    own = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    # They are given other tokens when the model has its weights.
    of_tokens = {name: (*shapes[name][:1], *own[name][1:]) for name in _embeddings(model).keys() & shapes.keys()}
    own |= of_tokens
    return [
        f"has no {[*shape]} parameter {name!r}"
        for name, shape in shapes.items()
        if ".base_layer." not in name and own.get(name) != shape
    ]
