"""Triton's kernels on the CPU, by its interpreter; which has to be chosen before the kernels are imported."""

import importlib
import importlib.util

import numpy as np
import pytest


@pytest.fixture(scope="module")
def triton_interpreter():
    """The Triton backend serves CPU tensors in the module's tests, and multiplies bfloat16 as a GPU does."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        patch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # Triton warns where it is not set
        kernels = importlib.import_module("dynrank.kernels.triton_kernels")
        kind = type(kernels.shrink_kernel).__name__
        assert kind == "InterpretedFunction", "the kernels were imported before the interpreter was chosen"
        patch_bfloat16_products(patch)
        yield kernels


def patch_bfloat16_products(patch):
    """Triton 3.9's interpreter multiplies the bit patterns of bfloat16 numbers (triton issue 11584)."""
    from triton import language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    original = InterpreterBuilder.create_dot

    def wide(operand):
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        return TensorHandle((operand.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(builder, a, b, *others):
        return original(builder, wide(a), wide(b), *others)

    patch.setattr(InterpreterBuilder, "create_dot", create_dot)
