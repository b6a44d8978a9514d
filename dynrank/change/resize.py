"""The one place where the rank of a layer changes: check all, compute all, then put all in place at once."""

from __future__ import annotations

import copy
import gc
import signal
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dynrank.change.optimizer_state import check_optimizer, check_trained, moved_states
from dynrank.distributed.sharding import check_whole
from dynrank.distributed.wrappers import unwrapped_optimizer
from dynrank.errors import ConfigurationError, diverged
from dynrank.layers.base import RankedLayer, max_rank, params_per_rank
from dynrank.layers.compiled import forget_compiled
from dynrank.layers.finding import lora_layers
from dynrank.layers.peft_layers import PeftLayer, config_changes
from dynrank.linalg import (
    Directions,
    RankChange,
    directions_of,
    energy_kept,
    grow_product,
    keep_directions,
    pooled,
    stacked,
)
from dynrank.rank_map import by_layer

Ranks: TypeAlias = int | Mapping[str, int]


# Optimizers could not step on state that inference mode has made (Lightning validates in it).
@torch.inference_mode(False)
@torch.no_grad()
def resize(
    model: nn.Module,
    target: Ranks,
    *,
    optimizers: Iterable[Optimizer] = (),
    optimizer_state: Literal["transport", "reset"] = "transport",
    generator: torch.Generator | None = None,
    balance: bool = False,
    dry_run: bool = False,
) -> list[LayerReport]:
    """Change the rank of LoRA layers in place, down or up, and carry the optimizers' state through the change.

    A cut keeps the largest directions, which approximate the update best. Growth does not change the function. The
    scaling stays the same. The Parameter objects stay the same, too, so optimizers, param groups, schedulers and hooks
    remain valid. Gradients are deleted, so call this between two steps.
    All or nothing: everything is checked and computed before the first layer changes, and after an interrupt (Ctrl-C)
    either nothing or everything has changed. In several processes, :class:`dynrank.RankDriver` sends all the same.

    Args:
        model: a model with LoRA layers, dynrank's or PEFT's.
        target: the new rank of every layer, up or down, or {key: new rank} for some. A key is a layer's name,
            which goes before all others, "attention", "mlp", or a pattern as in a rank map, of which the first that
            matches a layer wins.
        optimizers: all optimizers of the layers' parameters. If another one has state of theirs, the call is refused.
        optimizer_state: "transport" carries the moments through the change, "reset" deletes them.
        generator: generator of the random rows of a growth; torch's default generator when None.
        balance: whether layers in ``target`` that keep their rank get balanced factors, too, unless another layer
            grows; their update stays the same up to rounding. Pinned layers are left alone.
        dry_run: check and compute everything, but change nothing; optimizers need not be passed.

    Returns:
        A report per layer with new factors (``layer``, ``rank_before``, ``rank_after``, ``energy_kept``, …), in model
        order; a layer that has its new rank already is left out, unless it was balanced.

    Raises:
        ConfigurationError: if there are no LoRA layers, a key or rank cannot be used, a factor holds NaN or inf (it
            names the layer), an optimizer's state cannot be carried, or an optimizer with state was not passed.
        RuntimeError: if one of PEFT's layers is merged.

    >>> import torch, dynrank
    >>> model = dynrank.add_lora(torch.nn.Sequential(torch.nn.Linear(8, 8)), rank=4)
    >>> optimizer = torch.optim.AdamW(dynrank.adapter_parameters(model))
    >>> [(layer.layer, layer.rank_after) for layer in dynrank.resize(model, 2, optimizers=[optimizer])]
    [('0', 2)]
    """
    check_whole(model)
    adapters = Adapters(model, optimizers)
    directions = LayerDirections(adapters.layers)
    ranks = by_layer(target, adapters.layers) if isinstance(target, Mapping) and adapters.layers else target
    change = Change(adapters, *compute(adapters, ranks, directions, optimizer_state, generator, balance=balance))
    if not dry_run:
        _check_others(adapters, change.factors)
        change.put()
    return change.reports


def _check_others(adapters: Adapters, names: Iterable[str]) -> None:
    """Refuse to change the layers ``names`` while an optimizer that would not follow has state of theirs."""
    layers = {name: adapters.layers[name] for name in names}
    factors = {factor: name for name, layer in layers.items() for factor in (layer.lora_A, layer.lora_B)}
    if all(any(factor in optimizer.state for optimizer in adapters.optimizers) for factor in factors):
        return
    found = _others_with_state(factors, adapters.optimizers)
    if found:
        # An optimizer that only a cycle of references keeps alive makes no further step.
        gc.collect()
        found = _others_with_state(factors, adapters.optimizers)
    if found:
        raise ConfigurationError(
            f"an optimizer that was not passed to dynrank.resize has state of LoRA layers: {', '.join(found)}; its "
            "moments would keep the old shapes, and its next step would fail. Pass every optimizer of the layers "
            "(optimizers=[optimizer]), after training too, or delete it. Nothing has been changed"
        )


def _others_with_state(factors: Mapping[nn.Parameter, str], passed: Iterable[Optimizer]) -> list[str]:
    """Kind and first layer of each living optimizer, other than ``passed``, that has tensors for a factor."""
    known = {id(optimizer) for optimizer in passed}
    # Neither torch nor a parameter knows the optimizers, and those of a model of PEFT may have stepped before dynrank
    # was imported, so nobody could hand them over. isinstance() would ask proxies for the class of what they stand for.
    alive = [found for found in gc.get_objects() if issubclass(type(found), Optimizer)]
    others = {id(inner): inner for inner in map(unwrapped_optimizer, alive) if id(inner) not in known}
    found = []
    for optimizer in others.values():
        states = getattr(optimizer, "state", {})
        of_layers = [name for factor, name in factors.items() if any(map(_has_shape, states.get(factor, {}).values()))]
        if of_layers:
            found.append(f"{type(optimizer).__name__} of {of_layers[0]!r}")
    return found


def _has_shape(value: object) -> bool:
    """Whether a value of an optimizer's state is more than a count of steps."""
    return isinstance(value, Tensor) and value.ndim > 0


@dataclass(frozen=True)
class LayerReport:
    """The effect of a change of rank on one layer.

    Attributes:
        layer: its name in the model.
        rank_before: rank before the change.
        rank_after: rank after the change.
        energy_kept: share of the energy (sum of squared singular values) that is kept, in [0, 1].
        predicted_error: norm of the dropped singular values, the Frobenius norm of the update's change.
        singular_values: singular values of the update before the change (scaling included), descending.
        params_per_rank: d_out + d_in (times the experts), the parameters of one direction.
        importance: what the layer had brought before: the decrease of the loss by its updates in this run (see
            :mod:`dynrank.driver.importance`); None if unknown.
        importance_error: its standard error; None if unknown. The sum of both (of brought at least 0) is the reason for
            the layer's rank in a pool.
    """

    layer: str
    rank_before: int
    rank_after: int
    energy_kept: float
    predicted_error: float
    singular_values: tuple[float, ...]
    params_per_rank: int
    importance: float | None = None
    importance_error: float | None = None

    @property
    def parameters_saved(self) -> int:
        """How many trainable parameters the change removes (negative for growth)."""
        return (self.rank_before - self.rank_after) * self.params_per_rank


def report_of(name: str, rank: int, values: Tensor, params_per_rank: int) -> LayerReport:
    """The report of a change to ``rank`` of a layer with these singular values (scaling included)."""
    return LayerReport(
        layer=name,
        rank_before=len(values),
        rank_after=rank,
        energy_kept=energy_kept(values, rank),
        predicted_error=float(values[rank:].norm()),
        singular_values=tuple(values.tolist()),
        params_per_rank=params_per_rank,
    )


class LayerDirections:
    """The present directions of ``layers`` (name -> layer), computed once until a layer's factors change."""

    def __init__(self, layers: Mapping[str, RankedLayer]) -> None:
        self._layers = dict(layers)
        # By layer: the versions of its factors, and their directions.
        self._known: dict[str, tuple[tuple[int, int], list[Directions]]] = {}

    @torch.no_grad()
    def of(self, name: str) -> list[Directions]:
        """The directions of each product of a layer."""
        layer = self._layers[name]
        versions = layer.lora_A._version, layer.lora_B._version
        if name not in self._known or self._known[name][0] != versions:
            try:
                self._known[name] = versions, [directions_of(b, a) for b, a in layer.products()]
            except ValueError as error:
                raise diverged(name, error) from error
        return self._known[name][1]

    def values(self) -> dict[str, Tensor]:
        """{layer: (rank,) float64, descending}: the singular values of its update, scaling included."""
        return {
            name: pooled([each.singular_values for each in self.of(name)]) * layer.scaling
            for name, layer in self._layers.items()
        }


class Adapters:
    """What changes together: the LoRA layers of a model, and their optimizers.

    Attributes:
        model: the model.
        layers: its layers by name.
        optimizers: the optimizers, without wrappers.
    """

    def __init__(self, model: nn.Module, optimizers: Iterable[Optimizer]) -> None:
        self.model = model
        self.layers = dict(lora_layers(model))
        self.optimizers = [unwrapped_optimizer(optimizer) for optimizer in optimizers]


# {layer: (lora_A, lora_B)}
Factors: TypeAlias = dict[str, tuple[Tensor, Tensor]]
# For each optimizer, {layer: {"lora_A": its state, "lora_B": its state}}; an empty state deletes the present one.
States: TypeAlias = list[dict[str, dict[str, dict[str, Any]]]]


@dataclass(frozen=True)
class Change:
    """A change of ranks that is computed but not yet made: new factors and optimizer state, and what they mean."""

    adapters: Adapters
    factors: Factors
    states: States
    reports: list[LayerReport]

    def put(self) -> None:
        """Make the change by assignments alone; Ctrl-C takes effect after the last one."""
        layers = self.adapters.layers
        peft_ranks = {}
        for name, (lora_A, _) in self.factors.items():
            layer = layers[name]
            if isinstance(layer, PeftLayer):
                peft_ranks[layer.module, layer.adapter] = len(lora_A) // layer.num_products
        configs = config_changes(self.adapters.model, peft_ranks) if peft_ranks else []
        with uninterrupted():
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


class Snapshot:
    """A copy of everything that :func:`resize` may change in a model and its optimizers."""

    def __init__(self, model: nn.Module, optimizers: Iterable[Optimizer]) -> None:
        self._adapters = Adapters(model, optimizers)
        factors = {
            name: (layer.lora_A.detach(), layer.lora_B.detach()) for name, layer in self._adapters.layers.items()
        }
        states = [
            {
                name: {factor: optimizer.state.get(getattr(layer, factor), {}) for factor in ("lora_A", "lora_B")}
                for name, layer in self._adapters.layers.items()
            }
            for optimizer in self._adapters.optimizers
        ]
        self._saved = copy.deepcopy((factors, states))

    def restore(self) -> None:
        """Restore factors, ranks and optimizer state bit for bit; may be called repeatedly."""
        factors, states = copy.deepcopy(self._saved)
        Change(self._adapters, factors, states, []).put()


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Delay Ctrl-C until the end of the block; blocks may be nested.

    Ctrl-C interrupts the main thread alone, and a handler that was not set by Python cannot be put back.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is None:
        yield
        return
    pressed: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if pressed:
            signal.raise_signal(signal.SIGINT)


@torch.no_grad()
def compute(
    adapters: Adapters,
    target: Ranks,
    directions: LayerDirections,
    optimizer_state: Literal["transport", "reset"],
    generator: torch.Generator | None,
    *,
    balance: bool,
) -> tuple[Factors, States, list[LayerReport]]:
    """Check and compute a :class:`Change`, and change nothing; the arguments are those of :func:`resize`."""
    ranks = _checked_ranks(adapters.layers, target, balance)
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
        reports.append(report_of(name, rank, spectrum, params_per_rank(layer)))
    return factors, states, reports


def _checked_ranks(layers: Mapping[str, RankedLayer], target: Ranks, balance: bool) -> dict[str, int]:
    """{name: new rank} for the layers that get new factors, in model order; see :func:`resize` for ``balance``."""
    if not layers:
        raise ConfigurationError("the model has no LoRA layers; call dynrank.add_lora first")
    targets = target if isinstance(target, Mapping) else dict.fromkeys(layers, target)
    faults = []
    for name, rank in targets.items():
        if name not in layers:
            faults.append(f"{name!r} is no LoRA layer of the model")
            continue
        most = max_rank(layers[name])
        if not isinstance(rank, int) or isinstance(rank, bool):
            faults.append(f"{name!r}: rank must be an int, got {rank!r}")
        elif rank != layers[name].rank and not 1 <= rank <= most:
            faults.append(f"{name!r}: rank must be between 1 and min(d_in, d_out) = {most}, got {rank}")
        if layers[name].merged:
            raise RuntimeError(f"{name!r} is merged; call unmerge_adapter() before changing its rank")
    if faults:
        raise ConfigurationError("ranks cannot be changed (schedule.final_rank or rank_map):\n  " + "\n  ".join(faults))
    balance = balance and not any(rank > layers[name].rank for name, rank in targets.items())
    return {
        name: targets[name]
        for name, layer in layers.items()
        if name in targets and (targets[name] != layer.rank or (balance and not layer.pinned))
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
