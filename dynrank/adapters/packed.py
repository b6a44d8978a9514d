"""``adapter_model.packed.safetensors``: factors as codes of 4 bits (:mod:`.codebook`), read as if they were float32.

A factor has two tensors. Under its key are the codes (directions, bytes), two in a byte, the first in the high bits;
under KEY.scales are the scales (directions, groups). lora_B is transposed, so that both have a row for each direction.
"""

import json
from collections.abc import Mapping
from math import ceil, prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dynrank.adapters.codebook import GROUP, NF4_LEVELS, decode, encode
from dynrank.adapters.precision import NF4, Rounded, balanced, compared, power_of
from dynrank.adapters.stored import readable, refuse_faults
from dynrank.errors import ConfigurationError, Count, read_as

PACKED_FILE = "adapter_model.packed.safetensors"
# Entries of the metadata: the name of the codebook, and {key of a factor: its shape} as JSON.
_BOOK = "dynrank.codebook"
_SHAPES = "dynrank.shapes"
_SCALES = ".scales"
_LEVELS = torch.tensor(NF4_LEVELS)


class PackedFile:
    """A packed file as an open safetensors file with its factors in float32; every shape is checked at once."""

    def __init__(self, file: Any, path: Path) -> None:
        self.file = file
        self.metadata = file.metadata
        book = (file.metadata() or {}).get(_BOOK)
        if book != NF4:
            raise ConfigurationError(f"{str(path)!r} must be packed with {NF4!r}, got {book!r:.100}")
        where = f"{_SHAPES} in the metadata of {str(path)!r}"
        with readable(where):
            content = json.loads(file.metadata().get(_SHAPES, ""))
        self.shapes = read_as(dict[str, list[Count]], content, where)
        found = {key: (file.get_slice(key).get_shape(), file.get_slice(key).get_dtype()) for key in [*file.keys()]}
        faults = []
        for key, shape in self.shapes.items():
            rows, width = _flat(key, shape)
            parts = ([rows, ceil(width / 2)], "U8"), ([rows, ceil(width / GROUP)], "F16")
            if len(shape) < 2 or (found.get(key), found.get(key + _SCALES)) != parts:
                faults.append(f"{key!r} {shape} must have codes {parts[0]} and scales {parts[1]}")
        refuse_faults(f"{str(path)!r} cannot be unpacked", faults)

    def keys(self) -> list[str]:
        scales = {key + _SCALES for key in self.shapes}
        # An open safetensors file has keys() and cannot be iterated.
        return [key for key in self.file.keys() if key not in scales]  # noqa: SIM118

    def get_slice(self, key: str) -> Any:
        if key not in self.shapes:
            return self.file.get_slice(key)
        return SimpleNamespace(get_shape=lambda: self.shapes[key], get_dtype=lambda: "F32")

    def get_tensor(self, key: str) -> Tensor:
        tensor: Tensor = self.file.get_tensor(key)
        if key not in self.shapes:
            return tensor
        _, width = _flat(key, self.shapes[key])
        codes = torch.stack([tensor >> 4, tensor & 15], dim=2).flatten(1)[:, :width]
        values = decode(codes, self.file.get_tensor(key + _SCALES), _LEVELS)
        return (values.mT if _is_B(key) else values).reshape(self.shapes[key])


def in_codes(lora_B: Tensor, lora_A: Tensor, count: int) -> Rounded:
    """Balanced factors, of which :func:`packed` makes codes; the error is that of the codes."""
    pair = balanced(lora_B, lora_A, count)
    power = power_of(*pair)
    new_B, new_A = (factor * 2.0**power for factor in pair)
    book = _LEVELS
    coded = decode(*encode(new_B.mT, book), book).mT, decode(*encode(new_A, book), book)
    return Rounded(new_B, new_A, power, *compared((lora_B, lora_A), coded, power, count))


def packed(factors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of a file with these factors, {key: factor in the shape that PEFT gives it}."""
    tensors = {}
    for key, factor in factors.items():
        rows = factor.flatten(1).mT if _is_B(key) else factor.flatten(1)
        codes, tensors[key + _SCALES] = encode(rows, _LEVELS)
        codes = F.pad(codes, (0, codes.shape[1] % 2))
        tensors[key] = codes[:, ::2] << 4 | codes[:, 1::2]
    shapes = {key: [*factor.shape] for key, factor in factors.items()}
    return tensors, {_BOOK: NF4, _SHAPES: json.dumps(shapes)}


def _is_B(key: str) -> bool:
    return key.endswith(("lora_B.weight", "lora_embedding_B"))


def _flat(key: str, shape: list[int]) -> tuple[int, int]:
    """(directions, numbers of each) of a factor."""
    return (prod(shape[1:]), shape[0]) if _is_B(key) else (shape[0], prod(shape[1:]))
