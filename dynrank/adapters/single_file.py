"""Reading and rewriting a LoRA in one safetensors file, the format of diffusers, kohya and ComfyUI.

Layer names are not interpreted, so files of all models are treated alike. Scaling is alpha / rank. Alpha is a tensor of
the layer (kohya), or a value in the metadata (diffusers), or, if there is neither, the rank.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from dynrank.adapters.config import AdapterConfig, LayerSettings
from dynrank.adapters.folder import CONFIG_FILE
from dynrank.adapters.precision import Rounded, Rounding, in_dtype, rounding
from dynrank.adapters.stored import (
    Factors,
    StoredAdapter,
    StoredLayer,
    checked_layer,
    numbers_as_such,
    opened,
    readable,
    refuse_faults,
    stored_tensor,
)
from dynrank.errors import ConfigurationError, read_as
from dynrank.linalg import finite
from dynrank.output.whole_file import os_errors
from dynrank.patterns import peft_ranks

SUFFIX = ".safetensors"
# diffusers stores the settings of PEFT's adapters under this key.
DIFFUSERS = "lora_adapter_metadata"
_FACTOR = re.compile(r"(?P<layer>.+)[._]lora(?:_linear_layer)?[._](?:(?P<down>down|A)|up|B)(?:\.default)?(?:\.weight)?")
# Differences that a file adds to a layer's weight and bias; they do not depend on the factors.
_BESIDE = (".diff", ".diff_b")
# Entries of kohya's metadata that other factors make wrong: the ranks, and hashes of the content. Tools read the ranks
# from the tensors, and compute the hashes where a file has none.
_STALE = (
    *("ss_network_dim", "ss_network_alpha", "ss_network_args"),
    *("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256"),
)


@dataclass(frozen=True)
class SingleFile(StoredAdapter):
    """A LoRA from a single file; tensors of other layers (LoHa, LoKr, DoRA, ...) are in ``others``.

    Attributes:
        alphas: {layer: key of its alpha}; empty if no layer has one.
        configs: {part of the model in diffusers' metadata ("unet", "text_encoder"): its settings}.
        metadata: metadata of the file.
    """

    alphas: Mapping[str, str]
    configs: Mapping[str, AdapterConfig]
    metadata: Mapping[str, str]

    def matrices(self, name: str) -> tuple[Tensor, Tensor]:
        """As :meth:`StoredAdapter.matrices`, in float32 or wider."""
        lora_B, lora_A = super().matrices(name)
        wide = torch.promote_types(lora_A.dtype, torch.float32)
        return lora_B.to(wide), lora_A.to(wide)


@contextmanager
def open_file(path: Path) -> Iterator[SingleFile]:
    """The LoRA in a file; each tensor is read from the file when it is used."""
    if path.suffix != SUFFIX:
        raise ConfigurationError(f"{str(path)!r} must be a {SUFFIX} file; others (.pt, .ckpt, .bin) are not read")
    if path.stem == "adapter_model" and (path.parent / CONFIG_FILE).exists():
        raise ConfigurationError(f"{str(path)!r} belongs to the {CONFIG_FILE} in its folder; give the folder")
    with opened(path) as file:
        metadata = file.metadata() or {}
        pairs, others = _sorted_keys(file.keys())
        alphas = {name: others.pop(f"{name}.alpha") for name in pairs if f"{name}.alpha" in others}
        configs = _configs(metadata, path)
        if configs and alphas:
            raise ConfigurationError(f"{str(path)!r} has alpha twice, in {DIFFUSERS} and for {next(iter(alphas))!r}")
        settings = dict[str, LayerSettings]()
        layers = dict[str, StoredLayer]()
        faults = list[str]()
        for prefix, config in configs.items():
            inner = _inside(prefix, pairs)
            settings |= {inner[name]: of_layer for name, of_layer in config.of_layers(inner).items()}
        for name, pair in pairs.items():
            try:
                layers[name] = checked_layer(file, pair, settings.get(name))
                if name in alphas:
                    alpha = _alpha(stored_tensor(file, alphas[name], path))
                    layers[name] = replace(layers[name], alpha=alpha, scaling=alpha / layers[name].alpha)
            except ValueError as fault:
                faults.append(f"{name!r} {fault}")
        refuse_faults(f"the adapter {str(path)!r} cannot be used", faults)
        if not layers:
            kinds = {key.rpartition(".")[2] for key in others}
            raise ConfigurationError(f"{str(path)!r} holds no plain LoRA layers; its tensors are {sorted(kinds)[:9]}")
        tensor = partial(stored_tensor, file, path=path)
        yield SingleFile(str(path), layers, others, tensor, alphas, configs, metadata)


def rewrite_file(
    path: Path, file: SingleFile, factors: Mapping[str, Factors], dtype: torch.dtype | None = None
) -> Rounding | None:
    """Write ``file`` with other factors; keys, other tensors and metadata are kept.

    The factors are written in ``dtype``, and what is lost to it is returned; None: each in its own dtype, or in
    bfloat16 if that has 8 bits, since the one alpha of all layers cannot undo a power of two for each.
    Ranks and hashes that kohya's tools have written into the metadata are left out.
    All layers get the same alpha, because diffusers 0.42 uses the most common alpha for all. If no layer has an alpha,
    it equals the rank, as ComfyUI assumes. lora_B is multiplied by what the scaling then lacks. The common alpha is the
    smallest of all layers, so that this factor is at least 1, which is safer in half precision.
    """
    ranks = {name: len(lora_A) for name, (lora_A, _, _) in factors.items()}
    tensors = {key: file.tensor(key) for key in file.others.values()}
    alpha = 0.0
    if file.alphas:
        like = file.tensor(next(iter(file.alphas.values())))
        value = torch.full_like(like, 0, dtype=like.dtype if like.is_floating_point() else torch.float32)
        value += min(abs(scaling * ranks[name]) for name, (_, _, scaling) in factors.items())
        tensors |= {file.alphas.get(name, f"{name}.alpha"): value.clone() for name in ranks}
        try:
            # Alpha is rounded to its stored dtype.
            alpha = _alpha(value)
        except ValueError as fault:
            raise ConfigurationError(f"the one alpha of all layers of {file.source!r} {fault}") from None
    stored = dict[str, tuple[Rounded, float]]()
    for name, (lora_A, lora_B, scaling) in factors.items():
        layer = file.layers[name]
        of_file = alpha / ranks[name] if file.alphas else 1.0
        pair = {"A": lora_A, "B": lora_B * (scaling / of_file)}
        if dtype is not None:
            new = in_dtype(pair["B"], pair["A"], dtype)
            stored[name] = new, of_file
            pair = {"A": new.lora_A, "B": new.lora_B}
        for key, (factor, values) in zip(layer.keys, pair.items(), strict=True):
            old = file.tensor(key)
            sizes = (ranks[name], *old.shape[1:]) if factor == "A" else (len(old), ranks[name], *old.shape[2:])
            kind = dtype or (torch.bfloat16 if layer.float8 else old.dtype)
            tensors[key] = values.to(kind).reshape(sizes).contiguous()
            if not finite(tensors[key]):
                raise ConfigurationError(f"{name!r} is too large for {kind} with its scaling in {key!r}")
    metadata = {key: text for key, text in file.metadata.items() if key not in _STALE}
    if file.configs:
        metadata[DIFFUSERS] = _diffusers_metadata(file, ranks)
    with os_errors(path):
        save_file(tensors, path, metadata=metadata or None)
    return rounding(stored) if stored else None


def _sorted_keys(keys: Iterable[str]) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """({layer: {"A": key, "B": key}}, {key: key} of other tensors, with layers that have more than two factors)."""
    keys = [*keys]
    pairs = dict[str, dict[str, str]]()
    others = {key: key for key in keys}
    for key in keys:
        match = _FACTOR.fullmatch(key)
        pair = pairs.setdefault(match["layer"], {}) if match else {}
        if match and (which := "A" if match["down"] else "B") not in pair:
            pair[which] = others.pop(key)
    for key in [*others]:
        layer, _, part = key.rpartition(".")
        while layer and layer not in pairs:
            layer, _, before = layer.rpartition(".")
            part = f"{before}.{part}"
        if layer and part != "alpha" and f".{part}" not in _BESIDE:
            others |= {key: key for key in pairs.pop(layer).values()}
    return {name: pairs[name] for name in sorted(pairs, key=numbers_as_such)}, others


def _configs(metadata: Mapping[str, str], path: Path) -> dict[str, AdapterConfig]:
    """{prefix: settings} in diffusers' metadata; the prefix is "" for a single model."""
    if DIFFUSERS not in metadata:
        return {}
    where = f"{DIFFUSERS} in the metadata of {str(path)!r}"
    with readable(where):
        values = json.loads(metadata[DIFFUSERS])
    by_prefix: dict[str, dict[str, Any]] = {}
    for key, value in read_as(dict[str, Any], values, where).items():
        prefix, _, name = key.rpartition(".")
        by_prefix.setdefault(prefix, {})[name] = value
    return {prefix: read_as(AdapterConfig, settings, where) for prefix, settings in by_prefix.items()}


def _inside(prefix: str, layers: Iterable[str]) -> dict[str, str]:
    """{name inside the part of the model that ``prefix`` names: layer}."""
    start = prefix and f"{prefix}."
    return {name.removeprefix(start): name for name in layers if name.startswith(start)}


def _alpha(tensor: Tensor) -> float:
    alpha = float(tensor) if tensor.numel() == 1 and not tensor.is_complex() else 0.0
    # Some tools read an alpha of 0 as the rank, others as 0.
    if alpha == 0 or not finite(torch.tensor(alpha, dtype=torch.float64)):
        raise ValueError(f"must have a number other than 0 for alpha, got {tensor.flatten()[:3].tolist()}")
    return alpha


def _diffusers_metadata(file: SingleFile, ranks: Mapping[str, int]) -> str:
    values: dict[str, Any] = {}
    for prefix, config in file.configs.items():
        inner = _inside(prefix, ranks)
        settings = config.model_dump(exclude_unset=True)
        settings |= peft_ranks({name: (ranks[layer], ranks[layer]) for name, layer in inner.items()}) if inner else {}
        values |= {f"{prefix}.{key}" if prefix else key: value for key, value in settings.items()}
    return json.dumps(values, indent=2, sort_keys=True)
