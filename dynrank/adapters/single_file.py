"""A LoRA in one safetensors file, as diffusers, kohya and ComfyUI have it; read, and written back with other factors.

Names of layers are kept and not understood, so files of all models are alike here. Scaling is alpha / rank, where alpha
is a tensor of the layer (kohya), or stands in the metadata (diffusers), or is the rank (neither is there).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dynrank.adapters.config import CONFIG_FILE, AdapterConfig, LayerSettings
from dynrank.adapters.stored import (
    Factors,
    StoredAdapter,
    StoredLayer,
    checked_layer,
    numbers_as_such,
    opened,
    refuse_faults,
    stored_tensor,
    write_tensors,
)
from dynrank.errors import ConfigurationError, read_as
from dynrank.linalg import finite
from dynrank.output.whole_file import os_errors
from dynrank.rank_map import peft_ranks

SUFFIX = ".safetensors"
# diffusers keeps the settings of PEFT's adapters under this key.
DIFFUSERS = "lora_adapter_metadata"
_FACTOR = re.compile(r"(?P<layer>.+)[._]lora(?:_linear_layer)?[._](?:(?P<down>down|A)|up|B)(?:\.default)?(?:\.weight)?")
# What a file adds to a layer's weight and bias has nothing to do with the factors.
_BESIDE = (".diff", ".diff_b")
_HASHES = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")


@dataclass(frozen=True)
class SingleFile(StoredAdapter):
    """A LoRA of a single file; what is not a plain layer of it (LoHa, LoKr, DoRA, ...) is among the others.

    Attributes:
        alphas: layer -> key of its alpha; empty where no layer has one.
        configs: settings by what they stand for in diffusers' metadata ("unet", "text_encoder"), as far as it has them.
        metadata: of the file.
    """

    alphas: Mapping[str, str]
    configs: Mapping[str, AdapterConfig]
    metadata: Mapping[str, str]

    def matrices(self, name: str) -> tuple[Tensor, Tensor]:
        """As those of a :class:`StoredAdapter`, in float32 or wider."""
        lora_B, lora_A = super().matrices(name)
        wide = torch.promote_types(lora_A.dtype, torch.float32)
        return lora_B.to(wide), lora_A.to(wide)


@contextmanager
def open_file(path: Path) -> Iterator[SingleFile]:
    """The LoRA in a file, whose tensors are read from it when they are asked for."""
    if not path.is_file():
        raise ConfigurationError(f"there is no file {str(path)!r}")
    if path.suffix != SUFFIX:
        raise ConfigurationError(f"{str(path)!r} must be a {SUFFIX} file; others (.pt, .ckpt, .bin) are not read")
    if path.stem == "adapter_model" and (path.parent / CONFIG_FILE).exists():
        raise ConfigurationError(f"{str(path)!r} has a {CONFIG_FILE} beside it, which belongs to it: name the folder")
    with opened(path) as file:
        metadata = file.metadata() or {}
        pairs, others = _sorted_keys(file.keys())
        alphas = {name: others.pop(f"{name}.alpha") for name in pairs if f"{name}.alpha" in others}
        configs = _configs(metadata, path)
        if configs and alphas:
            raise ConfigurationError(f"{str(path)!r} says alpha twice, in {DIFFUSERS} and for {next(iter(alphas))!r}")
        settings, layers, faults = _settings(configs, pairs), dict[str, StoredLayer](), list[str]()
        for name, pair in pairs.items():
            try:
                layers[name] = checked_layer(file, pair, settings.get(name))
                if name in alphas:
                    alpha = _alpha(stored_tensor(file, alphas[name], path))
                    layers[name] = replace(layers[name], alpha=alpha, scaling=alpha / layers[name].alpha)
            except ValueError as fault:
                faults.append(f"{name!r} {fault}")
        refuse_faults(faults, str(path))
        if not layers:
            kinds = {key.rpartition(".")[2] for key in others}
            raise ConfigurationError(f"{str(path)!r} holds no plain LoRA layers; its tensors are {sorted(kinds)[:9]}")
        tensor = partial(stored_tensor, file, path=path)
        yield SingleFile(str(path), layers, others, tensor, alphas, configs, metadata)


def rewrite_file(path: Path, file: SingleFile, factors: Mapping[str, Factors]) -> None:
    """Write ``file`` with other factors; keys, dtypes, other tensors and metadata stay, what is said of ranks follows.

    All layers get one alpha, for diffusers 0.42 gives the most common one to all; or, where no layer has one, an alpha
    that is the rank, which is what ComfyUI takes. What an update lacks or has too much then, goes into lora_B. The one
    alpha is the smallest that any layer would have had, so that numbers grow, which half precision takes better.

    Args:
        path: to write to.
        file: opened.
        factors: of every layer of it.
    """
    ranks = {name: len(lora_A) for name, (lora_A, _, _) in factors.items()}
    tensors, alpha = {key: file.tensor(key) for key in file.others.values()}, 0.0
    if file.alphas:
        like = file.tensor(next(iter(file.alphas.values())))
        value = torch.full_like(like, 0, dtype=like.dtype if like.is_floating_point() else torch.float32)
        value += min(abs(scaling * ranks[name]) for name, (_, _, scaling) in factors.items())
        tensors |= {file.alphas.get(name, f"{name}.alpha"): value.clone() for name in ranks}
        try:
            # The alpha as it is stored.
            alpha = _alpha(value)
        except ValueError as fault:
            raise ConfigurationError(f"the one alpha of all layers of {file.source!r} {fault}") from None
    for name, (lora_A, lora_B, scaling) in factors.items():
        fold = scaling / (alpha / ranks[name] if file.alphas else 1.0)
        for key, factor in zip(file.layers[name].keys, (lora_A, lora_B * fold), strict=True):
            old = file.tensor(key)
            sizes = (ranks[name], *old.shape[1:]) if factor is lora_A else (len(old), ranks[name], *old.shape[2:])
            tensors[key] = factor.to(old.dtype).reshape(sizes).contiguous()
            if not finite(tensors[key]):
                raise ConfigurationError(f"{name!r} is too large for {old.dtype} once its scaling is in {key!r}")
    metadata = dict(file.metadata)
    for key, said in {**_said_by_kohya(file, ranks, alpha), **_said_by_diffusers(file, ranks)}.items():
        metadata |= {key: said} if key in metadata else {}
    with os_errors(path):
        if not metadata.keys().isdisjoint(_HASHES):
            # kohya's hashes are those of a file that says nothing but how it was trained
            write_tensors(path, tensors, {key: text for key, text in metadata.items() if key.startswith("ss_")})
            metadata |= {key: text for key, text in _hashes(path).items() if key in metadata}
        write_tensors(path, tensors, metadata)


def _sorted_keys(keys: Iterable[str]) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """({layer: {"A": key, "B": key}}, {key: key} of all else, of layers that are more than two factors, too)."""
    keys, pairs = [*keys], dict[str, dict[str, str]]()
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
    """The settings in diffusers' metadata, by their prefix, which is "" for those of a model by itself."""
    if DIFFUSERS not in metadata:
        return {}
    where = f"{DIFFUSERS} in the metadata of {str(path)!r}"
    try:
        said = json.loads(metadata[DIFFUSERS])
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(f"{where} is not JSON: {error}") from None
    if not isinstance(said, dict):
        raise ConfigurationError(f"{where} must be a mapping, got a {type(said).__name__}")
    by_prefix: dict[str, dict[str, Any]] = {}
    for key, value in said.items():
        prefix, _, name = key.rpartition(".")
        by_prefix.setdefault(prefix, {})[name] = value
    return {prefix: read_as(AdapterConfig, settings, where) for prefix, settings in by_prefix.items()}


def _settings(configs: Mapping[str, AdapterConfig], layers: Iterable[str]) -> dict[str, LayerSettings]:
    """Rank, alpha and scaling of the layers that diffusers' metadata speak of."""
    found: dict[str, LayerSettings] = {}
    for prefix, config in configs.items():
        inner = _inside(prefix, layers)
        found |= {inner[name]: settings for name, settings in config.of_layers(inner).items()}
    return found


def _inside(prefix: str, layers: Iterable[str]) -> dict[str, str]:
    """{name in the model that ``prefix`` stands for: layer}."""
    start = prefix and f"{prefix}."
    return {name.removeprefix(start): name for name in layers if name.startswith(start)}


def _alpha(tensor: Tensor) -> float:
    alpha = float(tensor) if tensor.numel() == 1 and not tensor.is_complex() else 0.0
    if (
        not finite(torch.tensor(alpha, dtype=torch.float64)) or alpha == 0
        # Some tools read an alpha of 0 as the rank, others as 0.
    ):
        raise ValueError(f"must have a number other than 0 for alpha, got {tensor.flatten()[:3].tolist()}")
    return alpha


def _said_by_diffusers(file: SingleFile, ranks: Mapping[str, int]) -> dict[str, str]:
    said: dict[str, Any] = {}
    for prefix, config in file.configs.items():
        inner = _inside(prefix, ranks)
        settings = config.model_dump(exclude_unset=True)
        settings |= peft_ranks({name: (ranks[layer], ranks[layer]) for name, layer in inner.items()}) if inner else {}
        said |= {f"{prefix}.{key}" if prefix else key: value for key, value in settings.items()}
    return {DIFFUSERS: json.dumps(said, indent=2, sort_keys=True)}


def _said_by_kohya(file: SingleFile, ranks: Mapping[str, int], alpha: float) -> dict[str, str]:
    """What kohya's metadata say of ranks, which are Dynamic there where they are unlike; filters have their own."""
    kinds: dict[bool, set[int]] = {}
    for name, rank in ranks.items():
        kinds.setdefault(any(size > 1 for size in file.layers[name].kernel), set()).add(rank)
    dim, conv_dim = (
        str(*kinds[of_filters]) if len(kinds.get(of_filters, ())) == 1 else "Dynamic" for of_filters in (False, True)
    )
    text = f"{alpha:g}" if file.alphas else dim
    said = {"ss_network_dim": dim, "ss_network_alpha": text}
    try:
        arguments = json.loads(file.metadata.get("ss_network_args", ""))
    except (ValueError, RecursionError):
        return said
    if True in kinds and isinstance(arguments, dict) and "conv_dim" in arguments:
        arguments |= {"conv_dim": conv_dim, "conv_alpha": text if file.alphas else conv_dim}
        said["ss_network_args"] = json.dumps(arguments)
    return said


def _hashes(path: Path) -> dict[str, str]:
    """What kohya and the model spec note of a file: a hash of all its numbers, and of 64 KiB behind the first MiB."""
    with path.open("rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        whole = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0x100000)
        legacy = hashlib.sha256(file.read(0x10000)).hexdigest()[:8]
    return dict(zip(_HASHES, (whole, legacy, f"0x{whole}"), strict=True))
