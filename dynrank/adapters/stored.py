"""A stored LoRA in any format: layers, with the shapes of their factors, and other tensors."""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dynrank.errors import ConfigurationError, read_as
from dynrank.linalg import finite, pooled, products, singular_values, stacked, truncate_product

T = TypeVar("T")

# Torch computes little with numbers of 8 bits, so these are read as float32.
FLOAT8S = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# lora_A, lora_B and the scaling of a layer.
Factors = tuple[Tensor, Tensor, float]
# At most this many faults of a file are listed.
_LISTED = 20


@dataclass(frozen=True)
class StoredLayer:
    """A layer of an adapter, known from the settings and the shapes of its factors.

    Attributes:
        keys: keys of lora_A and lora_B in the file.
        rank: rank of the update; at most min(d_out, d_in), even if the stored factors have more rows.
        shape: (d_out, d_in) of the update; d_in of a convolution is channels times the size of the kernel.
        kernel: size of a convolution's kernel, () for other layers.
        alpha: alpha by the settings.
        scaling: factor of ``lora_B @ lora_A`` in the update.
        experts: how many products of this rank and shape the factors stack, see :func:`dynrank.linalg.split`.
        stored_rank: rank of the stored factors, which may be above ``rank``.
        float8: whether a factor is stored in a dtype of 8 bits.
    """

    keys: tuple[str, str]
    rank: int
    shape: tuple[int, int]
    kernel: tuple[int, ...]
    alpha: float
    scaling: float
    experts: int = field(default=1, kw_only=True)
    stored_rank: int = field(kw_only=True)
    float8: bool = field(default=False, kw_only=True)

    @property
    def params_per_rank(self) -> int:
        """Parameters of one direction."""
        return self.experts * sum(self.shape)

    @property
    def parameters(self) -> int:
        """Parameters of the stored factors."""
        return self.stored_rank * self.params_per_rank


@dataclass(frozen=True)
class StoredAdapter:
    """A stored LoRA that was checked without a model.

    Attributes:
        source: the folder or file from which it was read.
        layers: {name: layer}, ordered by name; numbers in names are ordered as numbers.
        others: {name: key in the file} of every other tensor.
        tensor: function that returns the stored tensor of a key.
    """

    source: str
    layers: Mapping[str, StoredLayer]
    others: Mapping[str, str]
    tensor: Callable[[str], Tensor]

    @property
    def float8(self) -> bool:
        """Whether factors are stored in a dtype of 8 bits."""
        return any(layer.float8 for layer in self.layers.values())

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


@contextmanager
def readable(what: str) -> Iterator[None]:
    """Turn an error of reading ``what`` within the block, a file or a text in one, into a ConfigurationError."""
    try:
        yield
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        # The whole text of an OSError would repeat the file.
        reason = getattr(error, "strerror", None) or error
        raise ConfigurationError(f"{what} cannot be read: {reason}") from None


def read_json(kind: type[T], file: Path) -> T:
    """The content of a JSON file as an object of ``kind``, see :func:`dynrank.errors.read_as`."""
    with readable(repr(str(file))):
        content = json.loads(file.read_text(encoding="utf-8"))
    return read_as(kind, content, str(file))


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """An open safetensors file, from which a tensor is read when it is used."""
    with readable(repr(str(path))):
        opening = safe_open(path, framework="pt")
    with opening as file:
        yield file


def stored_tensor(file: Any, key: str, path: Path) -> Tensor:
    """The tensor of a key in a file from :func:`opened`; one of 8 bits as float32."""
    with readable(f"{key!r} in {str(path)!r}"):
        tensor: Tensor = file.get_tensor(key)
    return tensor.float() if tensor.dtype in FLOAT8S.values() else tensor


def refuse_faults(what: str, faults: Sequence[str], *arguments: str, advice: str = "") -> None:
    """Raise a ConfigurationError of ``arguments`` that says ``what``, the faults and the advice, if there are any."""
    if len(faults) == 1:
        raise ConfigurationError(f"{what}: {faults[0]}{advice}", *arguments)
    if faults:
        more = [f"and {len(faults) - _LISTED} more"] if len(faults) > _LISTED else []
        raise ConfigurationError("\n  ".join([f"{what}:", *faults[:_LISTED], *more]) + advice, *arguments)


def numbers_as_such(name: str) -> list[tuple[int, str]]:
    """Sort key for names that puts 10 after 9."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def checked_layer(
    file: Any, pair: Mapping[str, str], settings: tuple[int, float, float] | None, of_parameter: bool = False
) -> StoredLayer:
    """A layer of a file from :func:`opened`, after a check that its factors fit together and fit its settings.

    ``pair`` is {"A": key of lora_A, "B": key of lora_B}. The settings are (rank, alpha, scaling); None: the factors'
    rank, alpha equal to the rank, and 1. The factors of a parameter may stack several products of that rank.
    """
    if set(pair) != {"A", "B"}:
        raise ValueError("lacks one of its two factors")
    of_A = file.get_slice(pair["A"])
    of_B = file.get_slice(pair["B"])
    shape_A = of_A.get_shape()
    shape_B = of_B.get_shape()
    dtypes = {of_A.get_dtype(), of_B.get_dtype()}
    for dtype in dtypes - {*FLOATS, *FLOAT8S}:
        raise ValueError(f"must have factors of {[*FLOATS, *FLOAT8S]}, got {dtype}")
    if len(shape_A) < 2 or len(shape_B) < 2 or torch.Size(shape_B[1:]).numel() != shape_A[0] or 0 in shape_A + shape_B:
        raise ValueError(f"must have factors (rank, d_in) and (d_out, rank), got {shape_A} and {shape_B}")
    rank, alpha, scaling = settings or (shape_A[0], float(shape_A[0]), 1.0)
    experts = shape_A[0] // rank if of_parameter else 1
    if shape_A[0] != rank * experts or not experts:
        raise ValueError(f"must have the rank of the settings (r, rank_pattern), {rank}, got factors of {shape_A[0]}")
    d_out = shape_B[0]
    d_in = torch.Size(shape_A[1:]).numel()
    return StoredLayer(
        *((pair["A"], pair["B"]), min(rank, d_out, d_in), (d_out, d_in), (*shape_A[2:],), alpha, scaling),
        experts=experts,
        stored_rank=rank,
        float8=not dtypes.isdisjoint(FLOAT8S),
    )
