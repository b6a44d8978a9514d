"""The last updates of factors, with which importance goes on, in the Trainer's checkpoints of its optimizer.

They are as large as the adapter, so they do not stand in ``trainer_state.json`` with the rest of a schedule's state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from dynrank.distributed.processes import from_first
from dynrank.distributed.sharding import process_group, saved_shapes
from dynrank.driver.driver import RankDriver
from dynrank.driver.training import Training
from dynrank.layers.compiled import plain_name
from dynrank.layers.finding import lora_layers

# The key in the state of a factor.
_KEY = "dynrank_last_update"

Updates = Sequence[Tensor | None]


class LastUpdates:
    """The last updates that a ``driver`` measures, in the checkpoints of its run's optimizer."""

    def __init__(self, driver: RankDriver) -> None:
        self._driver = driver
        # What lets the optimizer's checkpoints have them.
        self._saving: RemovableHandle | None = None

    def begin(self, training: Training) -> Updates:
        """Take the updates that a checkpoint has brought to the optimizer, and save those to come; collective."""
        if self._saving is not None:
            self._saving.remove()
        optimizer = training.optimizers[0]
        factors = [factor for _, layer in lora_layers(training.model) for factor in (layer.lora_A, layer.lora_B)]
        own = _loaded(optimizer, factors)
        # From a single file of FSDP2's, torch gives other processes nothing that a new optimizer does not have.
        updates = from_first(lambda: own, training.group, device=factors[0].device if factors else None)
        self._saving = _save(optimizer, factors, self._present)
        return updates

    def _present(self) -> Updates:
        updates: Updates = (self._driver.state_dict()["importance"] or {}).get("updates", ())
        return updates


def expect_updates(optimizer: Optimizer, model: nn.Module, shards: Path) -> None:
    """Let the state dict of a new ``optimizer`` have the updates in a checkpoint's ``shards``, until that is loaded.

    torch loads shards into keys that exist. This is a collective call.
    """
    sizes, _ = from_first(lambda: saved_shapes(shards, "optimizer.state."), process_group(model, ()))
    found = [(parameter, sizes.get(f"{plain_name(name)}.{_KEY}")) for name, parameter in model.named_parameters()]
    empty = {parameter: parameter.new_zeros(size) for parameter, size in found if size is not None}
    saving = _save(optimizer, [*empty], lambda: [*empty.values()])
    optimizer.register_load_state_dict_post_hook(lambda _: saving.remove())


def without_updates(driver: Mapping[str, Any]) -> dict[str, Any]:
    """A driver's state in plain values."""
    importance = driver["importance"]
    if importance is not None:
        importance = {key: value for key, value in importance.items() if key != "updates"}
    return {**driver, "importance": importance}


def with_updates(driver: Mapping[str, Any], updates: Updates) -> dict[str, Any]:
    """A driver's state, of which :func:`without_updates` was saved."""
    importance = driver.get("importance")
    return {**driver, "importance": None if importance is None else {"updates": updates, **importance}}


def _save(optimizer: Optimizer, factors: Sequence[nn.Parameter], updates: Callable[[], Updates]) -> RemovableHandle:
    """Add the ``updates`` of ``factors`` to every state dict of ``optimizer``, until the handle is removed."""

    def add(_: Optimizer, state: dict[str, dict[int, dict[str, object]]]) -> None:
        members = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        numbers = {id(parameter): number for number, parameter in enumerate(members)}
        for factor, update in zip(factors, updates(), strict=False):
            if update is not None:
                number = numbers[id(factor)]
                # An optimizer that loads them rounds all numbers to the dtype of the factor, so they are their bits in
                # that. The dict that is there is the optimizer's own.
                state["state"][number] = {**state["state"].get(number, {}), _KEY: update.view(factor.dtype)}

    return optimizer.register_state_dict_post_hook(add)


def _loaded(optimizer: Optimizer, factors: Sequence[nn.Parameter]) -> list[Tensor | None]:
    """Take the updates of ``factors`` out of the optimizer's state; None where there is none."""
    updates: list[Tensor | None] = []
    for factor in factors:
        state = optimizer.state.get(factor, {})
        bits = state.pop(_KEY, None)
        updates.append(None if bits is None else bits.view(torch.promote_types(factor.dtype, torch.float32)))
        # SGD has no other state.
        if bits is not None and not state:
            del optimizer.state[factor]
    return updates
