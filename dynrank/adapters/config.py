"""``adapter_config.json`` of PEFT: written so that no two patterns overlap, and read with every value checked."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dynrank.errors import ConfigurationError
from dynrank.rank_map import matches, peft_ranks

CONFIG_FILE = "adapter_config.json"
# Settings of a PEFT config whose arithmetic is not y = W x + s B A x.
_UNSUPPORTED = (
    "use_dora",
    "lora_bias",
    "alora_invocation_tokens",
    "target_parameters",
    "layer_replication",
    "trainable_token_indices",
    "use_qalora",
    "megatron_config",
)

# Initialisations (besides true and false) that do not take a part out of the base weight, as pissa or olora do.
_HARMLESS_INIT = ("gaussian", "orthogonal", "eva")

_LARGEST = 3.4e38  # what float32 takes


def make_config(
    layers: Mapping[str, tuple[int, float]],
    *,
    target_modules: Sequence[str] | str,
    modules_to_save: Sequence[str],
    dropout: float,
    base: str,
    base_class: type | None = None,
) -> dict[str, Any]:
    """The settings of an adapter; ranks and alphas as :func:`dynrank.rank_map.peft_ranks` writes them.

    Args:
        layers: module name -> (rank, alpha).
        target_modules: names, or an expression for whole names.
        modules_to_save: names of modules stored whole.
        dropout: of the update's input.
        base: folder or hub name of the base model, "" if unknown.
        base_class: its class, for PEFT's AutoPeftModel and for ``dynrank merge``.
    """
    auto_mapping = base_class and {"base_model_class": base_class.__name__, "parent_library": base_class.__module__}
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base or None,
        "auto_mapping": auto_mapping,
        "inference_mode": True,
        **peft_ranks(layers),
        "lora_dropout": dropout,
        "target_modules": target_modules,
        "modules_to_save": list(modules_to_save) or None,
        "bias": "none",
    }


def read_config(folder: Path) -> dict[str, Any]:
    """The settings of the adapter in ``folder``.

    Raises:
        ConfigurationError: if the file is missing or broken, or a value has no meaning here (all faults are listed).
    """
    try:
        config: Any = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"cannot read the adapter {str(folder / CONFIG_FILE)!r}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(f"{str(folder / CONFIG_FILE)!r} is not JSON: {error}") from None
    kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
    if kind != "LORA":
        raise ConfigurationError(f"peft_type must be LORA, got {kind!r} in {str(folder / CONFIG_FILE)!r}")
    faults = _config_faults(config)
    if faults:
        raise ConfigurationError(f"{str(folder / CONFIG_FILE)!r} cannot be used:\n  " + "\n  ".join(faults))
    return dict(config)


def _config_faults(config: Mapping[str, Any]) -> list[str]:
    faults = [f"{key} must be unset, got {config[key]!r}" for key in _UNSUPPORTED if config.get(key)]
    if config.get("bias", "none") != "none":
        faults.append(f"bias must be 'none', got {config['bias']!r}")
    init = config.get("init_lora_weights", True)
    if init not in (None, True, False, *_HARMLESS_INIT):
        faults.append(
            f"init_lora_weights must leave the base weight alone, got {init!r}; convert the adapter with PEFT"
        )
    if config.get("use_rslora") not in (None, True, False):
        faults.append(f"use_rslora must be true or false, got {config['use_rslora']!r}")
    if not _is_number(config.get("lora_alpha")):
        faults.append(f"lora_alpha must be a finite number, got {config.get('lora_alpha')!r}")
    if not _is_number(config.get("lora_dropout") or 0.0):
        faults.append(f"lora_dropout must be a number, got {config['lora_dropout']!r}")
    pattern = config.get("alpha_pattern") or {}
    if not isinstance(pattern, dict) or not all(_is_number(value) for value in pattern.values()):
        faults.append(f"alpha_pattern must map names to finite numbers, got {pattern!r}")
    else:
        for key in pattern:
            try:
                matches(key, "")
            except re.error as error:
                faults.append(f"alpha_pattern: {key!r} is not a regular expression: {error}")
    saved = config.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(name, str) for name in saved):
        faults.append(f"modules_to_save must be a list of names, got {saved!r}")
    return faults


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST


def alpha_of(config: Mapping[str, Any], name: str) -> float:
    """Alpha of a layer by PEFT's rule: the first key of alpha_pattern that matches its name, else lora_alpha."""
    for key, value in (config.get("alpha_pattern") or {}).items():
        if matches(key, name):
            return float(value)
    return float(config["lora_alpha"])
