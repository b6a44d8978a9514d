"""Reading a stored adapter with all checks, for loading, swapping, merging, squeezing and inspecting.

PEFT stores the factors of stacked parameters (``target_parameters``) under nested wrappers. The wrapper of a module's
first parameter is innermost: ``experts.base_layer.lora_A`` belongs to ``experts.gate_up_proj`` and ``experts.lora_A``
to ``experts.down_proj``. The files do not name the parameters. In all classes of transformers the down projection
comes last.

Factors in float8 were multiplied by a power of two, which the alpha of their layer undoes (:mod:`.precision`). The
metadata names these powers, so that here both are as they were before, and training goes on with steps of the same
size. Without the metadata, the update is the same.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from torch import Tensor

from dynrank.adapters.config import AdapterConfig
from dynrank.adapters.folder import CONFIG_FILE
from dynrank.adapters.packed import PACKED_FILE, PackedFile
from dynrank.adapters.precision import MOST_POWER
from dynrank.adapters.single_file import SUFFIX, SingleFile, open_file
from dynrank.adapters.stored import (
    StoredAdapter,
    StoredLayer,
    checked_layer,
    numbers_as_such,
    opened,
    read_json,
    readable,
    refuse_faults,
    stored_tensor,
)
from dynrank.errors import ConfigurationError, read_as
from dynrank.patterns import PREFIX

WEIGHTS_FILE = "adapter_model.safetensors"
# In the metadata of the file: {layer: exponent of the power of two by which its factors were multiplied}, as JSON.
POWERS = "dynrank.powers"
_Power = Annotated[int, Field(strict=True, ge=-MOST_POWER, le=MOST_POWER)]
_INSIDE = ".base_layer"
# PEFT stores an embedding with added tokens as it finds it: if it was trained, by its name, and again in its wrapper.
_WRAPPED_KEY = re.compile(r".+\.(?:modules_to_save|original_module)\.[^.]+")
_FACTOR_KEY = re.compile(r"(?P<layer>.+)\.(?:lora_(?P<factor>[AB])\.weight|lora_embedding_(?P<embedding>[AB]))")


@dataclass(frozen=True)
class Adapter(StoredAdapter):
    """A PEFT LoRA adapter from a folder; names are module names, and ``others`` are the tensors of modules_to_save.

    PEFT also stores embeddings of the base among these, if they have LoRA or added tokens.

    Attributes:
        config: settings of the adapter.
    """

    config: AdapterConfig

    def is_trained(self, name: str) -> bool:
        """Whether one of ``others`` was trained, as a part of modules_to_save; otherwise it is a weight of the base."""
        owner = name.rpartition(".")[0]
        # Then PEFT also stores the other end of a tied weight, and does not name it.
        if self.config.ensure_weight_tying and self.config.modules_to_save and not owner.endswith(_INSIDE):
            return True
        # To PEFT "classifier" also means a module "pre_classifier", and all that is inside.
        return any(f"{module}." in f"{owner}." for module in self.config.modules_to_save or ())


def read_adapter(path: str | Path) -> Adapter:
    """Read a PEFT adapter (ours or PEFT's) from its folder into memory, for :func:`dynrank.swap_adapter`.

    Raises:
        ConfigurationError: if a file is missing, broken or not of a LoRA adapter.

    >>> import tempfile, torch, dynrank
    >>> folder = tempfile.mkdtemp()
    >>> dynrank.save_adapter(dynrank.add_lora(torch.nn.Sequential(torch.nn.Linear(8, 8)), rank=2), folder)
    >>> {name: layer.rank for name, layer in dynrank.read_adapter(folder).layers.items()}
    {'0': 2}
    """
    with open_adapter(path) as adapter:
        keys = [*adapter.others.values(), *(key for layer in adapter.layers.values() for key in layer.keys)]
        return replace(adapter, tensor={key: adapter.tensor(key).clone() for key in keys}.__getitem__)


@contextmanager
def open_adapter(path: str | Path) -> Iterator[Adapter]:
    """The PEFT adapter in a folder; each tensor is read from the file when it is used."""
    folder = Path(path)
    weights = weights_file(folder)
    config = read_json(AdapterConfig, folder / CONFIG_FILE)
    if not weights.is_file():
        raise ConfigurationError(
            f"no {WEIGHTS_FILE} in {str(folder)!r}; pickled adapters (.bin) are not read: convert them to safetensors"
        )
    with opened(weights) as raw:
        file = PackedFile(raw, weights) if weights.name == PACKED_FILE else raw
        factors, others = _sorted_keys(file.keys(), config, folder)
        layers = _checked_layers(file, factors, others, config, folder)
        powers = _powers(file.metadata() or {}, layers, weights)
        tensor = partial(stored_tensor, file, path=weights)
        if powers:
            tensor = partial(_divided, tensor, {key: powers[name] for name in powers for key in layers[name].keys})
            layers |= {name: _multiplied(layers[name], 4.0**power) for name, power in powers.items()}
        yield Adapter(str(folder), layers, others, tensor, config)


def weights_file(folder: Path) -> Path:
    """The file with an adapter's tensors: PEFT's, or if there is none, a packed one if there is one."""
    packed = folder / PACKED_FILE
    return packed if packed.is_file() and not (folder / WEIGHTS_FILE).exists() else folder / WEIGHTS_FILE


def open_stored(path: str | Path) -> AbstractContextManager[Adapter | SingleFile]:
    """The LoRA at ``path``: a PEFT adapter's folder by :func:`open_adapter`, or a file by :func:`open_file`."""
    path = Path(path)
    return open_file(path) if path.is_file() or path.suffix == SUFFIX else open_adapter(path)


def _sorted_keys(
    keys: Iterable[str], config: AdapterConfig, folder: Path
) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """({layer: {"A": key, "B": key}}, {name in the model: key of any other tensor}) of a PEFT file.

    The name of a layer is that of its module, or of its parameter (``target_parameters``).
    """
    factors: dict[str, dict[str, str]] = {}
    others = {}
    for key in keys:
        if not key.startswith(PREFIX):
            raise ConfigurationError(
                f"keys in {str(folder / WEIGHTS_FILE)!r} must be PEFT's ({PREFIX}...), got {key!r}; save it with PEFT"
            )
        name = key.removeprefix(PREFIX)
        match = _FACTOR_KEY.fullmatch(name)
        if match:
            factors.setdefault(match["layer"], {})[match["factor"] or match["embedding"]] = key
        elif not _WRAPPED_KEY.fullmatch(name):
            others[name] = key
    if not factors:
        raise ConfigurationError(f"{str(folder / WEIGHTS_FILE)!r} holds no LoRA factors")
    try:
        of_parameters = parameter_names(factors, config)
    except ValueError as fault:
        raise ConfigurationError(f"the adapter {str(folder)!r} cannot be used: {fault}") from None
    factors = {of_parameters.get(name, name): pair for name, pair in factors.items()}
    return {name: factors[name] for name in sorted(factors, key=numbers_as_such)}, others


def _checked_layers(
    file: Any,
    factors: Mapping[str, Mapping[str, str]],
    others: Iterable[str],
    config: AdapterConfig,
    folder: Path,
) -> dict[str, StoredLayer]:
    settings = config.of_layers(factors)
    layers = {}
    faults = [f"{name!r} is a LoRA tensor of an unknown kind" for name in others if ".lora_" in name]
    for name, pair in factors.items():
        try:
            layers[name] = checked_layer(file, pair, settings[name], is_parameter(name, config))
        except ValueError as fault:
            faults.append(f"{name!r} {fault}")
    refuse_faults(f"the adapter {str(folder)!r} cannot be used", faults)
    return layers


def _powers(metadata: Mapping[str, str], layers: Iterable[str], weights: Path) -> dict[str, int]:
    """{layer: exponent of the power of two in its factors}, for the layers that have one."""
    if POWERS not in metadata:
        return {}
    where = f"{POWERS} in the metadata of {str(weights)!r}"
    with readable(where):
        content = json.loads(metadata[POWERS])
    powers = read_as(dict[str, _Power], content, where)
    refuse_faults(f"{where} must be of the file's layers", [f"got {name!r}" for name in powers if name not in layers])
    return powers


def _divided(tensor: Callable[[str], Tensor], powers: Mapping[str, int], key: str) -> Tensor:
    return tensor(key) * 2.0 ** -powers[key] if key in powers else tensor(key)


def _multiplied(layer: StoredLayer, factor: float) -> StoredLayer:
    return replace(layer, alpha=layer.alpha * factor, scaling=layer.scaling * factor)


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
