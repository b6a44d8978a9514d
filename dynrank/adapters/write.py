"""The two files of an adapter in PEFT's format, written anew or from another adapter."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from dynrank.adapters.folder import CONFIG_FILE
from dynrank.adapters.packed import PACKED_FILE, in_codes, packed
from dynrank.adapters.precision import FLOAT8, NF4, FileDtype, Rounded, Rounding, head_in, in_dtype, rounding
from dynrank.adapters.read import POWERS, WEIGHTS_FILE, Adapter
from dynrank.adapters.stored import Factors
from dynrank.output.whole_file import os_errors, whole_file
from dynrank.patterns import peft_ranks


def write_adapter(
    folder: Path,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    powers: Mapping[str, int] | None = None,
    packs: Iterable[str] = (),
) -> None:
    """Write the two files of an adapter, and replace earlier ones; ``tensors`` are contiguous and on the CPU.

    ``powers`` is {layer: exponent of the power of two by which its factors were multiplied}; ``packs`` are the keys of
    tensors that are packed (:mod:`.packed`), if any.
    """
    metadata = {"format": "pt"} | ({POWERS: json.dumps(powers)} if powers else {})
    tensors = {**tensors}
    factors = {key: tensors.pop(key) for key in packs}
    if factors:
        codes, described = packed(factors)
        tensors |= codes
        metadata |= described
    folder.mkdir(parents=True, exist_ok=True)
    weights = whole_file(folder / (PACKED_FILE if factors else WEIGHTS_FILE))
    settings_file = whole_file(folder / CONFIG_FILE)
    with weights as weights_part, settings_file as config_part, os_errors(folder):
        config_part.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_file(tensors, weights_part, metadata=metadata)
        # By default only the owner can read a file of safetensors.
        weights_part.chmod(config_part.stat().st_mode)


def rewrite_adapter(
    folder: Path,
    adapter: Adapter,
    factors: Mapping[str, Factors],
    dtype: FileDtype | None = None,
    power: int | None = None,
) -> Rounding | None:
    """Write ``adapter`` to ``folder`` with other factors; keys, other tensors and other settings are kept.

    Args:
        folder: where to write.
        adapter: what to write.
        factors: {layer: its factors and scaling}.
        dtype: dtype of the factors and the heads, see :func:`save_adapter`; None: factors as they are given, but in
            float8 if the adapter is.
        power: with float8, the exponent for all layers; None: of each layer the one that fits best.

    Returns:
        What was lost to ``dtype``; None if factors are written as they are given.
    """
    if dtype is None and adapter.float8:
        dtype = FLOAT8
    tensors = {key: _whole(adapter, name, dtype) for name, key in adapter.others.items()}
    settings = {}
    powers = dict[str, int]()
    stored = dict[str, tuple[Rounded, float]]()
    for name, (lora_A, lora_B, scaling) in factors.items():
        layer = adapter.layers[name]
        rows = len(lora_A)
        made = 0
        if dtype is not None:
            new = (
                in_codes(lora_B, lora_A, layer.experts)
                if dtype == NF4
                else in_dtype(lora_B, lora_A, dtype, layer.experts, power)
            )
            lora_A = new.lora_A
            lora_B = new.lora_B
            made = new.power
            stored[name] = new, scaling
        tensors[layer.keys[0]] = lora_A.reshape(rows, -1, *layer.kernel).contiguous()
        tensors[layer.keys[1]] = lora_B.reshape(-1, rows, *[1] * len(layer.kernel)).contiguous()
        rank = rows // layer.experts
        settings[name] = rank, scaling * 4.0**-made * rank
        powers |= {name: made} if made else {}
    config = adapter.config.model_dump(exclude_unset=True) | peft_ranks(settings)
    # PEFT would initialise the factors again on loading, and "orthogonal" supports even ranks only.
    if config.get("init_lora_weights") == "orthogonal":
        config["init_lora_weights"] = True
    keys = [key for name in factors for key in adapter.layers[name].keys] if dtype == NF4 else []
    write_adapter(folder, tensors, config, powers, keys)
    return rounding(stored) if stored else None


def _whole(adapter: Adapter, name: str, dtype: FileDtype | None) -> Tensor:
    """A tensor beside the factors as it is written in a file of ``dtype``."""
    value = adapter.tensor(adapter.others[name])
    # PEFT puts a stored weight of the base into the base, so that must stay as it is.
    return head_in(value, dtype) if dtype is not None and adapter.is_trained(name) else value
