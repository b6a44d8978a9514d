"""``base.json`` in an adapter's folder: by which weights the adapter knows the model on which it was trained."""

from collections.abc import Mapping
from dataclasses import field
from pathlib import Path

import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from dynrank.adapters.stored import read_json
from dynrank.layers.finding import plain_modules
from dynrank.layers.frozen_base import fingerprint
from dynrank.layers.quantized import is_quantized

BASE_FILE = "base.json"


@dataclass(config=ConfigDict(strict=True, extra="ignore"))
class Base:
    """The model on which an adapter was trained.

    Attributes:
        fingerprints: {frozen parameter, by its name in the model without adapters: its fingerprint}; empty if unknown.
        in_float16: the same of values rounded to float16. A model whose files have float32 may be loaded in float16,
            and bfloat16 rounds that to other values.
    """

    fingerprints: dict[str, str] = field(default_factory=dict)
    in_float16: dict[str, str] = field(default_factory=dict)


def base_of(model: nn.Module) -> Base:
    """The base of an adapted model; collective if a parameter is sharded."""
    return _base({name: value for name, value in _values(model).items() if not value.requires_grad})


def _base(values: Mapping[str, Tensor]) -> Base:
    return Base(
        {name: fingerprint(value) for name, value in values.items()},
        {name: fingerprint(value, torch.float16) for name, value in values.items()},
    )


def _values(model: nn.Module) -> dict[str, Tensor]:
    """The parameters of ``model`` by their names without adapters.

    Packed weights are left out, because another model may have packed the same weight otherwise, or not at all.
    """
    return {
        f"{name}.{leaf}" if name else leaf: value
        for name, module in plain_modules(model)
        for leaf, value in module.named_parameters(recurse=False, remove_duplicate=False)
        if not is_quantized(module)
    }


def read_base(folder: Path) -> Base:
    """The base of the adapter in ``folder``, of which nothing is known for adapters of other programs."""
    file = folder / BASE_FILE
    return read_json(Base, file) if file.exists() else Base()


def other_weights(model: nn.Module, folder: Path) -> str:
    """What differs between ``model`` and the base of the adapter in ``folder``; "" if nothing, as far as is known.

    ``model`` may be plain or have adapters. Weights without values, on the meta device, are not compared.
    """
    stored = read_base(folder)
    values = {name: v for name, v in _values(model).items() if name in stored.fingerprints and not v.is_meta}
    own = _base(values)
    same = stored.fingerprints.items() & own.fingerprints.items() | stored.in_float16.items() & own.in_float16.items()
    wrong = sorted(values.keys() - {name for name, _ in same})
    return (
        f"{wrong[0]!r} has other values here ({len(wrong)} of {len(values)} frozen parameters differ)" if wrong else ""
    )
