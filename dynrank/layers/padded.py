"""LoRA layers that keep the shapes of their factors in training, while ranks fall: zeros stand for what a cut removed.

A row of lora_A and the column of lora_B that belongs to it get gradients of exactly zero if both are zero. So they stay
zero in every optimizer that leaves a number with zero gradient and zero moments alone, and the others train as if they
were alone. The directions before these zeros are *live*.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynrank.errors import ConfigurationError
from dynrank.layers.finding import lora_layers
from dynrank.layers.foreign import store_on, stored_on
from dynrank.layers.lora_layer import LoRALayer
from dynrank.layers.partitioned import whole_shape
from dynrank.layers.ranked_layer import RankedLayer
from dynrank.layers.vocabulary import extended_parameters
from dynrank.linalg import joined, split


def live_rank(lora_A: Tensor, lora_B: Tensor, count: int) -> int:
    """The number of directions up to the last one that is not zero in both factors, at least 1.

    ``count``: how many products the factors stack; all have this rank.
    """
    used = split(lora_A, count, 0).ne(0).any(2).any(0) | split(lora_B, count, 1).ne(0).any(2).any(0)
    return int(used.nonzero().max()) + 1 if used.any() else 1


def live(full: Tensor, rank: int, count: int, dim: int) -> Tensor:
    """The first ``rank`` directions of a factor, or of a moment of its shape, as a matrix of its own.

    ``dim``: the dimension of the rank, 0 in lora_A and 1 in lora_B.
    """
    return joined(split(full, count, dim)[:, :rank], dim).clone()


def padded(matrix: Tensor, rank: int, count: int, dim: int, shape: torch.Size) -> Tensor:
    """``matrix`` with directions of zeros behind it: ``rank`` of them in all, in ``shape``."""
    parts = split(matrix, count, dim)
    return joined(F.pad(parts, (0, 0, 0, rank - parts.shape[1])), dim).reshape(shape)


class LiveLayer(LoRALayer):
    """The live directions of a layer whose factors keep their shapes; factors of float32, and no base.

    Until :meth:`set_factors` its factors have the shapes of the present rank, and no values.

    Attributes:
        trained: lora_A and lora_B of the layer, in a tuple, so that they are no parameters of this module.
        shapes: their shapes in a model that nothing has partitioned.
        room: how many directions they have.
    """

    bound = "the first rank (factors keep their shapes under DeepSpeed)"

    def __init__(self, layer: RankedLayer, device: torch.device) -> None:
        nn.Module.__init__(self)
        self.trained = (layer.lora_A, layer.lora_B)
        self.shapes = tuple(map(whole_shape, self.trained))
        self.num_products = layer.num_products
        self.room = self.shapes[0][0] // layer.num_products
        self.scaling = layer.scaling
        self.bounds = layer.bounds
        self.lora_A, self.lora_B = (
            nn.Parameter(torch.empty(0, device=device), requires_grad=trained.requires_grad) for trained in self.trained
        )
        self.empty(self.room)

    @property
    def max_rank(self) -> int:
        return min(super().max_rank, self.room)

    def empty(self, rank: int) -> None:
        """Take ``rank``, and no values: each factor is one number, which is read as often as the shape needs."""
        rows = rank * self.num_products
        nothing = torch.zeros((), device=self.lora_A.device)
        widths = self.shapes[0][1:].numel(), self.shapes[1][0]
        self.set_factors(nothing.expand(rows, widths[0]), nothing.expand(widths[1], rows))

    def take(self, lora_A: Tensor, lora_B: Tensor) -> None:
        """Take the live directions of whole factors."""
        rank = live_rank(lora_A, lora_B, self.num_products)
        self.set_factors(*(self.live(full, rank, dim) for dim, full in enumerate((lora_A, lora_B))))

    def live(self, full: Tensor, rank: int, dim: int) -> Tensor:
        return live(full, rank, self.num_products, dim)

    def padded(self, matrix: Tensor, dim: int) -> Tensor:
        """A factor of this layer, or a moment of its shape, in the shape that is trained."""
        return padded(matrix, self.room, self.num_products, dim, self.shapes[dim])

    def factors(self) -> Iterator[tuple[int, nn.Parameter]]:
        """(dimension of the rank, factor), in the order of ``trained``."""
        yield 0, self.lora_A
        yield 1, self.lora_B


def live_copy(model: nn.Module, device: torch.device) -> nn.Module:
    """A module of the same names with a :class:`LiveLayer` for each LoRA layer of ``model``, and nothing else."""
    copy = nn.Module()
    for name, layer in lora_layers(model):
        *parents, last = name.split(".")
        place = copy
        for part in parents:
            if not hasattr(place, part):
                place.add_module(part, nn.Module())
            place = place.get_submodule(part)
        place.add_module(last, LiveLayer(layer, device))
    return copy


def live_state_dict(model: nn.Module, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """``state_dict`` of ``model`` with the live directions alone."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    cut = dict(state_dict)
    for name, layer in lora_layers(model):
        keys = names[id(layer.lora_A)], names[id(layer.lora_B)]
        lora_A, lora_B = (cut.get(key, torch.empty(0)) for key in keys)
        if not lora_A.numel():
            raise ConfigurationError(
                f"no process has the whole factors of {name!r} under DeepSpeed's ZeRO-3; save them by "
                "trainer.save_model(folder), which all processes call"
            )
        rank = live_rank(lora_A, lora_B, layer.num_products)
        rows = rank * layer.num_products
        cut[keys[0]] = live(lora_A, rank, layer.num_products, 0).reshape(rows, *lora_A.shape[1:])
        cut[keys[1]] = live(lora_B, rank, layer.num_products, 1).reshape(len(lora_B), rows, *lora_B.shape[2:])
    return cut


def keep_shapes(model: nn.Module) -> None:
    """Record that the factors of ``model`` keep their shapes from now on."""
    store_on(model, "keeps_shapes", True)


@contextmanager
def live_values(model: nn.Module, state_dict: Mapping[str, Any] | None = None) -> Iterator[dict[str, Any] | None]:
    """A block in which ``model`` has the values of ``state_dict`` that are saved: of live directions alone.

    These are trained parameters, and embeddings that tokens were added to. The block gives that state dict, or
    ``state_dict`` itself for a model whose factors do not keep their shapes.

    Args:
        model: a model with LoRA layers.
        state_dict: what was put together of the parts that processes hold; None: the model's own.
    """
    if not stored_on(model, "keeps_shapes"):
        yield None if state_dict is None else dict(state_dict)
        return
    state = live_state_dict(model, state_dict or model.state_dict())
    extended = {*map(id, extended_parameters(model))}
    saved = {n: p for n, p in model.named_parameters() if n in state and (p.requires_grad or id(p) in extended)}
    before = {name: parameter.data for name, parameter in saved.items()}
    try:
        for name, parameter in saved.items():
            parameter.data = state[name].to(parameter.dtype)
        yield state
    finally:
        for name, parameter in saved.items():
            parameter.data = before[name]
