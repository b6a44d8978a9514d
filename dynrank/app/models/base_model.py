"""The base, the model on which a stored adapter was trained: its class, its tokens, and loading it with the adapter."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

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
from dynrank.layers.vocabulary import token_embeddings

# PEFT's names of tasks, and the class of transformers for each, as PEFT's own auto classes have them.
_OF_TASK = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
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
    model = load_adapter(_base_model(adapter, given), adapter)
    return with_labels(model, Path(adapter.source))


def base_settings(adapter: Adapter, given: str | None) -> ModelSettings:
    """How to load the base: at the adapter's revision, unless the user has ``given`` a base."""
    return ModelSettings(revision=None if given else adapter.config.revision or None)


def class_of_base(adapter: Adapter, given: str | None) -> Any:
    """The class of transformers that was adapted: the adapter names it, or its task; otherwise the base's config.

    Of a model that also reads images, the class for texts has a part of the config, so the auto class makes it.
    """
    config = read_config(base_source(adapter, given), "--model", base_settings(adapter, given))
    mapping = adapter.config.auto_mapping
    named = str(mapping.get("base_model_class")) if isinstance(mapping, dict) else ""
    of_task = _OF_TASK.get(str(adapter.config.task_type), "")
    for name in (named, of_task, f"AutoModelFor{named.partition('For')[2]}", *(config.architectures or ())):
        cls: Any = getattr(transformers, name, None)
        is_model = isinstance(cls, type) and issubclass(cls, PreTrainedModel)
        if (is_model and cls.config_class is type(config)) or (isinstance(cls, type) and name.startswith("AutoModel")):
            return cls
    raise ConfigurationError(
        f"the adapter {adapter.source!r} must name a class of transformers for --model, a {type(config).__name__}, in "
        f"task_type or auto_mapping of its {CONFIG_FILE}, got {adapter.config.task_type!r} and {named!r}"
    )


def _base_model(adapter: Adapter, given: str | None) -> PreTrainedModel:
    """The model that the adapter was trained on, with all its weights.

    Each weight is in the base's files, or in a head that the adapter stores; the head's shape gives the class count.
    """
    origin = base_source(adapter, given)
    settings = base_settings(adapter, given)
    shapes = {name: tuple(adapter.tensor(key).shape) for name, key in adapter.others.items()}
    cls = class_of_base(adapter, given)
    # Of a model that also reads images, the class for texts has a part of the config.
    options = {"config": _config(adapter, cls, shapes, origin, settings)}
    options |= {"dtype": "auto", "ignore_mismatched_sizes": True}
    model, info = load_weights(cls.from_pretrained, origin, "--model", settings, **options)
    absent = {*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])} - shapes.keys()
    lacks = f"no weights {sorted(absent)[:5]}" if absent else ""
    if not absent:
        before = {name: len(parameter) for name, parameter in _embeddings(model).items()}
        _give_tokens(model, shapes)
        after = _embeddings(model)
        stored = {id(parameter) for name, parameter in after.items() if _stored(name, shapes)}
        drawn = [name for name, p in after.items() if len(p) > before.get(name, len(p)) and id(p) not in stored]
        lacks = f"no rows of {drawn[0]!r} for the tokens that were added" if drawn else ""
    if lacks:
        raise ConfigurationError(
            f"the adapter {adapter.source!r} was not trained on --model {origin!r}, or needs a head that neither has: "
            f"{type(model).__name__} would have {lacks}"
        )
    return cast(PreTrainedModel, model)


def _config(
    adapter: Adapter, cls: Any, shapes: Mapping[str, tuple[int, ...]], origin: str, settings: ModelSettings
) -> PretrainedConfig:
    """The base's config with as many labels as the head in the adapter has."""
    plain = read_config(origin, "--model", settings)
    heads = {name: shape for name, shape in shapes.items() if len(shape) > 1 and adapter.is_trained(name)}
    for labels in dict.fromkeys([plain.num_labels, *(shape[0] for shape in heads.values())]):
        config = read_config(origin, "--model", settings, num_labels=labels)
        try:
            with torch.device("meta"):
                empty = cls(config) if issubclass(cls, PreTrainedModel) else cls.from_config(config)
        except ValueError as error:
            raise ConfigurationError(f"transformers has no {cls.__name__} of --model {origin!r}: {error}") from error
        own = empty.state_dict()
        if all(name in own and tuple(own[name].shape) == shape for name, shape in heads.items()):
            return cast(PretrainedConfig, empty.config)
    # Such a head has the rows of tokens that were added, or fits nothing, which is said when it is loaded.
    return plain


def _embeddings(model: nn.Module) -> dict[str, nn.Parameter]:
    """{name, each of several: parameter of ``model`` that has a row, or a number, for each token}."""
    embeddings = [module for part in model.modules() for module in token_embeddings(part)]
    of_tokens = {id(parameter) for module in embeddings for parameter in module.parameters()}
    return {name: p for name, p in model.named_parameters(remove_duplicate=False) if id(p) in of_tokens}


def _stored(name: str, shapes: Mapping[str, tuple[int, ...]]) -> list[tuple[int, ...]]:
    """The shapes of a parameter in the adapter, by its own name or, of a module with LoRA, as PEFT names it."""
    owner, _, leaf = name.rpartition(".")
    return [shapes[key] for key in (name, f"{owner}.base_layer.{leaf}") if key in shapes]


def _give_tokens(model: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Give ``model`` as many tokens as the base had where the adapter was trained, which has their rows."""
    counts = [
        shape[0] for name, p in _embeddings(model).items() for shape in _stored(name, shapes) if shape[0] != len(p)
    ]
    if not counts:
        return
    try:
        # The mean of all rows would take long, and nothing needs it.
        model.resize_token_embeddings(counts[0], mean_resizing=False)
    # So say models of an encoder and a decoder, and some old ones.
    except (NotImplementedError, TypeError) as error:
        name = type(model).__name__
        raise ConfigurationError(
            f"{name} cannot be given the tokens that were added where the adapter was trained ({error}); use PEFT"
        ) from error
