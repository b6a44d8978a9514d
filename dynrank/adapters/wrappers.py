"""PEFT's names for stacked parameters (``target_parameters``), whose factors are stored under nested wrappers.

The wrapper of a module's first parameter is innermost: ``experts.base_layer.lora_A`` belongs to
``experts.gate_up_proj`` and ``experts.lora_A`` to ``experts.down_proj``. The files do not name the parameters. In all
classes of transformers the down projection comes last.
"""

import re
from collections.abc import Iterable

from dynrank.adapters.config import AdapterConfig

_INSIDE = ".base_layer"


def wrapper_names(parameters: Iterable[str]) -> dict[str, str]:
    """{parameter: name of PEFT's wrapper for its factors}, if only these parameters have LoRA."""
    by_module: dict[str, list[str]] = {}
    # False sorts before True, so the down projection comes last.
    for name in sorted(parameters, key=lambda name: name.rpartition(".")[2].startswith("down")):
        by_module.setdefault(name.rpartition(".")[0], []).append(name)
    return {
        name: module + _INSIDE * (len(names) - 1 - depth)
        for module, names in by_module.items()
        for depth, name in enumerate(names)
    }


def parameter_names(wrappers: Iterable[str], config: AdapterConfig) -> dict[str, str]:
    """{wrapper: parameter} for the names in a file that belong to parameters by ``config``; others are modules."""
    by_module: dict[str, list[str]] = {}
    for name in wrappers:
        by_module.setdefault(name.replace(_INSIDE, ""), []).append(name)
    found: dict[str, str] = {}
    for module, names in by_module.items():
        leaves = _leaves(module, config)
        if not leaves:
            continue
        if len(leaves) != len(names):
            raise ValueError(f"{module!r} must have factors for {leaves} (target_parameters), got {len(names)} pairs")
        parameters = [f"{module}.{leaf}" for leaf in leaves]
        found |= {wrapper: parameter for parameter, wrapper in wrapper_names(parameters).items()}
    return found


def _leaves(module: str, config: AdapterConfig) -> list[str]:
    """The parameters of ``module`` that have LoRA by ``target_parameters``."""
    pairs = [name.rpartition(".") for name in config.target_parameters or ()]
    named = [leaf for owner, _, leaf in pairs if owner and f".{module}".endswith(f".{owner}")]
    targets = config.target_modules or ()
    if isinstance(targets, str):
        is_target = re.fullmatch(targets, module) is not None
    else:
        is_target = any(f".{module}".endswith(f".{target}") for target in targets)
    return named if named or is_target else [leaf for owner, _, leaf in pairs if not owner]


def is_parameter(name: str, config: AdapterConfig) -> bool:
    """Whether the layer is a parameter, whose factors may stack several products, and not a module."""
    module, _, leaf = name.rpartition(".")
    return leaf in _leaves(module, config)
