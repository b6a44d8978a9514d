"""The bytes of one training step of a model, counted by running it on tensors without values."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves
from transformers import masking_utils

from dynrank.errors import ConfigurationError
from dynrank.models.sizes import storage_bytes, tensors_of

__all__ = ["CountingMode", "SavedTensors", "StepMemory", "count_step", "loss_of", "token_batch"]


@dataclass(frozen=True)
class StepMemory:
    """Bytes that a forward and a backward allocate beside the model and its optimizer.

    Attributes:
        activations: what the forward has saved for the backward when it is over; each storage once.
        gradients: of the parameters, when the backward is over.
        peak: the most that is held at once, gradients included.
    """

    activations: int
    gradients: int
    peak: int


class SavedTensors(saved_tensors_hooks):
    """Counts the storages that autograd saves within it, but for those of ``own``."""

    def __init__(self, own: Iterable[Tensor]) -> None:
        self._own = {_key(tensor): tensor for tensor in own}  # held: addresses are used again
        self._saved: dict[int, Any] = {}
        super().__init__(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._own:
            self._saved[storage._cdata] = storage
        return tensor

    def release(self) -> int:
        """The bytes; the storages are not held any more."""
        counted: int = sum(storage.nbytes() for storage in self._saved.values())
        self._saved.clear()
        return counted


class CountingMode(FakeTensorMode):
    """Tensors without values, on the CPU as far as anybody can tell; and a count of what ops allocate.

    Real tensors may be mixed in (tables of an 8-bit format).

    Attributes:
        held: bytes of the storages that ops have given out since :meth:`follow` and that are not freed.
        peak: the most so far.
    """

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)  # type: ignore[no-untyped-call]
        self.held = self.peak = 0
        self._sizes: dict[int, int] | None = None
        self._within = False
        self._own: list[Tensor] = []

    @contextmanager
    def follow(self, own: Iterable[Tensor]) -> Iterator[None]:
        """Use the mode and count from 0 on; storages of ``own`` do not count."""
        self._own = list(own)  # held: addresses are used again
        self._sizes, self.held, self.peak = {_key(tensor): 0 for tensor in self._own}, 0, 0
        try:
            with self:
                yield
        finally:
            self._sizes, self._own = None, []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        within, self._within = self._within, True
        try:
            out = super().__torch_dispatch__(func, types, args, kwargs or {})
        finally:
            self._within = within
        # what an op makes on its way appears only when its shapes are met for the first time
        if self._sizes is not None and not within:
            for tensor in tree_leaves(out):
                if isinstance(tensor, Tensor) and _key(tensor) not in self._sizes:
                    self._allocated(tensor.untyped_storage())
        return out

    def _allocated(self, storage: Any) -> None:
        assert self._sizes is not None
        self._sizes[storage._cdata] = storage.nbytes()
        self.held += storage.nbytes()
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self._freed, self._sizes, storage._cdata)

    def _freed(self, sizes: dict[int, int], key: int) -> None:
        freed = sizes.pop(key)
        if sizes is self._sizes:  # what outlives the count is none of the next one's business
            self.held -= freed


def count_step(
    model: nn.Module, batch: Mapping[str, Tensor], mode: CountingMode, *, autocast: torch.dtype | None = None
) -> StepMemory:
    """Run one forward and one backward of ``model`` and count what they allocate.

    Ops take the paths that they take on a CPU; memory that an op uses within itself is not seen.

    Args:
        model: transformers model on fake tensors, in training mode.
        batch: its inputs, made in ``mode``.
        mode: of the fake tensors.
        autocast: dtype of mixed precision.

    Raises:
        ConfigurationError: if the model looks at values, or does not take the batch.
    """
    own = [*tensors_of(model), *batch.values()]
    saved = SavedTensors(own)
    try:
        with mode.follow(own):
            with (
                saved,
                _one_sequence_per_row(),
                torch.autocast("cpu", autocast) if autocast is not None else nullcontext(),
            ):
                loss = loss_of(model, batch)
            activations = saved.release()
            loss.backward()  # type: ignore[no-untyped-call]
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise ConfigurationError(
            f"{type(model).__name__} computes with values, so its bytes cannot be counted from its config ({error}); "
            "set model"
        ) from error
    except (ValueError, TypeError, RuntimeError, IndexError, AttributeError) as error:
        raise ConfigurationError(
            f"{type(model).__name__} cannot be run on a batch of {[*next(iter(batch.values())).shape]} ({error}); "
            "set model, batch_size or sequence_length"
        ) from error
    gradients = storage_bytes(parameter.grad for parameter in model.parameters())
    for parameter in model.parameters():
        parameter.grad = None
    return StepMemory(activations, gradients, mode.peak)


@contextmanager
def _one_sequence_per_row() -> Iterator[None]:
    """Let transformers know without values what it reads off position_ids otherwise: no row is made of several."""
    found = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda *_, **__: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = found


def token_batch(model: nn.Module, batch_size: int, length: int) -> dict[str, Tensor]:
    """A batch of full sequences: int64 ``input_ids`` and, where the model has a loss of its own, its ``labels``.

    Raises:
        ConfigurationError: if the model does not read tokens.
    """
    config: Any = model.config
    if getattr(model, "main_input_name", None) != "input_ids":
        raise ConfigurationError(f"{type(model).__name__} does not read tokens (input_ids); set model")
    ids = torch.zeros(batch_size, length, dtype=torch.long)
    name = type(model).__name__
    if name.endswith("ForSequenceClassification"):
        config.problem_type = "single_label_classification"
        return {"input_ids": ids, "labels": torch.zeros(batch_size, dtype=torch.long)}
    if name.endswith(
        ("LMHeadModel", "ForCausalLM", "ForMaskedLM", "ForConditionalGeneration", "ForTokenClassification")
    ):
        return {"input_ids": ids, "labels": torch.zeros(batch_size, length, dtype=torch.long)}
    return {"input_ids": ids}


def loss_of(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The model's own loss; without labels, the mean of what it gives out."""
    out = model(**batch)
    if "labels" in batch:
        loss: Tensor = out.loss
        return loss
    return torch.stack([value.mean() for value in out.values() if isinstance(value, Tensor)]).sum()


def _key(tensor: Tensor) -> int:
    key: int = tensor.untyped_storage()._cdata
    return key
