"""A change of ranks: everything is checked and computed first, and then assigned at once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from dynrank.change.directions import LayerDirections
from dynrank.change.optimizer_state import check_optimizer, check_trained, moved_states
from dynrank.change.reports import LayerReport, report_of
from dynrank.distributed.processes import from_first
from dynrank.distributed.wrappers import new_reducers, unwrapped_optimizer
from dynrank.errors import ConfigurationError, diverged
from dynrank.layers.compiled import forget_compiled
from dynrank.layers.finding import lora_layers
from dynrank.layers.peft_layers import PeftLayer, config_changes
from dynrank.layers.ranked_layer import RankedLayer
from dynrank.linalg import RankChange, grow_product, keep_directions, stacked

# The new rank of every layer, or of some by their names.
Ranks: TypeAlias = int | Mapping[str, int]
# {layer: (lora_A, lora_B)}
Factors: TypeAlias = dict[str, tuple[Tensor, Tensor]]
# For each optimizer, {layer: {"lora_A": its state, "lora_B": its state}}; an empty state deletes the present one.
States: TypeAlias = list[dict[str, dict[str, dict[str, Any]]]]


class Adapters:
    """What changes together: the LoRA layers of a model, their optimizers, and what follows their shapes.

    Args:
        model: the model.
        optimizers: all optimizers of its layers.
        ddp: the DDP modules that contain the layers; they follow every change.
        group: the processes that change ranks together; None: all.
        write_back: passes new factors and states on to where they are trained, if that is elsewhere.

    Attributes:
        layers: the layers by name.
        optimizers: the optimizers, without wrappers.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Iterable[Optimizer],
        *,
        ddp: Sequence[DistributedDataParallel] = (),
        group: ProcessGroup | None = None,
        write_back: Callable[[], None] | None = None,
    ) -> None:
        self.model = model
        self.layers = dict(lora_layers(model))
        self.optimizers = [unwrapped_optimizer(optimizer) for optimizer in optimizers]
        self.ddp = ddp
        self.group = group
        self.write_back = write_back


@dataclass(frozen=True)
class Change:
    """A change of ranks that is not yet made: new factors and optimizer state, and a report for each layer."""

    adapters: Adapters
    factors: Factors
    states: States
    reports: list[LayerReport]

    @classmethod
    @torch.no_grad()
    def compute(
        cls,
        adapters: Adapters,
        plan: Callable[[], Ranks],
        directions: LayerDirections,
        optimizer_state: Literal["transport", "reset"],
        generator: torch.Generator | None,
        *,
        balanced: Collection[str],
    ) -> Change:
        """Check and compute the change to the ranks that ``plan`` returns; nothing changes yet.

        ``balanced`` are the layers that get balanced factors although they keep their rank, unless a layer grows. The
        other arguments are those of :func:`dynrank.resize`.
        """
        return cls(adapters, *_computed(adapters, plan(), directions, optimizer_state, generator, balanced=balanced))

    @classmethod
    @torch.no_grad()
    def in_run(
        cls,
        adapters: Adapters,
        plan: Callable[[], Ranks],
        directions: LayerDirections,
        optimizer_state: Literal["transport", "reset"],
        step: int,
    ) -> Change:
        """The same in a training run: process 0 plans and computes, and all get its numbers; a collective call.

        Unless a layer grows, layers of ``directions`` that keep their rank are balanced, too: steps then have the same
        size in all layers.
        """
        # The seed is the step and nothing else, so growths at one step draw the same rows in runs of any seed. The
        # global generator stays as it is: data and dropout go on as without the growth, and a resumed run draws the
        # same rows.
        generator = torch.Generator().manual_seed(step)

        def parts() -> tuple[Factors, States, list[LayerReport]]:
            balanced = directions.names
            return _computed(adapters, plan(), directions, optimizer_state, generator, balanced=balanced)

        # DDP keeps a whole model on one device.
        device = next((layer.lora_A.device for layer in adapters.layers.values()), None)
        return cls(adapters, *from_first(parts, adapters.group, device=device))

    def apply(self) -> None:
        """Make the change by assignments; call it within :func:`dynrank.change.interrupts.uninterrupted`."""
        with new_reducers(self.adapters.ddp):
            self._assign()
        if self.adapters.write_back is not None:
            self.adapters.write_back()

    def _assign(self) -> None:
        layers = self.adapters.layers
        peft_ranks = {}
        for name, (lora_A, _) in self.factors.items():
            layer = layers[name]
            if isinstance(layer, PeftLayer):
                peft_ranks[layer.module, layer.adapter] = len(lora_A) // layer.num_products
        configs = config_changes(self.adapters.model, peft_ranks) if peft_ranks else []
        for name, pair in self.factors.items():
            layers[name].set_factors(*pair)
        for optimizer, states in zip(self.adapters.optimizers, self.states, strict=True):
            for name, of_layer in states.items():
                for factor, state in of_layer.items():
                    parameter = getattr(layers[name], factor)
                    if state:
                        optimizer.state[parameter] = state
                    else:
                        optimizer.state.pop(parameter, None)
        for change in configs:
            change()
        forget_compiled()


def _computed(
    adapters: Adapters,
    target: Ranks,
    directions: LayerDirections,
    optimizer_state: Literal["transport", "reset"],
    generator: torch.Generator | None,
    *,
    balanced: Collection[str],
) -> tuple[Factors, States, list[LayerReport]]:
    """The parts of a :class:`Change`."""
    ranks = _checked_ranks(adapters.layers, target, balanced)
    check_trained({name: adapters.layers[name] for name in ranks}, adapters.optimizers)
    for optimizer in adapters.optimizers:
        parameters = [p for name in ranks for p in (adapters.layers[name].lora_A, adapters.layers[name].lora_B)]
        check_optimizer(optimizer, parameters, optimizer_state)
    factors: Factors = {}
    states: States = [{} for _ in adapters.optimizers]
    reports = []
    for name, rank in ranks.items():
        layer = adapters.layers[name]
        change = _rank_change(name, layer, rank, directions, generator)
        factors[name] = change.lora_A, change.lora_B
        for optimizer, of_layers in zip(adapters.optimizers, states, strict=True):
            of_layers[name] = moved_states(optimizer, layer.lora_A, layer.lora_B, change, optimizer_state)
        spectrum = change.singular_values * layer.scaling
        reports.append(report_of(name, rank, spectrum, layer.params_per_rank))
    return factors, states, reports


def _checked_ranks(layers: Mapping[str, RankedLayer], target: Ranks, balanced: Collection[str]) -> dict[str, int]:
    """{name: new rank} for the layers that get new factors, in model order; ``balanced`` as for :class:`Change`."""
    if not layers:
        raise ConfigurationError("the model has no LoRA layers; call dynrank.add_lora first", "model")
    targets = target if isinstance(target, Mapping) else dict.fromkeys(layers, target)
    faults = []
    for name, rank in targets.items():
        if name not in layers:
            faults.append(f"{name!r} is no LoRA layer of the model")
            continue
        most = layers[name].max_rank
        if not isinstance(rank, int) or isinstance(rank, bool):
            faults.append(f"{name!r}: rank must be an int, got {rank!r}")
        elif rank != layers[name].rank and not 1 <= rank <= most:
            faults.append(f"{name!r}: rank must be between 1 and {layers[name].bound} = {most}, got {rank}")
        if layers[name].merged:
            raise RuntimeError(f"{name!r} is merged; call unmerge_adapter() before changing its rank")
    if faults:
        raise ConfigurationError("ranks cannot be changed:\n  " + "\n  ".join(faults), "target", "final_rank")
    grows = any(rank > layers[name].rank for name, rank in targets.items())
    return {
        name: targets[name]
        for name, layer in layers.items()
        if name in targets and (targets[name] != layer.rank or (name in balanced and not grows))
    }


def _rank_change(
    name: str,
    layer: RankedLayer,
    rank: int,
    directions: LayerDirections,
    generator: torch.Generator | None,
) -> RankChange:
    """New factors of a layer, and the maps to them."""
    products = layer.products()
    # A layer that keeps its rank is here to be balanced.
    if rank <= layer.rank:
        pairs = zip(products, directions.of(name), strict=True)
        return stacked([keep_directions(b, a, known, torch.arange(rank)) for (b, a), known in pairs])
    try:
        return stacked([grow_product(b, a, rank, generator=generator) for b, a in products])
    except ValueError as error:
        raise diverged(name, error) from error
