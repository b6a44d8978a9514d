"""A PEFT adapter on disk, checked: the one reader for loading, swapping, merging, squeezing and inspecting."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dynrank.adapters.config import AdapterConfig, LayerSettings, read_config
from dynrank.digest import digest
from dynrank.errors import ConfigurationError
from dynrank.linalg import finite

__all__ = [
    "FLOATS",
    "PREFIX",
    "SETTINGS_DIGEST",
    "WEIGHTS_FILE",
    "Adapter",
    "StoredLayer",
    "one_thread",
    "open_adapter",
    "read_adapter",
    "sort_keys",
]

WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
SETTINGS_DIGEST = "dynrank_settings"  # metadata of the tensors: a digest of the settings that they were written with
FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_FACTOR_KEY = re.compile(r"(?P<layer>.+)\.(?:lora_(?P<factor>[AB])\.weight|lora_embedding_(?P<embedding>[AB]))")
_PATIENCE = 2.0  # seconds for a writer that has moved one of the two files into place to do so with the other


@dataclass(frozen=True)
class StoredLayer:
    """A layer of an adapter, known from the settings and the shapes of its factors.

    Attributes:
        keys: of lora_A and lora_B in the file.
        rank: of the update; rows of zeros that fill a factor up beyond min(d_out, d_in) do not count.
        shape: (d_out, d_in) of the update; d_in of a convolution is channels times the size of the kernel.
        kernel: size of a convolution's kernel, () for other layers.
        alpha: by the settings.
        scaling: factor of ``lora_B @ lora_A`` in the update.
    """

    keys: tuple[str, str]
    rank: int
    shape: tuple[int, int]
    kernel: tuple[int, ...]
    alpha: float
    scaling: float

    @property
    def parameters(self) -> int:
        return self.rank * sum(self.shape)


@dataclass(frozen=True)
class Adapter:
    """A PEFT LoRA adapter, checked by itself but not yet held against a model.

    Attributes:
        source: the folder that it was read from.
        config: its settings.
        layers: by name in the model, numbers in names in their order.
        others: name in the model -> key in the file, of every other tensor (modules_to_save).
        tensor: the tensor of a key, as stored.
    """

    source: str
    config: AdapterConfig
    layers: Mapping[str, StoredLayer]
    others: Mapping[str, str]
    tensor: Callable[[str], Tensor]

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """(lora_B (d_out, rank), lora_A (rank, d_in)) of a layer, as matrices.

        Raises:
            ConfigurationError: if one is not finite in float32, or the rank is above min(d_out, d_in).
        """
        layer = self.layers[name]
        lora_A, lora_B = (self.tensor(key).flatten(1) for key in layer.keys)
        if not (finite(lora_A) and finite(lora_B)):
            raise ConfigurationError(
                f"{name!r} holds NaN, inf or a number too large for float32 in the adapter {self.source!r}"
            )
        if lora_A[layer.rank :].any() or lora_B[:, layer.rank :].any():
            raise ConfigurationError(
                f"{name!r} must have a rank of at most min(d_in, d_out) = {layer.rank}, got {len(lora_A)} in the "
                f"adapter {self.source!r}"
            )
        return lora_B[:, : layer.rank], lora_A[: layer.rank]


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
    """The PEFT adapter in a folder, whose tensors are read from the file when they are asked for.

    The two files are of one adapter, also while another process writes to the folder: dynrank notes with the tensors
    a digest of the settings that they were written with. Files of PEFT have no such note and are read as they are.

    Raises:
        ConfigurationError: if a file is missing, broken, not a LoRA adapter or a variant with other arithmetic; if the
            settings give a layer another rank than its tensors have; or if settings and tensors are of two adapters.
    """
    folder, until = Path(path), time.monotonic() + _PATIENCE
    while True:
        config = read_config(folder)
        with _opened(folder) as file:
            factors, others = sort_keys(file.keys(), folder)
            settings = config.of_layers(factors)
            if (file.metadata() or {}).get(SETTINGS_DIGEST) in (None, digest(settings)):
                layers = _checked_layers(file, factors, others, settings, folder)
                yield Adapter(str(folder), config, layers, others, lambda key: _tensor(file, key, folder))
                return
        if time.monotonic() > until:
            raise ConfigurationError(
                f"the two files in {str(folder)!r} are of two adapters, or one is being written: the ranks and alphas "
                "in adapter_config.json are not those that the tensors were saved with; save the adapter again"
            )
        time.sleep(0.02)


@contextmanager
def one_thread() -> Iterator[None]:
    """Factors are tall and thin: threads gain little on them, and lose much where another process wants the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def sort_keys(keys: Iterable[str], folder: Path) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """({layer: {"A": key, "B": key}}, {name in the model: key} of everything else) of a PEFT file.

    Raises:
        ConfigurationError: if a key is not PEFT's, or none is a factor's.
    """
    factors: dict[str, dict[str, str]] = {}
    others = {}
    for key in keys:
        if not key.startswith(PREFIX):
            raise ConfigurationError(
                f"keys in {str(folder / WEIGHTS_FILE)!r} must be PEFT's ({PREFIX}...), got {key!r}; it's a foreign file"
            )
        name = key.removeprefix(PREFIX)
        match = _FACTOR_KEY.fullmatch(name)
        if match:
            factors.setdefault(match["layer"], {})[match["factor"] or match["embedding"]] = key
        else:
            others[name] = key
    if not factors:
        raise ConfigurationError(f"{str(folder / WEIGHTS_FILE)!r} holds no LoRA factors")
    return {name: factors[name] for name in sorted(factors, key=_numbers_as_such)}, others


def _numbers_as_such(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


@contextmanager
def _opened(folder: Path) -> Iterator[Any]:
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise ConfigurationError(
            f"no {WEIGHTS_FILE} in {str(folder)!r}; pickled adapters (.bin) are not read: convert them to safetensors"
        )
    with ExitStack() as stack:
        try:
            held = stack.enter_context(path.open("rb"))
            # safetensors opens a path twice, for the header and for the numbers; by then it may name another file
            file = stack.enter_context(safe_open(f"/dev/fd/{held.fileno()}", framework="pt"))
        except (SafetensorError, OSError, RuntimeError) as error:
            raise ConfigurationError(f"{str(path)!r} is not a whole safetensors file: {error}") from None
        yield file


def _tensor(file: Any, key: str, folder: Path) -> Tensor:
    try:
        tensor: Tensor = file.get_tensor(key)
    except (SafetensorError, OSError) as error:
        raise ConfigurationError(f"cannot read {key!r} in {str(folder / WEIGHTS_FILE)!r}: {error}") from None
    return tensor


def _checked_layers(
    file: Any,
    factors: Mapping[str, Mapping[str, str]],
    others: Iterable[str],
    settings: Mapping[str, LayerSettings],
    folder: Path,
) -> dict[str, StoredLayer]:
    layers, faults = {}, [f"{name!r} is a LoRA tensor of an unknown kind" for name in others if ".lora_" in name]
    for name, pair in factors.items():
        try:
            layers[name] = _checked_layer(file, pair, *settings[name])
        except ValueError as fault:
            faults.append(f"{name!r} {fault}")
    if faults:
        raise ConfigurationError(f"the adapter {str(folder)!r} cannot be used:\n  " + "\n  ".join(faults[:20]))
    return layers


def _checked_layer(file: Any, pair: Mapping[str, str], rank: int, alpha: float, scaling: float) -> StoredLayer:
    if set(pair) != {"A", "B"}:
        raise ValueError("lacks one of its two factors")
    of_A, of_B = file.get_slice(pair["A"]), file.get_slice(pair["B"])
    shape_A, shape_B = of_A.get_shape(), of_B.get_shape()
    for dtype in (of_A.get_dtype(), of_B.get_dtype()):
        if dtype not in FLOATS:
            raise ValueError(f"must have factors of {[*FLOATS]}, got {dtype}")
    if len(shape_A) < 2 or len(shape_B) < 2 or torch.Size(shape_B[1:]).numel() != shape_A[0] or 0 in shape_A + shape_B:
        raise ValueError(f"must have factors (rank, d_in) and (d_out, rank), got {shape_A} and {shape_B}")
    if shape_A[0] != rank:
        raise ValueError(f"must have the rank of the settings (r, rank_pattern), {rank}, got factors of {shape_A[0]}")
    d_out, d_in = shape_B[0], torch.Size(shape_A[1:]).numel()
    return StoredLayer((pair["A"], pair["B"]), min(rank, d_out, d_in), (d_out, d_in), (*shape_A[2:],), alpha, scaling)
