"""Tokenizers, configs and models by the name that a user gives, loaded by the keys of ``model``."""

import struct
from collections.abc import Collection, Sequence
from dataclasses import replace
from importlib.util import find_spec
from math import inf
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from dynrank.app.hub import hub_answers
from dynrank.app.models.names import ModelSettings, model_source, public_name
from dynrank.errors import ConfigurationError
from dynrank.layers.foreign import store_on, stored_on
from dynrank.layers.quantized import is_quantized
from dynrank.layers.vocabulary import remember_tokens

# The errors of transformers and the libraries below it for files that they cannot use.
_FAULTS: tuple[type[Exception], ...] = (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError)
_FAULTS += (RuntimeError, ImportError, ZeroDivisionError, StrictDataclassError, SafetensorError, struct.error)
# The names that transformers gives tables with a vector for each position.
_POSITIONS = ("position_embeddings", "embed_positions", "wpe")
_PLAIN = ModelSettings()


def load_by_name(loader: Any, name: str, key: str, settings: ModelSettings = _PLAIN, **options: Any) -> Any:
    """What ``loader``, a ``from_pretrained`` of transformers or a function like it, loads with ``options``.

    ``name`` and ``key`` are as for :func:`dynrank.app.models.names.model_source`, also in the functions below.
    """
    source = model_source(name, key)
    if source.endswith(".json") and loader != AutoConfig.from_pretrained:
        raise ConfigurationError(f"{key}={name} is a config without weights; set {key} to a folder or to ORG/NAME")
    if source.endswith(".gguf"):
        if find_spec("gguf") is None:
            raise ConfigurationError(f"{key}={name} needs the package gguf: pip install gguf, or 'dynrank[code]'")
        if settings.quantization != "none":
            raise ConfigurationError(
                f"{key}={name} is a GGUF file, whose weights bitsandbytes does not pack; set model.quantization=none"
            )
        options = {**options, "gguf_file": Path(source).name}
        source = str(Path(source).parent)
    options |= {"revision": settings.revision} if settings.revision is not None else {}
    if not Path(source).exists() and not constants.HF_HUB_OFFLINE and not hub_answers(source, settings.revision):
        options["local_files_only"] = True
    try:
        return loader(source, trust_remote_code=settings.trust_remote_code, **options)
    except _FAULTS as error:
        if "trust_remote_code" in str(error):
            read = "read that code, and set model.trust_remote_code=true"
            never = "commands do not run such code; use PEFT in your own program"
            advice = never if key.startswith("--") else read
            raise ConfigurationError(f"{key}={name} runs code that comes with its files; {advice}") from error
        what = f"{type(error).__name__}: {' '.join(str(error).split()):.500}"
        fix = _fix(error, key, settings)
        raise ConfigurationError(f"transformers cannot load {key}={name}: {what}; set {fix}") from error


def folder_with(patterns: Sequence[str], name: str, key: str, settings: ModelSettings = _PLAIN) -> Path:
    """A model's folder, or that of its snapshot in the hub's cache, which then has the files of these ``patterns``."""

    def loader(source: str, trust_remote_code: bool, **options: Any) -> Path:
        return Path(snapshot_download(source, allow_patterns=[*patterns], **options))

    folder = Path(model_source(name, key))
    return folder if folder.exists() else load_by_name(loader, name, key, settings)


def load_tokenizer(name: str, key: str = "task.model", settings: ModelSettings = _PLAIN) -> Any:
    """The tokenizer of a model, with a padding token."""
    tokenizer = load_by_name(AutoTokenizer.from_pretrained, name, key, settings)
    # Most decoders have no padding token.
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def read_config(
    name: str, key: str = "task.model", settings: ModelSettings = _PLAIN, **changes: Any
) -> PretrainedConfig:
    """The config of a model, with ``changes`` such as ``num_labels=3``."""
    return cast(PretrainedConfig, load_by_name(AutoConfig.from_pretrained, name, key, settings, **changes))


def load_classifier(
    name: str,
    num_labels: int,
    key: str = "task.model",
    settings: ModelSettings = _PLAIN,
    *,
    tokenizer: str | None = None,
    on_meta: bool = False,
) -> nn.Module:
    """A pre-trained sequence classifier with a new head, in float32, for ``num_labels`` classes.

    ``tokenizer`` is the folder or name of the tokenizer that pads its texts; None: the model's own. ``on_meta`` builds
    the classifier from its config only, without memory for weights; what its files lack is then unknown.
    """
    config = read_config(name, key, settings, num_labels=num_labels)
    cls = AutoModelForSequenceClassification
    empty = _on_meta(cls, config, key, replace(settings, quantization="none"))
    heads = _heads_of(empty, f"{key}={name!r}")
    if on_meta:
        model = empty if settings.quantization == "none" else _on_meta(cls, config, key, settings, kept=heads)
    else:
        # A new head replaces one that was trained for other classes.
        options = {"num_labels": num_labels, "ignore_mismatched_sizes": True}
        model, info = _load(cls, config, name, key, settings, kept=heads, **options)
        inside = tuple(f"{head}." for head in heads)
        misfits = [str(entry[0]) for entry in info["mismatched_keys"] if not str(entry[0]).startswith(inside)]
        if misfits:
            raise ConfigurationError(f"weights {misfits[:3]} of {key}={name!r} do not fit its config.json")
        missing = [parameter for parameter in info["missing_keys"] if not parameter.startswith(inside)]
        heads += _new_modules(model, missing, f"{key}={name!r}")
    store_on(model, "heads", heads)
    # Without weights any token serves, and no file is needed.
    set_padding(model, 0 if on_meta else load_tokenizer(tokenizer or name, key, settings).pad_token_id)
    # The head is trained, so it needs float32 even if the frozen base has fewer bits.
    for head in head_names(model):
        model.get_submodule(head).float().register_forward_pre_hook(_in_dtype_of_weight)
    return cast(nn.Module, model)


def set_padding(model: Any, token_id: int | None) -> None:
    """Let ``model`` know the token that pads texts: decoders classify by the last token before the padding."""
    # Of a model that also reads images, the part that reads texts has a config of its own.
    for config in (model.config, model.config.get_text_config()):
        config.pad_token_id = token_id


def head_names(model: nn.Module) -> list[str]:
    """Names of the modules of a model from :func:`load_classifier` that are new, or made for classes; else none."""
    heads: list[str] = stored_on(model, "heads") or []
    return heads


def _heads_of(model: Any, where: str) -> list[str]:
    """The children of a sequence classifier that are not its body, as transformers tells it."""
    if model.base_model is model:
        raise ConfigurationError(f"{where} is a {type(model).__name__}, which does not tell its body from its head")
    heads = [(name, child) for name, child in model.named_children() if child is not model.base_model]
    return [name for name, child in heads if next(child.parameters(), None) is not None]


def _new_modules(model: nn.Module, missing: Collection[str], where: str) -> list[str]:
    """The modules that have only ``missing`` parameters, without those inside of another.

    Such a module (a pooler of BERT, if the base was stored without it) is new, so an adapter has to hold it.
    """
    if not missing:
        return []
    new: list[str] = []
    for name, module in model.named_modules():
        own = {f"{name}.{parameter}" for parameter, _ in module.named_parameters()}
        if own and own <= {*missing} and not f"{name}.".startswith(tuple(f"{outer}." for outer in new)):
            new.append(name)
    inside = tuple(f"{name}." for name in new)
    lost = sorted(parameter for parameter in missing if not parameter.startswith(inside))
    packed = [name for name in new if any(map(is_quantized, model.get_submodule(name).modules()))]
    if lost or packed:
        raise ConfigurationError(
            f"{where} lacks the weights of {(lost or packed)[:3]}, so they are new; an adapter can hold only whole "
            "modules that are not packed (model.quantization); take another model"
        )
    return new


def positions(model: nn.Module) -> float:
    """The most tokens that a model can read, if it has learned a vector for each position; otherwise inf."""
    tables = [m for name, m in model.named_modules() if name.endswith(_POSITIONS) and isinstance(m, nn.Embedding)]
    return min((m.num_embeddings - _first_position(m) for m in tables), default=inf)


def _first_position(table: nn.Embedding) -> int:
    # RoBERTa and others count from behind the padding's position, BART and OPT from an offset.
    own = getattr(table, "offset", 0)
    return own if own or table.padding_idx is None else table.padding_idx + 1


def load_causal_lm(
    name: str, key: str = "task.model", settings: ModelSettings = _PLAIN, *, on_meta: bool = False
) -> nn.Module:
    """A pre-trained causal language model; ``on_meta`` builds it without memory for weights."""
    config = read_config(name, key, settings)
    if on_meta:
        return cast(nn.Module, _on_meta(AutoModelForCausalLM, config, key, settings))
    model, info = _load(AutoModelForCausalLM, config, name, key, settings)
    missing = sorted(info["missing_keys"])
    if missing:
        raise ConfigurationError(f"{key}={name!r} is no causal language model: it lacks {missing[:3]}")
    return cast(nn.Module, model)


def load_weights(loader: Any, name: str, key: str, settings: ModelSettings = _PLAIN, **options: Any) -> tuple[Any, Any]:
    """(model, transformers' loading info); the weights of a GGUF file are unpacked into plain layers."""
    gguf = model_source(name, key).endswith(".gguf")
    # Without this config, newer versions of transformers may keep layers packed.
    if gguf and hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model, info = load_by_name(loader, name, key, settings, output_loading_info=True, **options)
    quantizer = getattr(model, "hf_quantizer", None) if gguf else None
    # The weights are no longer quantised. With this config, transformers would refuse to save or train the model.
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
    return model, info


def _enable_checkpointing(model: Any) -> None:
    """Let the blocks of a transformers model save only their inputs, and run again in the backward."""
    try:
        enable: Any = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    except ValueError as error:
        raise ConfigurationError(f"{error}; set model.gradient_checkpointing=false") from None


def _load(
    cls: Any, config: Any, name: str, key: str, settings: ModelSettings, kept: Sequence[str] = (), **options: Any
) -> tuple[Any, Any]:
    options |= _options(config, settings)
    if settings.quantization != "none":
        options["quantization_config"] = _packing_of(settings, options["dtype"], kept)
    model, info = load_weights(cls.from_pretrained, name, key, settings, **options)
    # An adapter says by these on which base it was trained; transformers itself forgets the revision.
    store_on(model, "revision", settings.revision)
    # A short name is no place at which the files could be asked later.
    remember_tokens(model)
    source = model_source(name, key)
    # Of a GGUF file, transformers knows only the folder.
    model.config.name_or_path = public_name(source if source.endswith(".gguf") else model.config.name_or_path)
    _keep_packing(model)
    if settings.gradient_checkpointing:
        _enable_checkpointing(model)
    return model, info


def _on_meta(cls: Any, config: Any, key: str, settings: ModelSettings, kept: Sequence[str] = ()) -> Any:
    options = _options(config, settings)
    try:
        with torch.device("meta"):
            model = cls.from_config(config, trust_remote_code=settings.trust_remote_code, **options)
    except _FAULTS as error:
        fix = _fix(error, key, settings)
        raise ConfigurationError(f"transformers cannot build the model of this config ({error}); set {fix}") from error
    if settings.quantization != "none":
        _pack(model, _packing_of(settings, options["dtype"], kept), options["dtype"])
    if settings.gradient_checkpointing:
        _enable_checkpointing(model)
    return model


def _fix(error: Exception, key: str, settings: ModelSettings) -> str:
    """The key that fixes ``error``: an ImportError means that the package of the chosen attention is missing."""
    return "model.attention" if isinstance(error, ImportError) and settings.attention != "auto" else key


def _options(config: PretrainedConfig, settings: ModelSettings) -> dict[str, Any]:
    """Arguments that ``from_pretrained`` and ``from_config`` share."""
    own = config.dtype or torch.float32
    dtype = own if settings.dtype == "auto" else getattr(torch, settings.dtype)
    attention = {} if settings.attention == "auto" else {"attn_implementation": settings.attention}
    return {"dtype": dtype, **attention}


def _in_dtype_of_weight(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    dtype = next(module.parameters()).dtype
    return tuple(value.to(dtype) if isinstance(value, Tensor) else value for value in args)


def _packing_of(settings: ModelSettings, dtype: torch.dtype, kept: Sequence[str]) -> BitsAndBytesConfig:
    """The config for ``from_pretrained`` that packs all linear layers except ``kept`` (if empty, the output head)."""
    for package in ("bitsandbytes", "accelerate"):
        if find_spec(package) is None:
            needed = f"model.quantization={settings.quantization} needs {package}"
            raise ConfigurationError(f"{needed}: pip install 'dynrank[hf,optimizers]'")
    nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype}
    options = {"load_in_4bit": True, **nf4} if settings.quantization == "nf4" else {"load_in_8bit": True}
    return BitsAndBytesConfig(**options, llm_int8_skip_modules=[*kept] or None)


def _pack(model: PreTrainedModel, packing: BitsAndBytesConfig, dtype: torch.dtype) -> None:
    """Put bitsandbytes' layers into a model on the meta device, in place, as ``from_pretrained`` does."""
    # At the head of the file, this import would load every installed library of quantisation.
    from transformers.quantizers import AutoHfQuantizer

    before = torch.get_default_dtype()
    # New layers create their biases in the default dtype.
    torch.set_default_dtype(dtype)
    try:
        AutoHfQuantizer.from_config(packing, pre_quantized=False).preprocess_model(model, device_map={"": "cpu"})
    finally:
        torch.set_default_dtype(before)


def _keep_packing(model: nn.Module) -> None:
    """Keep bitsandbytes from packing NF4 weights again in every evaluation on CPUs with AVX512-BF16.

    It does so for its own product. That product does not support every shape, and undoing the packing is not exact.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010, for mypy
