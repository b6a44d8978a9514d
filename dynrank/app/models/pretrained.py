"""Tokenizers, configs and models by the name that a user gives, loaded by the keys of ``model``."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any, cast

import torch
import transformers
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

from dynrank.app.models.names import ModelSettings, model_source, public_name
from dynrank.errors import ConfigurationError
from dynrank.layers.foreign import store_on, stored_on
from dynrank.layers.vocabulary import remember_tokens

# The errors of transformers and the libraries below it for files that they cannot use.
_FAULTS = (OSError, ValueError, TypeError, KeyError, RuntimeError, ImportError, StrictDataclassError, SafetensorError)
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
        if settings.quantization != "none":
            raise ConfigurationError(
                f"{key}={name} is a GGUF file, whose weights bitsandbytes does not pack; set model.quantization=none"
            )
        options = {**options, "gguf_file": Path(source).name}
        source = str(Path(source).parent)
    options |= {"revision": settings.revision} if settings.revision is not None else {}
    with _loading(name, key):
        return loader(source, trust_remote_code=settings.trust_remote_code, **options)


@contextmanager
def _loading(name: str, key: str) -> Iterator[None]:
    """Turn the errors of transformers within the block into a ConfigurationError that names the model."""
    try:
        yield
    except _FAULTS as error:
        what = f"{type(error).__name__}: {' '.join(str(error).split()):.500}"
        raise ConfigurationError(f"transformers cannot load {key}={name}: {what}") from error


def load_tokenizer(name: str, key: str = "task.model", settings: ModelSettings = _PLAIN) -> Any:
    """The tokenizer of a model, with a padding token."""
    tokenizer = load_by_name(AutoTokenizer.from_pretrained, name, key, settings)
    # Most decoders have no padding token.
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def read_config(name: str, key: str = "task.model", settings: ModelSettings = _PLAIN, **changes: Any) -> Any:
    """The config of a model, with ``changes`` such as ``num_labels=3``."""
    return load_by_name(AutoConfig.from_pretrained, name, key, settings, **changes)


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
    empty = _on_meta(cls, config, name, key, replace(settings, quantization="none"))
    if empty.base_model is empty:
        raise ConfigurationError(f"{key}={name!r} is a {type(empty).__name__}, whose head transformers does not name")
    parts = [(part, child) for part, child in empty.named_children() if child is not empty.base_model]
    heads = [part for part, child in parts if next(child.parameters(), None) is not None]
    if on_meta:
        model = _on_meta(cls, config, name, key, settings, kept=heads)
    else:
        # A new head replaces one that was trained for other classes.
        options = {"num_labels": num_labels, "ignore_mismatched_sizes": True}
        model, info = _load(cls, config, name, key, settings, kept=heads, **options)
        absent = [*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])]
        if drawn := sorted(weight for weight in absent if not weight.startswith(tuple(f"{head}." for head in heads))):
            raise ConfigurationError(
                f"{key}={name!r} has no weights that fit {drawn[:3]}, and transformers would draw them; give a folder "
                "with them (AutoModelForSequenceClassification.from_pretrained(…).save_pretrained(FOLDER))"
            )
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
    model.config.get_text_config().pad_token_id = token_id


def head_names(model: nn.Module) -> list[str]:
    """Names of the modules of a model from :func:`load_classifier` that are new, or made for classes; else none."""
    return cast(list[str], stored_on(model, "heads") or [])


def positions(model: nn.Module) -> float:
    """The most tokens that a model can read, if it has learned a vector for each position; otherwise inf."""
    tables = [m for name, m in model.named_modules() if name.endswith(_POSITIONS) and isinstance(m, nn.Embedding)]
    # RoBERTa and others count from behind the padding's position, BART and OPT from an offset.
    firsts = [getattr(m, "offset", 0) or (0 if m.padding_idx is None else m.padding_idx + 1) for m in tables]
    return min((m.num_embeddings - first for m, first in zip(tables, firsts, strict=True)), default=inf)


def load_causal_lm(
    name: str, key: str = "task.model", settings: ModelSettings = _PLAIN, *, on_meta: bool = False
) -> nn.Module:
    """A pre-trained causal language model; ``on_meta`` builds it without memory for weights."""
    config = read_config(name, key, settings)
    if on_meta:
        return cast(nn.Module, _on_meta(AutoModelForCausalLM, config, name, key, settings))
    model, info = _load(AutoModelForCausalLM, config, name, key, settings)
    if missing := sorted(info["missing_keys"]):
        raise ConfigurationError(f"{key}={name!r} is no causal language model: it lacks {missing[:3]}")
    return cast(nn.Module, model)


def load_weights(loader: Any, name: str, key: str, settings: ModelSettings = _PLAIN, **options: Any) -> tuple[Any, Any]:
    """(model, transformers' loading info); the weights of a GGUF file are unpacked into plain layers."""
    gguf = model_source(name, key).endswith(".gguf")
    # Without this config, newer versions of transformers may keep layers packed.
    if gguf and hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model, info = load_by_name(loader, name, key, settings, output_loading_info=True, **options)
    # The weights are no longer quantised. With this config, transformers would refuse to save or train the model.
    if gguf and getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer.remove_quantization_config(model)
    return model, info


def _enable_checkpointing(model: Any) -> None:
    """Let the blocks of a transformers model save only their inputs, and run again in the backward."""
    enable: Any = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})


def _load(
    cls: Any, config: Any, name: str, key: str, settings: ModelSettings, kept: Sequence[str] = (), **options: Any
) -> tuple[Any, Any]:
    options |= _options(config, settings)
    if settings.quantization != "none":
        with _loading(name, key):
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
        with _loading(name, key):
            _enable_checkpointing(model)
    return model, info


def _on_meta(cls: Any, config: Any, name: str, key: str, settings: ModelSettings, kept: Sequence[str] = ()) -> Any:
    options = _options(config, settings)
    with _loading(name, key):
        with torch.device("meta"):
            model = cls.from_config(config, trust_remote_code=settings.trust_remote_code, **options)
        if settings.quantization != "none":
            _pack(model, _packing_of(settings, options["dtype"], kept), options["dtype"])
        if settings.gradient_checkpointing:
            _enable_checkpointing(model)
    return model


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
