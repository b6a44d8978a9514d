"""Validations for a change of ranks, and what they leave as it was."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from functools import partial
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dynrank.driver.schedulers import with_inner
from dynrank.driver.training import Training
from dynrank.private import persistent_buffers


class _Validation:
    """A validation for a change, as long as it runs."""


# Weak, so that Ctrl-C at any line leaves none behind.
_running: WeakSet[_Validation] = WeakSet()


def validating_change() -> bool:
    """Whether the present validation is one for a change of ranks: before it, after it, or of a cut that is tried.

    A module, or a function of metrics, that keeps something of its validations can leave these out.

    >>> validating_change()
    False
    """
    return bool(_running)


def validate(training: Training, most: int | None = None) -> Mapping[str, float]:
    """Validate for a change; about ``most`` batches are taken; None: all.

    Restored afterwards are the random generators (those of ``training``, too), the trained weights, the mode of
    training, buffers that a state dict has (others are caches), the states of torchmetrics' metrics, the settings of
    the optimizers (rates) and the states of the schedulers. So all validations for one change draw the same random
    numbers, and shuffled data come in the same order.
    """
    of_python = random.getstate()
    of_numpy = np.random.get_state()
    others = [(generator, generator.get_state()) for generator in training.generators()]
    groups = [group for optimizer in training.optimizers for group in optimizer.param_groups]
    settings = [_back({name: value for name, value in group.items() if name != "params"}) for group in groups]
    modules = [*training.modules()]
    modes = [module.training for module in modules]
    buffers = [(module, name, _back(buffer)) for module in modules for name, buffer in persistent_buffers(module)]
    metrics = [module for module in modules if is_metric(module)]
    running = _Validation()
    try:
        _running.add(running)
        with (
            torch.random.fork_rng(range(torch.cuda.device_count())),
            _weights_of_training(training.optimizers),
            attributes_kept([*metrics, *with_inner(training.present_schedulers() or ())]),
        ):
            return training.validate() if most is None else training.validate_share(most)
    finally:
        _running.discard(running)
        random.setstate(of_python)
        np.random.set_state(of_numpy)
        for generator, state in others:
            generator.set_state(state)
        for module, name, back in buffers:
            setattr(module, name, back())
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode
        for group, of_group in zip(groups, settings, strict=True):
            group.update(of_group())


def is_metric(module: nn.Module) -> bool:
    """Whether ``module`` is a metric of torchmetrics, also of a derived class, a collection, or a tracker of them."""
    return any(cls.__module__.startswith("torchmetrics.") for cls in type(module).__mro__)


@contextmanager
def attributes_kept(objects: Iterable[Any]) -> Iterator[None]:
    """Restore the attributes of ``objects`` after the block, with the contents of tensors, lists, sets and dicts."""
    # A scheduler of the user's own class may have slots.
    places = [getattr(owner, "__dict__", {}) for owner in objects]
    backs = [_back(attributes) for attributes in places]
    try:
        yield
    finally:
        for back in backs:
            back()


def _back(value: Any) -> Callable[[], Any]:
    """What returns ``value`` with the contents that it has now."""
    if isinstance(value, Tensor) and not value.is_meta:
        return partial(_filled, value, value.detach().clone())
    if isinstance(value, dict):
        return partial(_refilled_dict, value, {key: _back(part) for key, part in value.items()})
    if isinstance(value, list | deque | set):
        return partial(_refilled, value, copy(value))
    return partial(_same, value)


def _same(value: Any) -> Any:
    return value


def _filled(tensor: Tensor, before: Tensor) -> Tensor:
    if not _is_equal(tensor, before):
        # What a validation has made is an inference tensor.
        with torch.inference_mode(tensor.is_inference()), torch.no_grad():
            tensor.copy_(before)
    return tensor


def _is_equal(tensor: Tensor, other: Tensor) -> bool:
    """Whether both have the same bits; those without a plain memory (sparse, nested, quantized) count as equal."""
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_quantized:
        return True
    return torch.equal(*(value.detach().contiguous().view(-1).view(torch.uint8) for value in (tensor, other)))


def _refilled_dict(value: Any, parts: Mapping[Any, Callable[[], Any]]) -> Any:
    return _refilled(value, {key: back() for key, back in parts.items()})


def _refilled(container: Any, before: Any) -> Any:
    """The ``container`` with the contents of ``before``; it is left alone if they are the same objects."""
    if _objects(container) != _objects(before):
        container.clear()
        (container.extend if isinstance(container, list | deque) else container.update)(before)
    return container


def _objects(container: Any) -> list[int]:
    values = container.values() if isinstance(container, dict) else ()
    return [*map(id, container), *map(id, values)]


@contextmanager
def _weights_of_training(optimizers: Iterable[Optimizer]) -> Iterator[None]:
    """Restore the weights at the start of the block, if an optimizer of schedulefree has swapped them in it.

    Its ``eval`` puts means into the parameters for a validation. A change that is then made would put factors of the
    weights of training in their place, and its ``train`` would take these for means.
    """
    groups = _groups_of_schedulefree(optimizers)
    before = [(group["train_mode"], [weight.detach().clone() for weight in group["params"]]) for group in groups]
    try:
        yield
    finally:
        for group, (mode, weights) in zip(groups, before, strict=True):
            if group["train_mode"] != mode:
                group["train_mode"] = mode
                for parameter, weight in zip(group["params"], weights, strict=True):
                    parameter.detach().copy_(weight)


def _groups_of_schedulefree(optimizers: Iterable[Optimizer]) -> list[dict[str, Any]]:
    """The param groups of optimizers of schedulefree, which keep other weights for validations."""
    return [group for optimizer in optimizers for group in optimizer.param_groups if "train_mode" in group]
