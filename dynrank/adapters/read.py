"""Reading a stored adapter with all checks, for loading, swapping, merging, squeezing and inspecting."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from dynrank.adapters.config import AdapterConfig, read_config
from dynrank.adapters.stored import (
    Factors,
    StoredLayer,
    checked_layer,
    numbers_as_such,
    opened,
    refuse_faults,
    stored_tensor,
)
from dynrank.adapters.wrappers import is_parameter, parameter_names
from dynrank.errors import ConfigurationError
from dynrank.linalg import finite, pooled, products, singular_values, stacked, truncate_product

WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
_FACTOR_KEY = re.compile(r"(?P<layer>.+)\.(?:lora_(?P<factor>[AB])\.weight|lora_embedding_(?P<embedding>[AB]))")


@dataclass(frozen=True)
class Adapter:
    """A PEFT LoRA adapter from a folder, checked without a model; names are module names.

    Attributes:
        source: the folder from which it was read.
        layers: {name: layer}, ordered by name; numbers in names are ordered as numbers.
        others: {name: key in the file} of every other tensor, those of modules_to_save.
        tensor: function that returns the stored tensor of a key.
        config: settings of the adapter.
    """

    source: str
    layers: Mapping[str, StoredLayer]
    others: Mapping[str, str]
    tensor: Callable[[str], Tensor]
    config: AdapterConfig

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """(lora_B (d_out, rank), lora_A (rank, d_in)) of a layer; the products of experts are stacked."""
        layer = self.layers[name]
        lora_B, lora_A = self.matrices(name)
        if len(lora_A) == layer.rank * layer.experts:
            return lora_B, lora_A
        # PEFT allows a rank above min(d_in, d_out), but no product has such a rank.
        pairs = products(lora_B, lora_A, layer.experts)
        change = stacked([truncate_product(*pair, layer.rank) for pair in pairs])
        return change.lora_B, change.lora_A

    def all_factors(self) -> dict[str, Factors]:
        """{layer: its stored factors and scaling}."""
        pairs = {name: self.factors(name) for name in self.layers}
        return {name: (lora_A, lora_B, self.layers[name].scaling) for name, (lora_B, lora_A) in pairs.items()}

    def products(self, name: str) -> list[tuple[Tensor, Tensor]]:
        """(lora_B (d_out, rank), lora_A (rank, d_in)) of each product of a layer; errors as in :meth:`factors`."""
        return products(*self.factors(name), self.layers[name].experts)

    def singular_values(self, name: str) -> Tensor:
        """The singular values of a layer's update, scaling included, descending, float64."""
        return pooled([singular_values(*pair) for pair in self.products(name)]) * abs(self.layers[name].scaling)

    def matrices(self, name: str) -> tuple[Tensor, Tensor]:
        """(lora_B, lora_A) of a layer as matrices, with all stored rows and columns."""
        lora_A, lora_B = (self.tensor(key).flatten(1) for key in self.layers[name].keys)
        if not (finite(lora_A) and finite(lora_B)):
            raise ConfigurationError(
                f"{name!r} holds NaN, inf or a number too large for float32 in the adapter {self.source!r}"
            )
        return lora_B, lora_A


def read_adapter(path: str | Path) -> Adapter:
    """Read a PEFT adapter (ours or PEFT's) from its folder into memory, for :func:`dynrank.swap_adapter`.

    Raises:
        ConfigurationError: as :func:`open_adapter`.
    """
    with open_adapter(path) as adapter:
        keys = [*adapter.others.values(), *(key for layer in adapter.layers.values() for key in layer.keys)]
        return replace(adapter, tensor={key: adapter.tensor(key).clone() for key in keys}.__getitem__)


@contextmanager
def open_adapter(path: str | Path) -> Iterator[Adapter]:
    """The PEFT adapter in a folder; each tensor is read from the file when it is used."""
    folder = Path(path)
    weights = folder / WEIGHTS_FILE
    config = read_config(folder)
    if not weights.is_file():
        raise ConfigurationError(
            f"no {WEIGHTS_FILE} in {str(folder)!r}; pickled adapters (.bin) are not read: convert them to safetensors"
        )
    with opened(weights) as file:
        factors, others = _sorted_keys(file.keys(), config, folder)
        layers = _checked_layers(file, factors, others, config, folder)
        yield Adapter(str(folder), layers, others, partial(stored_tensor, file, path=weights), config)


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
        else:
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
    refuse_faults(faults, str(folder))
    return layers
