"""The formula of the op, and Triton's kernels on the CPU, by its interpreter."""

import importlib
import importlib.util

import numpy as np
import pytest
import torch


@pytest.fixture(scope="session")
def formula():
    """The op, one torch operation after the other; ``keep`` is what dropout multiplies x by."""

    def formula(x, weight, bias, lora_A, lora_B, scaling, keep=1.0):
        y = x @ weight.mT if bias is None else x @ weight.mT + bias
        return y + scaling * ((x * keep) @ lora_A.mT @ lora_B.mT)

    return formula


@pytest.fixture(scope="module")
def triton_interpreter():
    """The kernels. The backend serves CPU tensors in the module's tests, and computes with bfloat16 as a GPU does.

    The interpreter has to be chosen before the kernels are imported.
    """
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        # Triton warns where this variable is not set.
        patch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
        kernels = importlib.import_module("dynrank.kernels.triton_kernels")
        kind = type(kernels.shrink_kernel).__name__
        assert kind == "InterpretedFunction", "the kernels were imported before the interpreter was chosen"
        patch_bfloat16(patch)
        yield kernels


def patch_bfloat16(patch):
    """Triton 3.9's interpreter multiplies the bit patterns of bfloat16 numbers, and cuts where a GPU rounds to nearest.

    The product is triton issue 11584.
    """
    from triton import language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    interpreters_dot = InterpreterBuilder.create_dot
    interpreters_cast = InterpreterBuilder.cast_impl

    def wide(operand):
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        return TensorHandle((operand.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(builder, a, b, *others):
        return interpreters_dot(builder, wide(a), wide(b), *others)

    def cast_impl(builder, source, target):
        if (source.dtype.scalar, target.scalar) != (tl.float32, tl.bfloat16):
            return interpreters_cast(builder, source, target)
        rounded = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16()
        return TensorHandle(rounded.view(torch.int16).numpy().view(np.uint16), tl.bfloat16)

    patch.setattr(InterpreterBuilder, "create_dot", create_dot)
    patch.setattr(InterpreterBuilder, "cast_impl", cast_impl)
