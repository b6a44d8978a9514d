"""transformers' Trainer under DeepSpeed: ranks change in a copy of the adapters, whose factors keep their shapes.

ZeRO trains flat partitions, whose sizes cannot change. So a change is computed in a copy that has the live directions
alone (:mod:`dynrank.layers.padded`), and written back with zeros behind them. The copy has values during a change only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from dynrank.callbacks.transformers.training import TrainerTraining
from dynrank.change.optimizer_state import rule_name
from dynrank.distributed.zero import OWN_STATE, ZeroOptimizer, ZeroTensors, moments
from dynrank.distributed.zero_checks import check_config, check_optimizer
from dynrank.driver.training import Evaluate, ImportanceSteps
from dynrank.errors import ConfigurationError
from dynrank.importance.importance import ImportanceSums
from dynrank.importance.zero_importance import ZeroImportance
from dynrank.layers.finding import lora_layers
from dynrank.layers.padded import LiveLayer, keep_shapes, live_copy, live_rank, live_values
from dynrank.layers.peft_layers import record_ranks
from dynrank.layers.ranked_layer import RankedLayer


class ZeroTraining(TrainerTraining):
    """A run of the Trainer under DeepSpeed; ``model`` is the copy of its adapters.

    Making it is a collective call, which finds the present ranks.
    """

    def __init__(self, trainer: Trainer, event: Mapping[str, Any], evaluate: Evaluate | None) -> None:
        super().__init__(trainer, event, evaluate)
        engine: Any = trainer.model_wrapped
        check_config(engine.config)
        check_optimizer(engine, rule_name(engine.optimizer.optimizer))
        self._device = torch.device(engine.device)
        self._trained: nn.Module = self.model
        _check_layers(self._trained)
        self.model = live_copy(self._trained, self._device)
        self._layers: dict[str, LiveLayer] = dict(lora_layers(self.model))  # type: ignore[arg-type]
        trained = [factor for layer in self._layers.values() for factor in layer.trained]
        self._tensors = ZeroTensors(engine, trained)
        own = [factor for layer in self._layers.values() for _, factor in layer.factors()]
        copies = {id(theirs): factor for theirs, factor in zip(trained, own, strict=True)}
        groups = [[copies.get(id(parameter), parameter) for parameter in group] for group in self._tensors.groups()]
        self._optimizer = ZeroOptimizer(self._tensors.optimizer, groups)
        self.optimizers = [self._optimizer]
        self.find_ranks()

    def find_ranks(self) -> None:
        """Take the ranks of the present weights; a collective call."""
        factors = self._tensors.whole()
        for layer, lora_A, lora_B in zip(self._layers.values(), factors[::2], factors[1::2], strict=True):
            layer.empty(live_rank(lora_A, lora_B, layer.num_products))
        self._record_ranks()

    def best_is_loaded(self) -> None:
        super().best_is_loaded()
        self.find_ranks()

    @contextmanager
    def gathered(self) -> Iterator[None]:
        self._gather()
        try:
            yield
        finally:
            self._optimizer.state.clear()
            for layer in self._layers.values():
                layer.empty(layer.rank)

    @torch.no_grad()
    def _gather(self) -> None:
        layers = self._layers.values()
        factors = self._tensors.whole()
        for layer, lora_A, lora_B in zip(layers, factors[::2], factors[1::2], strict=True):
            layer.take(lora_A, lora_B)
        del factors
        # Without optimizers the loaded weights of a best checkpoint have no state that belongs to them.
        state = self._tensors.state() if self.optimizers else {}
        known = moments(state)
        others = {key: value for key, value in state.items() if key not in known and key != OWN_STATE}
        places = [(layer, *pair) for layer in layers for pair in layer.factors()] if state else []
        for _, _, factor in places:
            self._optimizer.state[factor] = {**others}
        for key in known:
            for (layer, dim, factor), value in zip(places, self._tensors.whole(key), strict=True):
                self._optimizer.state[factor][key] = layer.live(value, layer.rank, dim)

    @torch.no_grad()
    def write_back(self) -> None:
        places = [(layer, *pair) for layer in self._layers.values() for pair in layer.factors()]
        self._tensors.write([layer.padded(factor, dim) for layer, dim, factor in places])
        known = moments(self._tensors.state()) if self._optimizer.state else []
        for key in known:
            values = [layer.padded(self._optimizer.state[factor][key], dim) for layer, dim, factor in places]
            self._tensors.write_state(key, values)
        self._record_ranks()

    def _record_ranks(self) -> None:
        """Let PEFT's config have the present ranks, as after a change of shapes."""
        record_ranks(self._trained, {name: layer.rank for name, layer in self._layers.items()})

    def importance_of(self, layers: Mapping[str, RankedLayer]) -> ImportanceSums:
        return ZeroImportance(layers, self._tensors, self._device)

    def steps_of(self, importance: ImportanceSums) -> ImportanceSteps:
        assert isinstance(importance, ZeroImportance)
        return importance


def _check_layers(model: nn.Module) -> None:
    """Refuse layers with which nothing was tried under DeepSpeed."""
    for name, layer in lora_layers(model):
        if layer.num_products != 1:
            raise ConfigurationError(
                f"{name!r} adapts a stack of experts, whose ranks were not tried under DeepSpeed; use DDP or FSDP2"
            )
        if not (layer.lora_A.requires_grad and layer.lora_B.requires_grad):
            raise ConfigurationError(
                f"the factors of {name!r} are frozen, and under DeepSpeed ranks change only if all layers train"
            )


def save_live(model: nn.Module) -> None:
    """Let ``model`` save its adapter without the zeros that stand for what cuts have removed."""
    keep_shapes(model)
    saves = getattr(model, "save_pretrained", None)
    if saves is not None and getattr(saves, "func", None) is not _save_live:
        model.save_pretrained = partial(_save_live, model, saves)  # type: ignore[assignment]


def _save_live(model: nn.Module, saves: Callable[..., None], folder: str | Path, **options: Any) -> None:
    with live_values(model, options.get("state_dict")) as state:
        saves(folder, **options | {"state_dict": state})
