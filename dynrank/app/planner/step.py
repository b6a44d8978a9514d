"""The bytes of a training step, counted by running its forward on tensors without values."""

import sys
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call
from transformers import masking_utils

from dynrank.errors import ConfigurationError
from dynrank.layers.quantized import is_quantized


def count_step(model: nn.Module, rows: int, length: int, autocast: torch.dtype | None) -> dict[str, int]:
    """{part: bytes} of a step of ``model``, see :class:`dynrank.app.planner.plan.Need`.

    ``model`` is in training mode, on the meta device, and stays as it is. Ops behave as on a CPU, and bitsandbytes
    itself packs the weights of its layers. The batch has ``rows`` full sequences; ``autocast`` is the dtype of mixed
    precision, None for none.
    """
    # bitsandbytes must make its tables before the mode begins, because in the mode they would have no values.
    if any(is_quantized(module) for module in model.modules()):
        _functional().quantize_blockwise(torch.zeros(1))
    with FakeTensorMode(allow_non_fake_inputs=True):
        values = {
            name: torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]
        }
        trained = [values[name].requires_grad_() for name, factor in model.named_parameters() if factor.requires_grad]
        tables: list[Tensor] = []
        for name, module in model.named_modules():
            if is_quantized(module):
                values[f"{name}.weight"], of_weight = _packed(module)
                tables += of_weight
        held = [*values.values(), *tables]
        batch = _token_batch(model, rows, length)
        # The storages are kept, so that no other one gets the key of one that is gone.
        saved: dict[int, Any] = {}

        def save(tensor: Tensor) -> Tensor:
            saved[id(tensor.untyped_storage())] = tensor.untyped_storage()
            return tensor

        # transformers would read from the values of position_ids whether a row holds several sequences.
        one_sequence = patch.object(masking_utils, "find_packed_sequence_indices", return_value=None)
        # Nor can the rows of each expert be counted, and one matrix allocates as much as several.
        one_expert = patch.object(F, "grouped_mm", lambda x_SI, w_EIO, offs: x_SI @ w_EIO[0])
        precision = torch.autocast("cpu", autocast) if autocast is not None else nullcontext()
        try:
            with saved_tensors_hooks(save, lambda tensor: tensor), one_sequence, one_expert, precision:
                logits = functional_call(model, values, kwargs=batch).get("logits")
        except RuntimeError as error:
            raise ConfigurationError(
                f"{type(model).__name__} cannot be run on a batch of {rows} x {length} without values: {error}; "
                "set task.model, task.batch_size or task.max_length"
            ) from error
        for tensor in [*held, *batch.values()]:
            saved.pop(id(tensor.untyped_storage()), None)
    adapter = storage_bytes(trained)
    return {
        "weights": storage_bytes(held) - adapter,
        "adapter": adapter,
        "activations": sum(storage.nbytes() for storage in saved.values()),
        "gradients": adapter,
        "logits": 0 if logits is None else 8 * logits.numel(),
    }


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """The bytes of the storages of ``tensors``; a shared storage counts once."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({id(storage): storage.nbytes() for storage in storages}.values())


def _functional() -> Any:
    return sys.modules["bitsandbytes.functional"]


def _packed(module: Any) -> tuple[Tensor, list[Tensor]]:
    """The weight of a layer of bitsandbytes as its forward reads it, and the scales and tables beside it."""
    weight = module.weight
    if hasattr(weight, "quant_type"):
        names = ("blocksize", "compress_statistics", "quant_type", "quant_storage")
        options = {name: getattr(weight, name) for name in names}
        unpacked = torch.empty(weight.shape, dtype=module.compute_dtype)
        packed, state = _functional().quantize_4bit(unpacked, **options)
        packed.quant_state = state
        return packed, [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    packed, scales, _ = _functional().int8_vectorwise_quant(torch.empty(weight.shape, dtype=torch.float16))
    packed.CB = packed
    packed.SCB = scales
    return packed, [scales]


def _token_batch(model: Any, rows: int, length: int) -> dict[str, Tensor]:
    """A batch of full sequences: int64 ``input_ids``, and ``labels`` for a classifier or a causal language model."""
    batch = {"input_ids": torch.zeros(rows, length, dtype=torch.long)}
    name = type(model).__name__
    if name.endswith("ForSequenceClassification"):
        model.config.problem_type = "single_label_classification"
        batch["labels"] = torch.zeros(rows, dtype=torch.long)
    elif name.endswith(("ForCausalLM", "LMHeadModel")):
        batch["labels"] = torch.zeros(rows, length, dtype=torch.long)
    return batch
