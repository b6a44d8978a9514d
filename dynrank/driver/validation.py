"""Validations for a change of ranks, after which the run is as it was before."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from functools import partial
from numbers import Number
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dynrank.driver.schedulers import with_inner
from dynrank.driver.training import Training

# Types of the attributes that a validation may change and that are put back.
_VALUES = (Number, str, tuple, list, dict, set, deque, Tensor, type(None))
# Attributes in which torch keeps a module's parts, which are not values; buffers are put back.
_PARTS = vars(nn.Module()).keys() - {"_buffers", "training"}


def validate(training: Training, most: int | None = None) -> Mapping[str, float]:
    """Validate for a change, and restore afterwards what a validation may change; about ``most`` batches; None: all.

    These are the random generators, the trained weights, the attributes of the model's modules
    (:func:`attributes_kept`), the rates of the optimizers, and the state of the schedulers. So all validations for one
    change draw the same random numbers, and shuffled data come in the same order.
    """
    of_python = random.getstate()
    of_numpy = np.random.get_state()
    schedulers = with_inner(training.present_schedulers() or ())
    groups = [group for optimizer in training.optimizers for group in optimizer.param_groups]
    settings = [_back({name: value for name, value in group.items() if name != "params"}) for group in groups]
    try:
        with (
            torch.random.fork_rng(range(torch.cuda.device_count())),
            _weights_of_training(training.optimizers),
            attributes_kept([*training.modules(), *schedulers]),
        ):
            return training.validate() if most is None else training.validate_share(most)
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)
        for group, back in zip(groups, settings, strict=True):
            group.update(back())


@contextmanager
def attributes_kept(objects: Iterable[Any]) -> Iterator[None]:
    """Restore the attributes of ``objects`` after the block: numbers, texts, containers, and buffers of modules.

    So a best score, a list of scores, or a count that a module keeps does not know of the block. Tensors that are
    changed in place are restored in buffers and in the states of torchmetrics' metrics, which are small; elsewhere the
    name gets the tensor again that it had. Objects of other classes keep what happens to them.
    """
    before = []
    for owner in objects:
        # A scheduler of the user's own class may have slots.
        attributes = getattr(owner, "__dict__", {})
        of_metric = hasattr(owner, "add_state")
        kept = {
            name: _back(value, copied=of_metric or name == "_buffers")
            for name, value in attributes.items()
            if name not in _PARTS
        }
        before.append((attributes, kept))
    try:
        yield
    finally:
        for attributes, kept in before:
            for name in [*attributes]:
                if name in kept and isinstance(attributes[name], _VALUES):
                    attributes[name] = kept[name]()
                elif name not in kept and name not in _PARTS and isinstance(attributes[name], _VALUES):
                    del attributes[name]


def _back(value: Any, *, copied: bool = True) -> Callable[[], Any]:
    """What returns ``value`` with the contents that it has now; of a tensor only if it is ``copied``."""
    if isinstance(value, Tensor) and copied and value.device.type != "meta":
        return partial(_filled, value, value.detach().clone())
    if isinstance(value, dict):
        return partial(_refilled_dict, value, {key: _back(part, copied=copied) for key, part in value.items()})
    if isinstance(value, list | deque | set):
        return partial(_refilled, value, copy(value))
    return partial(_same, value)


def _same(value: Any) -> Any:
    return value


def _filled(tensor: Tensor, before: Tensor) -> Tensor:
    if not torch.equal(tensor, before):
        # What a validation has made is an inference tensor.
        with torch.inference_mode(tensor.is_inference()), torch.no_grad():
            tensor.copy_(before)
    return tensor


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
    groups = groups_of_schedulefree(optimizers)
    before = [(group["train_mode"], [weight.detach().clone() for weight in group["params"]]) for group in groups]
    try:
        yield
    finally:
        for group, (mode, weights) in zip(groups, before, strict=True):
            if group["train_mode"] != mode:
                group["train_mode"] = mode
                for parameter, weight in zip(group["params"], weights, strict=True):
                    parameter.detach().copy_(weight)


def groups_of_schedulefree(optimizers: Iterable[Optimizer]) -> list[dict[str, Any]]:
    """The param groups of optimizers of schedulefree, which keep other weights for validations."""
    return [group for optimizer in optimizers for group in optimizer.param_groups if "train_mode" in group]
