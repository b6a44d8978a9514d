"""The one place where the rank of a layer changes: check all, compute all, then put all in place at once."""

from __future__ import annotations

import copy
import gc
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from dynrank.change.directions import LayerDirections
from dynrank.change.optimizer_state import check_optimizer, moved_states
from dynrank.distributed.processes import from_first
from dynrank.distributed.wrappers import unwrapped_optimizer
from dynrank.errors import ConfigurationError, diverged
from dynrank.layers.base import RankedLayer, max_rank, params_per_rank
from dynrank.layers.compiled import forget_compiled
from dynrank.layers.finding import lora_layers
from dynrank.layers.peft_layers import config_changes
from dynrank.layers.peft_view import PeftLayer
from dynrank.linalg import RankChange, energy_kept, grow_product, joined, keep_directions, split, stacked

Ranks: TypeAlias = int | Mapping[str, int]


@torch.no_grad()
def resize(
    model: nn.Module,
    target: Ranks,
    *,
    optimizers: Iterable[Optimizer] = (),
    optimizer_state: Literal["transport", "reset"] = "transport",
    averages: Iterable[nn.Module] = (),
    generator: torch.Generator | None = None,
    collective: bool = False,
    balance: bool = False,
    dry_run: bool = False,
) -> list[LayerReport]:
    """Change the rank of LoRA layers in place, down or up, and carry the optimizers' state through the change.

    A cut keeps the largest directions, which approximate the update best. Growth does not change the function. The
    scaling stays the same. The Parameter objects stay the same, too, so optimizers, param groups, schedulers and hooks
    remain valid. Gradients are deleted, so call this between two steps.
    All or nothing: everything is checked and computed before the first layer changes, and after an interrupt (Ctrl-C)
    either nothing or everything has changed.

    Args:
        model: a model with LoRA layers, dynrank's or PEFT's.
        target: the new rank of every layer, or {layer name: new rank} for some.
        optimizers: all optimizers of the layers' parameters; any other with state of theirs refuses its next step.
        optimizer_state: "transport" carries the moments through the change, "reset" deletes them.
        averages: moving averages of the model (torch's AveragedModel, or a copy with the same layers); the same maps
            change them.
        generator: generator of the random rows of a growth; torch's default generator when None.
        collective: whether every process of torch's default group makes this call. Process 0 computes, and all
            processes get the bits of its factors and optimizer state. Wrap the model in DDP again afterwards.
        balance: whether layers in ``target`` that keep their rank get balanced factors, too, if another layer is cut;
            their update stays the same up to rounding. Pinned layers are left alone.
        dry_run: check and compute everything, but change nothing.

    Returns:
        A report per changed layer, in model order; a layer that has its new rank already is left out.

    Raises:
        ConfigurationError: if there are no LoRA layers, a name or rank cannot be used, a factor holds NaN or inf (it
            names the layer), an optimizer's state cannot be carried, or an average has other layers.
        RuntimeError: if one of PEFT's layers is merged.

    >>> import torch, dynrank
    >>> model = dynrank.add_lora(torch.nn.Sequential(torch.nn.Linear(8, 8)), rank=4)
    >>> optimizer = torch.optim.AdamW(dynrank.adapter_parameters(model))
    >>> [(layer.layer, layer.rank_after) for layer in dynrank.resize(model, 2, optimizers=[optimizer])]
    [('0', 2)]
    """
    adapters = Adapters(model, optimizers, averages)
    directions = LayerDirections(adapters.layers)
    change = compute(
        adapters, lambda: target, directions, optimizer_state, generator, collective=collective, balance=balance
    )
    if not dry_run:
        change.put()
        _watch_others(adapters)
    return change.reports


def _watch_others(adapters: Adapters) -> None:
    """Let optimizers whose state has not followed the layers refuse their next step by name.

    After training there is no next step, so the change itself cannot be refused.
    """
    factors = [factor for layer in adapters.layers.values() for factor in (layer.lora_A, layer.lora_B)]
    followed = {id(optimizer) for optimizer in adapters.optimizers}
    if all(any(factor in optimizer.state for optimizer in adapters.optimizers) for factor in factors):
        return
    # isinstance() would ask proxies for the class of what they stand for.
    alive = [found for found in gc.get_objects() if issubclass(type(found), Optimizer)]
    for optimizer in {id(inner): inner for inner in map(unwrapped_optimizer, alive)}.values():
        if id(optimizer) not in followed and any(factor in getattr(optimizer, "state", ()) for factor in factors):
            optimizer.register_step_pre_hook(_refuse_old_shapes)


def _refuse_old_shapes(optimizer: Optimizer, *_: Any) -> None:
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor) and value.ndim == parameter.ndim and value.shape != parameter.shape:
                raise ConfigurationError(
                    f"dynrank.resize has changed a parameter to {[*parameter.shape]}, and {key!r} of this "
                    f"{type(optimizer).__name__} still has shape {[*value.shape]}: pass the optimizer to resize "
                    "(optimizers=[...]), or clear its state"
                )


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
        brought: what the layer had brought before: the decrease of the loss by its updates in this run (see
            :mod:`dynrank.driver.brought`), the reason for its rank; None if unknown.
    """

    layer: str
    rank_before: int
    rank_after: int
    energy_kept: float
    predicted_error: float
    singular_values: tuple[float, ...]
    params_per_rank: int
    brought: float | None = None

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


@dataclass(frozen=True)
class Values:
    """Factors and optimizer state by name, so that one process can send them to the others.

    Attributes:
        factors: for the model and then for each average, {layer: (lora_A, lora_B)}.
        states: for each optimizer, {layer: {"lora_A": its state, "lora_B": its state}}; an empty state deletes the
            present one.
    """

    factors: list[dict[str, tuple[Tensor, Tensor]]]
    states: list[dict[str, dict[str, dict[str, Any]]]]


@dataclass(frozen=True)
class Change:
    """A change of ranks that is computed but not yet made."""

    adapters: Adapters
    values: Values
    reports: list[LayerReport]

    def put(self) -> None:
        """Make the change; Ctrl-C takes effect after it."""
        self.adapters.put(self.values)


class Adapters:
    """What changes together: the LoRA layers of a model and of its averages, and the optimizers of the model's layers.

    Attributes:
        layers: the layers of the model by name.
        models: (model, its layers) for the model and then for each average.
        optimizers: the optimizers, without wrappers.
    """

    def __init__(self, model: nn.Module, optimizers: Iterable[Optimizer], averages: Iterable[nn.Module]) -> None:
        self.layers = dict(lora_layers(model))
        self.models = [(model, self.layers), *_averaged_layers(averages, self.layers)]
        self.optimizers = [unwrapped_optimizer(optimizer) for optimizer in optimizers]

    def put(self, new: Values) -> None:
        """Replace factors and optimizer state by assignments alone; Ctrl-C takes effect after the last one."""
        peft_ranks = {}
        for (_, layers), factors in zip(self.models, new.factors, strict=True):
            for name, (lora_A, _) in factors.items():
                layer = layers[name]
                if isinstance(layer, PeftLayer):
                    peft_ranks[layer.module, layer.adapter] = len(lora_A) // layer.num_products
        configs = [change for model, _ in self.models if peft_ranks for change in config_changes(model, peft_ranks)]
        with uninterrupted():
            for (_, layers), factors in zip(self.models, new.factors, strict=True):
                for name, pair in factors.items():
                    layers[name].set_factors(*pair)
            for optimizer, states in zip(self.optimizers, new.states, strict=True):
                for name, of_layer in states.items():
                    for factor, state in of_layer.items():
                        parameter = getattr(self.layers[name], factor)
                        if state:
                            optimizer.state[parameter] = state
                        else:
                            optimizer.state.pop(parameter, None)
            for change in configs:
                change()
            forget_compiled()


class Snapshot:
    """A copy of everything that :func:`resize` may change in a model, its optimizers and its averages."""

    def __init__(self, model: nn.Module, optimizers: Iterable[Optimizer], averages: Iterable[nn.Module] = ()) -> None:
        self._adapters = Adapters(model, optimizers, averages)
        factors = [
            {name: (layer.lora_A.detach(), layer.lora_B.detach()) for name, layer in layers.items()}
            for _, layers in self._adapters.models
        ]
        states = [
            {
                name: {factor: optimizer.state.get(getattr(layer, factor), {}) for factor in ("lora_A", "lora_B")}
                for name, layer in self._adapters.layers.items()
            }
            for optimizer in self._adapters.optimizers
        ]
        self._saved = copy.deepcopy(Values(factors, states))

    def restore(self) -> None:
        """Restore factors, ranks and optimizer state bit for bit; may be called repeatedly."""
        self._adapters.put(copy.deepcopy(self._saved))


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
    plan: Callable[[], Ranks],
    directions: LayerDirections,
    optimizer_state: Literal["transport", "reset"],
    generator: torch.Generator | None,
    *,
    collective: bool,
    balance: bool,
) -> Change:
    """Check and compute a change of ranks, and change nothing; the arguments are those of :func:`resize`.

    If the call is ``collective``, process 0 alone calls ``plan``, which returns the new ranks, and computes. All
    processes get the result in one exchange.
    """

    def of_first() -> tuple[Values, list[LayerReport]]:
        ranks = _checked_ranks(adapters.layers, plan(), balance)
        for optimizer in adapters.optimizers:
            factors = [f for name in ranks for f in (adapters.layers[name].lora_A, adapters.layers[name].lora_B)]
            check_optimizer(optimizer, factors, optimizer_state)
        return _new_values(adapters, ranks, directions, optimizer_state, generator)

    # DDP keeps a whole model on one device.
    device = next((layer.lora_A.device for layer in adapters.layers.values()), None)
    values, reports = from_first(of_first, device=device) if collective else of_first()
    return Change(adapters, values, reports)


def _checked_ranks(layers: Mapping[str, RankedLayer], target: Ranks, balance: bool) -> dict[str, int]:
    """{name: new rank} for the layers that get new factors, in model order; see :func:`resize` for ``balance``."""
    if not layers:
        raise ConfigurationError("the model has no LoRA layers; call dynrank.add_lora first")
    targets = dict(target) if isinstance(target, Mapping) else dict.fromkeys(layers, target)
    faults = []
    for name, rank in targets.items():
        if name not in layers:
            faults.append(f"no LoRA layer is named {name!r}")
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
    balance = balance and any(rank < layers[name].rank for name, rank in targets.items())
    return {
        name: targets[name]
        for name, layer in layers.items()
        if name in targets and (targets[name] != layer.rank or (balance and not layer.pinned))
    }


def _new_values(
    adapters: Adapters,
    ranks: Mapping[str, int],
    directions: LayerDirections,
    optimizer_state: Literal["transport", "reset"],
    generator: torch.Generator | None,
) -> tuple[Values, list[LayerReport]]:
    """The new values of the layers in ``ranks``, and reports of those whose rank changes."""
    layers = adapters.layers
    values = Values([{} for _ in adapters.models], [{} for _ in adapters.optimizers])
    of_model, *of_averages = values.factors
    reports = []
    for name, rank in ranks.items():
        layer = layers[name]
        change = _rank_change(name, layer, rank, directions, generator)
        of_model[name] = change.lora_A, change.lora_B
        for (_, own), of_average in zip(adapters.models[1:], of_averages, strict=True):
            of_average[name] = _moved_average(own[name], change)
        for optimizer, states in zip(adapters.optimizers, values.states, strict=True):
            states[name] = moved_states(optimizer, layer.lora_A, layer.lora_B, change, optimizer_state)
        if rank != layer.rank:
            spectrum = change.singular_values * layer.scaling
            reports.append(report_of(name, rank, spectrum, params_per_rank(layer)))
    return values, reports


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


def _averaged_layers(
    averages: Iterable[nn.Module], layers: Mapping[str, RankedLayer]
) -> list[tuple[nn.Module, dict[str, RankedLayer]]]:
    """(model, its LoRA layers by name) of each average; an average is a model, or torch's AveragedModel of one."""
    found = []
    for average in averages:
        module: nn.Module = average.module if isinstance(average, AveragedModel) else average
        own = dict(lora_layers(module))
        wrong = sorted(own.keys() ^ layers.keys())
        wrong += [name for name in own.keys() & layers.keys() if own[name].rank != layers[name].rank]
        if wrong:
            raise ConfigurationError(
                f"an average must have the model's LoRA layers at the same ranks, {wrong[:3]} differ; make the average "
                "from the model as it is now, and pass it to every dynrank.resize (averages)"
            )
        found.append((module, own))
    return found


def _moved_average(layer: RankedLayer, change: RankChange) -> tuple[Tensor, Tensor]:
    """lora_A and lora_B of the averaged ``layer`` after ``change``, in their own dtypes and on their own device.

    A change is linear in each factor, ``A' = T_a A`` and ``B' = B T_b``, and so is an average. So the same maps turn
    the average of the old factors into the one that the run would have had in the new coordinates. A truncation of the
    average by itself would keep more of its function now, but in other coordinates than the model's, so that the next
    update would average numbers that do not belong together. In a new direction the row of lora_A is the model's.
    """
    device = layer.lora_A.device
    count = layer.num_products
    from_A, from_B, rows = (t.to(device) for t in (change.from_A, change.from_B, change.lora_A))
    is_new = from_A.eq(0).all(dim=-1, keepdim=True)
    old_A = split(layer.lora_A.double(), count, 0)
    old_B = split(layer.lora_B.double(), count, 1)
    lora_A = joined(torch.where(is_new, split(rows.double(), count, 0), from_A @ old_A), 0)
    lora_B = joined(from_B.mT @ old_B, 1)
    return lora_A.to(layer.lora_A.dtype), lora_B.to(layer.lora_B.dtype)
