"""The base, the model on which a stored adapter was trained: its class, and loading it with the adapter."""

from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedModel

from dynrank.adapters.export import base_name
from dynrank.adapters.folder import CONFIG_FILE
from dynrank.adapters.load import load_adapter
from dynrank.adapters.read import Adapter
from dynrank.adapters.sidecar_files import with_labels
from dynrank.app.models.names import ModelSettings, model_source, stored_source
from dynrank.app.models.pretrained import load_weights, read_config
from dynrank.errors import ConfigurationError

# PEFT's names of tasks, and the class of transformers for each, as PEFT's own auto classes have them.
_OF_TASK = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


def base_of(adapter: Adapter, given: str | None) -> tuple[str, ModelSettings]:
    """The base model, ``given`` by the user or named by the adapter: (folder or hub name, how to load it).

    The revision is the adapter's, unless the user has given a base.
    """
    revision = None if given else adapter.config.revision or None
    return model_source(stored_source(base_name(adapter, given)), "--model"), ModelSettings(revision=revision)


def class_of_base(adapter: Adapter) -> Any:
    """The class of transformers that was adapted, by the task or the class that the adapter names."""
    mapping = adapter.config.auto_mapping
    task = str(adapter.config.task_type)
    named = str(mapping.get("base_model_class")) if isinstance(mapping, dict) else task
    cls = getattr(transformers, _OF_TASK.get(task, named), None)
    if not hasattr(cls, "from_pretrained"):
        raise ConfigurationError(
            f"the adapter {adapter.source!r} must name a class of transformers in auto_mapping of its {CONFIG_FILE}, "
            f"or a task_type of {[*_OF_TASK]}, got {named!r}; use PEFT"
        )
    return cls


def on_base(adapter: Adapter, given: str | None) -> PreTrainedModel:
    """The base model with ``adapter``, and with the label names in the adapter's folder.

    Each weight is in the base's files, or in a head that the adapter stores. A base with other weights than those by
    which the adapter knows its base is refused.
    """
    origin, settings = base_of(adapter, given)
    cls = class_of_base(adapter)
    foreign = f"the adapter {adapter.source!r} was not trained on --model {origin!r}"
    config = read_config(origin, "--model", settings)
    kind = getattr(cls, "config_class", None)
    # transformers would load the model as another kind, with a warning. A model of texts may be a part of the base.
    if kind not in (None, type(config), type(config.get_text_config())):
        raise ConfigurationError(f"{foreign}: a {cls.__name__} has a {kind.__name__}, got a {type(config).__name__}")
    options: dict[str, Any] = {"dtype": "auto", "ignore_mismatched_sizes": True}
    heads = [adapter.tensor(key) for name, key in adapter.others.items() if adapter.is_trained(name)]
    # The last of a head's layers has the fewest rows. That each fits is checked when they are loaded.
    if "Classification" in cls.__name__ and (rows := [len(weight) for weight in heads if weight.ndim > 1]):
        options["num_labels"] = min(rows)
    model, info = load_weights(cls.from_pretrained, origin, "--model", settings, **options)
    if absent := {*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])} - adapter.others.keys():
        raise ConfigurationError(
            f"{foreign}, or needs a head that neither has: {type(model).__name__} would have no weights "
            f"{sorted(absent)[:5]}"
        )
    return with_labels(load_adapter(model, adapter), Path(adapter.source))
