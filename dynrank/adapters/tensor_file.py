"""Safetensors files read and written one tensor at a time, so that memory holds no more than is asked for.

The format: the header's length (8 bytes, little-endian), a JSON header with dtype, shape and place of each tensor, raw
numbers (https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dynrank.errors import ConfigurationError

__all__ = ["FLOATS", "Piece", "TensorFile", "TensorWriter", "piece_of"]

FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_CHUNK = 2**24  # bytes copied at once


class Piece(NamedTuple):
    """Dtype (the format's name), shape and bytes of a stored tensor."""

    dtype: str
    shape: tuple[int, ...]
    size: int


def piece_of(dtype: str, shape: Iterable[int]) -> Piece:
    """The piece that a tensor of a dtype in ``FLOATS`` takes."""
    shape = tuple(shape)
    return Piece(dtype, shape, prod(shape) * FLOATS[dtype].itemsize)


class TensorFile:
    """A safetensors file to read from; a context manager.

    ``safe_open`` would map the whole file, and pages once touched count as memory of the process.

    Attributes:
        pieces: name -> :class:`Piece`, in the file's order.
        metadata: the texts stored along.

    Raises:
        ConfigurationError: if it is not a whole safetensors file.
    """

    def __init__(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt"):
                pass  # it holds the header against the file
            self._file = path.open("rb")
        except (SafetensorError, OSError) as error:
            raise ConfigurationError(f"{str(path)!r} is not a whole safetensors file: {error}") from None
        length = int.from_bytes(self._file.read(8), "little")
        header: dict[str, Any] = json.loads(self._file.read(length))
        self.metadata: dict[str, str] = header.pop("__metadata__", None) or {}
        places = {name: entry["data_offsets"] for name, entry in header.items()}
        self._starts = {name: 8 + length + start for name, (start, _) in places.items()}
        self.pieces = {
            name: Piece(entry["dtype"], tuple(entry["shape"]), places[name][1] - places[name][0])
            for name, entry in header.items()
        }

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    def tensor(self, name: str) -> Tensor:
        """The tensor, of a dtype in ``FLOATS`` and not empty."""
        dtype, shape, size = self.pieces[name]
        buffer = bytearray(size)
        self._file.seek(self._starts[name])
        self._file.readinto(buffer)
        return torch.frombuffer(buffer, dtype=FLOATS[dtype]).reshape(shape)

    def chunks(self, name: str) -> Iterator[bytes]:
        """The bytes of a tensor, whatever its dtype, in pieces of a bounded size."""
        for start in range(0, self.pieces[name].size, _CHUNK):
            self._file.seek(self._starts[name] + start)
            yield self._file.read(min(_CHUNK, self.pieces[name].size - start))


class TensorWriter:
    """A safetensors file to write; a context manager. Tensors may come in any order, and all must.

    Args:
        path: file to make.
        pieces: name -> dtype, shape and bytes of everything that will be written.
        metadata: texts to store along.
    """

    def __init__(self, path: Path, pieces: Mapping[str, Piece], metadata: Mapping[str, str]) -> None:
        # widest numbers first, as safetensors itself does: every tensor is then aligned
        order = sorted(pieces, key=lambda name: (-pieces[name].size / max(1, prod(pieces[name].shape)), name))
        header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        end = 0
        self._places: dict[str, tuple[int, int]] = {}
        for name in order:
            dtype, shape, size = pieces[name]
            self._places[name] = (end, size)
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
            end += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._base = self._file.tell()

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()
        if kind is None and self._places:
            raise RuntimeError(f"tensors announced but not written: {sorted(self._places)}")

    def write(self, name: str, content: Tensor | Iterable[bytes]) -> None:
        """Put a tensor, or the bytes of one, where the header says it is."""
        chunks = [content.contiguous().view(torch.uint8).numpy().data] if isinstance(content, Tensor) else content
        start, size = self._places.pop(name)
        self._file.seek(self._base + start)
        written = sum(self._file.write(chunk) for chunk in chunks)
        if written != size:
            raise RuntimeError(f"{name!r} was announced with {size} bytes, got {written}")
