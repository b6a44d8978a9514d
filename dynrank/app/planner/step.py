"""The bytes that the forward of a training step saves, counted by running it on tensors without values."""

import sys
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.autograd.graph import saved_tensors_hooks
from transformers import masking_utils
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from dynrank.app.models.pretrained import storage_key, tensors_of
from dynrank.errors import ConfigurationError
from dynrank.layers.experts import expert_stacks, experts_forward
from dynrank.layers.finding import own_tensors
from dynrank.layers.quantized import is_quantized

# The name in transformers' registry of experts_forward, which can run without values.
_COUNTED_EXPERTS = "dynrank"


def without_values(model: nn.Module) -> FakeTensorMode:
    """Replace all parameters and buffers, in place, by fake CPU tensors of the same shapes and dtypes.

    Returns the mode in which the model runs. bitsandbytes itself packs the weights of its layers. Tied parameters stay
    tied. Experts get an implementation of their forward that does not count the tokens of each expert.
    """
    # bitsandbytes must make its tables before the mode begins, because in the mode they would have no values.
    if any(is_quantized(module) for module in model.modules()):
        functional: Any = sys.modules["bitsandbytes.functional"]
        functional.quantize_blockwise(torch.zeros(1))
    # {id: (old, new)}. The old tensors are kept so that Python does not reuse their ids.
    known: dict[int, tuple[Tensor, Tensor]] = {}
    ALL_EXPERTS_FUNCTIONS.register(_COUNTED_EXPERTS, experts_forward)
    # bitsandbytes has tables with values.
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        for module in model.modules():
            if expert_stacks(module):
                experts: Any = module
                experts.config._experts_implementation = _COUNTED_EXPERTS
            if is_quantized(module):
                weight: Any = module.weight
                known[id(weight)] = (weight, _packed(module))
            for name, tensor in own_tensors(module):
                if id(tensor) not in known:
                    fake: Tensor = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
                    if isinstance(tensor, nn.Parameter):
                        fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
                    known[id(tensor)] = (tensor, fake)
                setattr(module, name, known[id(tensor)][1])
    return mode


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


def count_forward(model: nn.Module, batch: Mapping[str, Tensor], autocast: torch.dtype | None) -> tuple[int, int]:
    """Run the forward of ``model``; (bytes that it saves for the backward, number of logits).

    A storage that several tensors share counts once. Ops behave as on a CPU. ``model``, in training mode, and ``batch``
    have fake tensors of the present mode. ``autocast`` is the dtype of mixed precision, None for none.
    """
    own = {storage_key(tensor) for tensor in [*tensors_of(model), *batch.values()]}
    # The storages are kept, so that no other one gets the key of one that is gone.
    saved: dict[int, Any] = {}

    def save(tensor: Tensor) -> Tensor:
        if storage_key(tensor) not in own:
            saved[storage_key(tensor)] = tensor.untyped_storage()
        return tensor

    # transformers would read from the values of position_ids whether a row holds several sequences.
    one_sequence = patch.object(masking_utils, "find_packed_sequence_indices", return_value=None)
    # Nor can the rows of each expert be counted, and one matrix allocates as much as several.
    one_expert = patch("dynrank.layers.experts.grouped_product", lambda x_SI, w_EIO, ends: x_SI @ w_EIO[0])
    precision = torch.autocast("cpu", autocast) if autocast is not None else nullcontext()
    try:
        with saved_tensors_hooks(save, lambda tensor: tensor), one_sequence, one_expert, precision:
            logits = model(**batch).get("logits")
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise ConfigurationError(
            f"{type(model).__name__} needs tensors' values, so its bytes cannot be counted from its config ({error}); "
            "set task.model"
        ) from error
    except (ValueError, TypeError, RuntimeError, IndexError, AttributeError) as error:
        raise ConfigurationError(
            f"{type(model).__name__} cannot be run on a batch of {[*next(iter(batch.values())).shape]} ({error}); "
            "set task.model, task.batch_size or task.max_length"
        ) from error
    return sum(storage.nbytes() for storage in saved.values()), 0 if logits is None else logits.numel()


def token_batch(model: nn.Module, batch_size: int, length: int) -> dict[str, Tensor]:
    """A batch of full sequences: int64 ``input_ids``, and ``labels`` for a classifier or a causal language model."""
    name = type(model).__name__
    config = model.config
    batch = {"input_ids": torch.zeros(batch_size, length, dtype=torch.long)}
    if name.endswith("ForSequenceClassification"):
        config.problem_type = "single_label_classification"  # type: ignore[union-attr]
        batch["labels"] = torch.zeros(batch_size, dtype=torch.long)
    elif name.endswith(("ForCausalLM", "LMHeadModel")):
        batch["labels"] = torch.zeros(batch_size, length, dtype=torch.long)
    return batch
