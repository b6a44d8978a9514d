"""Gates where one of two processes has nothing to show, in the dtype of the model."""

from contextlib import closing
from pathlib import Path

import forked
import torch
from torch import nn
from torch.testing import assert_close

import dynrank
from dynrank.change.gates import Gates

TWO = """
import sys
import torch
sys.path.insert(0, sys.argv[1])
from test_gates import watched

torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
for dtype in (torch.float32, torch.float64):
    torch.save(watched(dtype, rank == 0)._gradients(), f"{sys.argv[2]}/{rank}.{dtype}.pt")
"""


def watched(dtype, has_examples):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    net = dynrank.add_lora(net, rank=3, target_modules=["0", "2"], dtype=dtype).to(dtype)
    for _, layer in dynrank.lora_layers(net):
        nn.init.normal_(layer.lora_B)
    with closing(Gates(net, dict(dynrank.lora_layers(net)), 1)) as gates:
        if has_examples:
            net(torch.randn(5, 6, dtype=dtype)).square().mean(1).mean().backward()
        gates.end_step()
    return gates


def test_a_process_without_examples_adds_nothing_in_any_dtype(tmp_path):
    started = forked.pair(TWO, Path(__file__).parent, tmp_path, cwd=tmp_path)
    assert forked.end(started) == [0, 0], forked.printed(tmp_path)
    for dtype in (torch.float32, torch.float64):
        first, second = (torch.load(tmp_path / f"{rank}.{dtype}.pt") for rank in "01")
        expected = watched(dtype, True)._gradients()
        for name, gradient in expected[0].items():
            assert torch.equal(first[0][name], second[0][name])
            # Gradients are means over processes.
            assert_close(first[0][name], gradient / 2)
            assert_close(first[1][name], expected[1][name] / 2)
