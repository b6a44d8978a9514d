"""The base, the model on which a stored adapter was trained: loading it with the adapter, and merging the two."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedModel

from dynrank.adapters.config import CONFIG_FILE, AdapterConfig
from dynrank.adapters.export import base_name
from dynrank.adapters.load import load_adapter
from dynrank.adapters.read import Adapter, read_adapter
from dynrank.adapters.sidecar_files import (
    INPUT_FILES,
    TOKENIZER_FILE,
    copy_files,
    input_files,
    label_names,
    modelfile,
    read_inputs,
    with_labels,
)
from dynrank.adapters.stored import read_json
from dynrank.app.models.generating import end_of_turn_of, end_tokens
from dynrank.app.models.names import ModelSettings, model_source, public_name, stored_source
from dynrank.app.models.pretrained import (
    folder_with,
    load_by_name,
    load_tokenizer,
    load_weights,
    read_config,
    set_padding,
)
from dynrank.errors import ConfigurationError
from dynrank.layers.finding import modules_by_name
from dynrank.layers.placing import merge
from dynrank.layers.vocabulary import token_embeddings
from dynrank.output.output_folder import check_free, whole_or_nothing

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


def merge_adapter(source: str | Path, model: str | None, out: str | Path, *, ollama: bool = False) -> PreTrainedModel:
    """Merge the adapter in ``source`` into its base model, write the result to ``out``, and return it.

    Weights keep the stored dtype of the model; sums are computed in float32 or wider. The model's class is the first
    one that has all layers of the adapter: the class that the adapter names, the class in the model's config.json, or a
    common one. Heads stored in the adapter (modules_to_save), tokenizer files and label names are included; the
    adapter's folder has precedence. If it says what training learned, generation_config.json names the ends of answers.
    ``out`` is written whole or not at all. No code from the model's folder is run.

    Args:
        source: folder of a PEFT LoRA adapter.
        model: folder or hub name of the base model; None: as the adapter names it.
        out: new or empty folder.
        ollama: whether to write a Modelfile, too, from which Ollama makes a model of the folder.

    Raises:
        ConfigurationError: if the adapter or the model cannot be used, they do not fit, a tokenizer file is a link out
            of its folder, or ``out`` is not free or cannot be written.
    """
    source = Path(source)
    out = Path(out)
    adapter = read_adapter(source)
    origin = base_source(adapter, model)
    check_free(out, source, Path(origin))
    # A system prompt that a Modelfile cannot hold is refused before the model is loaded.
    text = modelfile(".", read_inputs(source), adapter=None) if ollama else None
    own = input_files(source)
    settings = base_settings(adapter, model)
    of_base = input_files(folder_with(INPUT_FILES, origin, "--model", settings))
    if (source / TOKENIZER_FILE).exists():
        # Files of two tokenizers are none: transformers would read the base's special tokens and template.
        of_base = {name: file for name, file in of_base.items() if name.endswith("processor_config.json")}
    merged: PreTrainedModel = merge(on_base(adapter, model))
    _name_ends(merged, source)
    _name_padding(merged, source)
    with whole_or_nothing(out) as folder:
        merged.save_pretrained(folder)
        # The tokenizer of a GGUF file is in it.
        if not own and origin.endswith(".gguf"):
            load_by_name(AutoTokenizer.from_pretrained, origin, "--model", settings).save_pretrained(folder)
        copy_files(own, folder)
        copy_files(of_base, folder)
        if text is not None:
            (folder / "Modelfile").write_text(text, encoding="utf-8")
    return merged


def _name_ends(model: Any, source: Path) -> None:
    """Let a model that generates stop at the end of an answer that training learned, where ``source`` tells it."""
    learned = read_inputs(source)
    # An adapter of another program has no inputs of training, and need not have a tokenizer.
    if not (learned.form and (source / TOKENIZER_FILE).exists() and model.can_generate()):
        return
    tokenizer = load_tokenizer(str(source.resolve()), "--model")
    end = None
    if learned.form == "chat":
        system = [{"role": "system", "content": learned.system}] if learned.system is not None else []
        end = end_of_turn_of(tokenizer, [*system, {"role": "user", "content": "A question."}])
    own = model.generation_config.eos_token_id
    ends = end_tokens(model, tokenizer, end) or []
    if {*ends} > {*(own if isinstance(own, list) else [own])} - {None}:
        model.generation_config.eos_token_id = ends


def _name_padding(model: Any, source: Path) -> None:
    """Let a classifier that reads the last token before the padding know the padding of the adapter's tokenizer."""
    if label_names(model) and (source / TOKENIZER_FILE).exists():
        padding = load_tokenizer(str(source.resolve()), "--model").pad_token_id
        if padding is not None:
            set_padding(model, padding)


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
