"""A stored PEFT adapter, read layer by layer: which tensors are whose factors, and what they mean."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from dynrank.adapters.config import alpha_of, read_config
from dynrank.adapters.tensor_file import FLOATS, TensorFile
from dynrank.errors import ConfigurationError
from dynrank.layers.base import initial_scaling

__all__ = ["PREFIX", "WEIGHTS_FILE", "StoredAdapter", "one_thread", "sort_keys", "weights_path"]

WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
_FACTOR_KEY = re.compile(r"(?P<layer>.+)\.(?:lora_(?P<factor>[AB])\.weight|lora_embedding_(?P<embedding>[AB]))")


def weights_path(folder: Path) -> Path:
    """The file of tensors in an adapter's folder.

    Raises:
        ConfigurationError: if there is none.
    """
    file = folder / WEIGHTS_FILE
    if not file.is_file():
        raise ConfigurationError(
            f"no {WEIGHTS_FILE} in {str(folder)!r}; pickled adapters (.bin) are not read: convert them to safetensors"
        )
    return file


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
                f"{key!r} in {str(folder / WEIGHTS_FILE)!r} is no PEFT key ({PREFIX}...); it's a foreign file"
            )
        name = key.removeprefix(PREFIX)
        match = _FACTOR_KEY.fullmatch(name)
        if match:
            factors.setdefault(match["layer"], {})[match["factor"] or match["embedding"]] = key
        else:
            others[name] = key
    if not factors:
        raise ConfigurationError(f"{str(folder / WEIGHTS_FILE)!r} holds no LoRA factors")
    return factors, others


@contextmanager
def one_thread() -> Iterator[None]:
    """Factors are tall and thin: threads gain little on them, and lose much where another process wants the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class StoredAdapter:
    """An adapter's folder opened for reading; a context manager. No tensor is read before it is asked for.

    Attributes:
        config: adapter_config.json, checked.
        file: the tensors.
        keys: layer -> {"A": key, "B": key} in the file.
        others: keys of all other tensors (modules_to_save).
        ranks: layer -> rank, in the order of the layers' numbers.

    Raises:
        ConfigurationError: if a file is missing, broken or not a LoRA adapter, or uses a variant with other arithmetic.
    """

    def __init__(self, folder: Path) -> None:
        self.config = read_config(folder)
        self.file = TensorFile(weights_path(folder))
        try:
            self.keys, others = sort_keys(self.file.pieces, folder)
            self.others = list(others.values())
            faults = [fault for name, pair in self.keys.items() for fault in self._pair_faults(name, pair)]
            faults += [f"{name!r} is a LoRA tensor of an unknown kind" for name in others if ".lora_" in name]
            if faults:
                raise ConfigurationError(f"{str(folder)!r} cannot be used:\n  " + "\n  ".join(faults[:20]))
        except ConfigurationError:
            self.file.__exit__(None, None, None)
            raise
        order = sorted(self.keys, key=_numbers_as_such)  # safetensors writes layers.10 before layers.2
        self.ranks = {name: self.file.pieces[self.keys[name]["A"]].shape[0] for name in order}

    def __enter__(self) -> StoredAdapter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.file.__exit__(kind, error, at)

    def shape(self, name: str) -> tuple[int, int]:
        """(d_out, d_in) of a layer's update, with d_in = channels x kernel of a convolution."""
        pair = self.keys[name]
        return self.file.pieces[pair["B"]].shape[0], _matrix(self.file.pieces[pair["A"]].shape)[1]

    def alpha(self, name: str, rank: int | None = None) -> float:
        """The alpha that gives the layer its scaling at ``rank`` (None: its own) when scaling is alpha / rank."""
        of_alpha = alpha_of(self.config, name) * (self.ranks[name] if rank is None else rank)
        return initial_scaling(of_alpha, self.ranks[name], bool(self.config.get("use_rslora")))

    def scaling(self, name: str) -> float:
        """Factor of ``lora_B @ lora_A`` in the layer's update, by PEFT's rules."""
        return self.alpha(name, rank=1)

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """(lora_B (d_out, rank), lora_A (rank, d_in)) as matrices, read from the file.

        Raises:
            ConfigurationError: if one holds NaN or inf.
        """
        lora_B, lora_A = (self.file.tensor(self.keys[name][factor]).flatten(1) for factor in "BA")
        if not (torch.isfinite(lora_A).all() and torch.isfinite(lora_B).all()):
            raise ConfigurationError(f"{name!r} holds NaN or inf in the adapter")
        return lora_B, lora_A

    def _pair_faults(self, name: str, pair: Mapping[str, str]) -> list[str]:
        if set(pair) != {"A", "B"} or any(len(self.file.pieces[key].shape) < 2 for key in pair.values()):
            return [f"{name!r} lacks two factors of two dimensions or more"]
        faults = [
            f"{name!r} must have factors of {[*FLOATS]}, got {self.file.pieces[key].dtype}"
            for key in pair.values()
            if self.file.pieces[key].dtype not in FLOATS
        ]
        (rank, d_in), (d_out, columns) = (_matrix(self.file.pieces[pair[factor]].shape) for factor in "AB")
        if columns != rank or not 1 <= rank <= min(d_out, d_in):
            faults.append(
                f"{name!r} must have factors (rank, d_in) and (d_out, rank), 1 <= rank <= min(d_in, d_out), "
                f"got {[rank, d_in]} and {[d_out, columns]}"
            )
        return faults


def _numbers_as_such(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    return shape[0], torch.Size(shape[1:]).numel()
