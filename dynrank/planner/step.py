"""The bytes of one training step of a model, counted by running it on tensors without values.

torch.distributed._tools.mem_tracker cannot be used: it hooks the gradient of every parameter and fails on frozen ones
(torch 2.13).
"""

import sys
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import masking_utils
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from dynrank.errors import ConfigurationError
from dynrank.layers.experts import expert_stacks, experts_forward
from dynrank.layers.quantized import is_quantized
from dynrank.models.pretrained import storage_bytes, storage_key, tensors_of
from dynrank.private import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode, tree_leaves

# The name in transformers' registry of experts_forward, which can run without values.
_COUNTED_EXPERTS = "dynrank"

_WITH_LOSS = ("LMHeadModel", "ForCausalLM", "ForMaskedLM", "ForConditionalGeneration", "ForTokenClassification")


class CountingMode(FakeTensorMode):
    """A mode with CPU tensors without values that counts the bytes that ops allocate.

    Real tensors are allowed, too (tables of an 8-bit format).

    Attributes:
        held: bytes that ops have allocated since :meth:`follow` and not freed yet.
        peak: the largest value of ``held`` so far.
    """

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)  # type: ignore[no-untyped-call]
        self.held = self.peak = 0
        # The bytes of each known storage by its key; None outside of follow().
        self._sizes: dict[int, int] | None = None
        self._within_op = False

    @contextmanager
    def follow(self, own: Iterable[Tensor]) -> Iterator[None]:
        """Enter the mode and count from 0; storages of ``own`` do not count, and must exist until the block ends."""
        self._sizes = {storage_key(tensor): 0 for tensor in own}
        self.held = 0
        self.peak = 0
        try:
            with self:
                yield
        finally:
            self._sizes = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # This op allocates nothing, and FakeTensorMode would decompose it at each call.
        if func is torch.ops.aten.addmm.out:
            return (kwargs or {})["out"]
        outermost = not self._within_op
        self._within_op = True
        try:
            out = super().__torch_dispatch__(func, types, args, kwargs or {})
        finally:
            self._within_op = not outermost
        # Count only results of outermost ops: inner ops run only when their shapes are not in FakeTensorMode's cache.
        if self._sizes is not None and outermost:
            for tensor in tree_leaves(out):
                if isinstance(tensor, Tensor) and storage_key(tensor) not in self._sizes:
                    self._allocated(self._sizes, tensor.untyped_storage())
        return out

    def _allocated(self, sizes: dict[int, int], storage: Any) -> None:
        sizes[storage._cdata] = storage.nbytes()
        self.held += storage.nbytes()
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self._freed, sizes, storage._cdata)

    def _freed(self, sizes: dict[int, int], key: int) -> None:
        freed = sizes.pop(key)
        # A storage of an earlier block must not change the current count.
        if sizes is self._sizes:
            self.held -= freed


def without_values(model: nn.Module, mode: FakeTensorMode) -> None:
    """Replace all parameters and buffers, in place, by fake CPU tensors of the same shapes and dtypes.

    bitsandbytes itself packs the weights of its layers. Tied parameters stay tied. Experts get an implementation of
    their forward that does not count the tokens of each expert.
    """
    # bitsandbytes must make its tables before the mode begins, because in the mode they would have no values.
    if any(is_quantized(module) for module in model.modules()):
        functional: Any = sys.modules["bitsandbytes.functional"]
        functional.quantize_blockwise(torch.zeros(1))
    # {id: (old, new)}. The old tensors are kept so that Python does not reuse their ids.
    known: dict[int, tuple[Tensor, Tensor]] = {}
    ALL_EXPERTS_FUNCTIONS.register(_COUNTED_EXPERTS, experts_forward)
    with mode:
        for module in model.modules():
            if expert_stacks(module):
                experts: Any = module
                experts.config._experts_implementation = _COUNTED_EXPERTS
            if is_quantized(module):
                weight: Any = module.weight
                known[id(weight)] = (weight, _packed(module))
            for tensors in (module._parameters, module._buffers):
                replaced: Any = tensors
                for name, tensor in replaced.items():
                    if tensor is None:
                        continue
                    if id(tensor) not in known:
                        fake: Tensor = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
                        if isinstance(tensor, nn.Parameter):
                            fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
                        known[id(tensor)] = (tensor, fake)
                    replaced[name] = known[id(tensor)][1]


def _packed(module: Any) -> nn.Parameter:
    """A frozen weight for a layer of bitsandbytes, packed by the functions of bitsandbytes."""
    functional: Any = sys.modules["bitsandbytes.functional"]
    weight: Any = module.weight
    if hasattr(weight, "quant_type"):
        names = ("blocksize", "compress_statistics", "quant_type", "quant_storage")
        options = {name: getattr(weight, name) for name in names}
        data, state = functional.quantize_4bit(torch.empty(weight.shape, dtype=module.compute_dtype), **options)
        packed: Any = nn.Parameter(data, requires_grad=False)
        packed.quant_state = module.quant_state = state
    else:
        rows, scales, _ = functional.int8_vectorwise_quant(torch.empty(weight.shape, dtype=torch.float16))
        packed = nn.Parameter(rows, requires_grad=False)
        packed.CB = rows
        packed.SCB = scales
    return packed  # type: ignore[no-any-return]


def count_step(
    model: nn.Module, batch: Mapping[str, Tensor], mode: CountingMode, autocast: torch.dtype | None
) -> tuple[int, int, int]:
    """Run one forward and one backward of ``model`` and count the bytes that they allocate.

    Returns the bytes that the forward has saved for the backward (a shared storage counts once), the bytes of the
    parameters' gradients, and the largest number of bytes at any time, gradients included.

    Ops behave as on a CPU. Memory that an op allocates and frees inside is not counted. ``model``, in training mode,
    and ``batch`` have fake tensors of ``mode``. ``autocast`` is the dtype of mixed precision, None for none.
    """
    own = [*tensors_of(model), *batch.values()]
    own_keys = {storage_key(tensor) for tensor in own}
    saved: dict[int, Any] = {}

    def save(tensor: Tensor) -> Tensor:
        if storage_key(tensor) not in own_keys:
            saved[storage_key(tensor)] = tensor.untyped_storage()
        return tensor

    # transformers would read from the values of position_ids whether a row holds several sequences.
    one_sequence = patch.object(masking_utils, "find_packed_sequence_indices", return_value=None)
    precision = torch.autocast("cpu", autocast) if autocast is not None else nullcontext()
    try:
        with mode.follow(own):
            with saved_tensors_hooks(save, lambda tensor: tensor), one_sequence, precision:
                loss = _loss_of(model, batch)
            activations = sum(storage.nbytes() for storage in saved.values())
            saved.clear()
            loss.backward()  # type: ignore[no-untyped-call]
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise ConfigurationError(
            f"{type(model).__name__} needs tensors' values, so its bytes cannot be counted from its config ({error}); "
            "set base or task.model"
        ) from error
    except (ValueError, TypeError, RuntimeError, IndexError, AttributeError) as error:
        raise ConfigurationError(
            f"{type(model).__name__} cannot be run on a batch of {[*next(iter(batch.values())).shape]} ({error}); "
            "set base, batch_size or sequence_length"
        ) from error
    gradients = storage_bytes(parameter.grad for parameter in model.parameters())
    model.zero_grad(set_to_none=True)
    return activations, gradients, mode.peak


def token_batch(model: nn.Module, batch_size: int, length: int) -> dict[str, Tensor]:
    """A batch of full sequences: int64 ``input_ids`` and, if the model computes a loss, ``labels``."""
    name = type(model).__name__
    config = model.config
    if getattr(model, "main_input_name", None) != "input_ids":
        raise ConfigurationError(f"{name} does not read tokens (input_ids); set base or task.model")
    batch = {"input_ids": torch.zeros(batch_size, length, dtype=torch.long)}
    if name.endswith("ForSequenceClassification"):
        config.problem_type = "single_label_classification"  # type: ignore[union-attr]
        batch["labels"] = torch.zeros(batch_size, dtype=torch.long)
    elif name.endswith(_WITH_LOSS):
        batch["labels"] = torch.zeros(batch_size, length, dtype=torch.long)
    return batch


def _loss_of(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The model's own loss; without labels, the sum of its outputs' means."""
    out = model(**batch)
    if "labels" in batch:
        loss: Tensor = out.loss
        return loss
    return torch.stack([value.mean() for value in out.values() if isinstance(value, Tensor)]).sum()
