"""The op for packed weights: what the op gives for the unpacked weight, which it never keeps."""

import pytest
import torch

from dynrank.kernels.lora_linear import lora_linear
from dynrank.kernels.packed_lora_linear import packed_lora_linear

M, D_IN, D_OUT, RANK = 9, 6, 5, 3


class Packed:
    """A weight that is unpacked on demand, and counts how often."""

    def __init__(self, weight):
        self.weight, self.calls = weight, 0

    def __call__(self):
        self.calls += 1
        return self.weight.clone()


def operands(dtype, needs_x=True):
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, M, D_IN), (D_OUT, D_IN), (D_OUT,), (RANK, D_IN), (D_OUT, RANK))
    x, weight, bias, lora_A, lora_B = (torch.randn(shape, generator=generator) for shape in shapes)
    x = x.to(dtype).requires_grad_(needs_x)
    return x, weight.to(dtype), bias.to(dtype), lora_A.requires_grad_(), lora_B.requires_grad_()


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_it_is_the_op_on_the_unpacked_weight(dtype, p, autocast):
    results = []
    for packed in (False, True):
        x, weight, bias, lora_A, lora_B = operands(dtype)
        function = packed_lora_linear if packed else lora_linear
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = function(x, Packed(weight) if packed else weight, bias, lora_A, lora_B, 1.5, p, torch.tensor(3))
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, lora_A, lora_B])])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("needs_x", [True, False])
def test_the_weight_is_unpacked_once_for_each_product_and_not_kept(needs_x):
    x, weight, bias, lora_A, lora_B = operands(torch.float32, needs_x)
    packed, saved = Packed(weight), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        y = packed_lora_linear(x, packed, bias, lora_A, lora_B, 1.5)
    assert packed.calls == 1
    assert not [tensor for tensor in saved if tensor.shape in (weight.shape, weight.T.shape)]
    y.sum().backward()
    assert packed.calls == (2 if needs_x else 1)


def test_second_gradients_are_refused():
    x, weight, bias, lora_A, lora_B = operands(torch.float32)
    y = packed_lora_linear(x, Packed(weight), bias, lora_A, lora_B, 1.5)
    (first,) = torch.autograd.grad(y.square().sum(), lora_A, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.square().sum().backward()


def test_a_shape_that_does_not_fit_is_refused():
    x, weight, bias, lora_A, lora_B = operands(torch.float32)
    with pytest.raises(ValueError, match=r"x must be \(..., 6\)"):
        packed_lora_linear(x[..., 1:], Packed(weight), bias, lora_A, lora_B, 1.5)
