"""What inspect says is what the dense updates say; it draws, and takes adapters of nothing."""

import pytest
import torch
from torch import nn

import dynrank


def save(folder, layers=2, fresh=False):
    """An adapter of ``layers`` blocks with two kinds of layers each; returns the model."""
    torch.manual_seed(0)
    blocks = [nn.ModuleDict({"up": nn.Linear(6, 10), "down": nn.Linear(10, 6)}) for _ in range(layers)]
    model = dynrank.add_lora(nn.ModuleDict({"layers": nn.ModuleList(blocks)}), rank=4, alpha=6)
    for _, layer in dynrank.lora_layers(model):
        nn.init.normal_(layer.lora_B, std=0 if fresh else 1)
    dynrank.save_adapter(model, folder)
    return model


def test_inspect_agrees_with_the_dense_updates(tmp_path):
    layers = dict(dynrank.lora_layers(save(tmp_path, layers=11)))
    found = dynrank.inspect(tmp_path)
    assert [layer.layer for layer in found] == [f"layers.{i}.{kind}" for i in range(11) for kind in ("down", "up")]
    for spectrum in found:
        delta = layers[spectrum.layer].delta_weight().detach().double()
        values = torch.linalg.svdvals(delta)[:4]
        assert (spectrum.shape, spectrum.rank, spectrum.alpha, spectrum.scaling) == (tuple(delta.shape), 4, 6, 1.5)
        assert spectrum.parameters == 4 * 16
        assert spectrum.singular_values == pytest.approx(values.tolist(), rel=1e-5)
        share = values.square().cumsum(0) / values.square().sum()
        assert spectrum.energy_rank(0.9) == 1 + int((share < 0.9).sum())
        p = values / values.sum()
        assert spectrum.effective_rank == pytest.approx(float((-p * p.log()).sum().exp()))


@pytest.mark.parametrize("layers", [1, 56])
def test_command_prints_a_line_for_each_layer_and_draws_all(layers, launch, tmp_path):
    save(tmp_path, layers)
    code, printed, _ = launch("inspect", tmp_path, "--plot", tmp_path / "a.png")
    assert code == 0
    lines = [line.strip("│").split("│") for line in printed.splitlines() if line.startswith("│")]
    rows = [[cell.strip() for cell in line] for line in lines]
    assert rows[0][:5] == ["layers.0.down", "6 x 10", "4", "6", "1.5"]
    assert (rows[-1][0], rows[-1][2]) == (f"{2 * layers} layers", "4.0 (mean)")
    assert rows[-1][-1] == f"{2 * layers * 4 * 16:,}"
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_commands_take_the_folder_of_a_run_for_its_adapter(launch, tmp_path):
    save(tmp_path / "run" / "adapter")
    assert launch("inspect", tmp_path / "run") == launch("inspect", tmp_path / "run" / "adapter")
    assert launch("squeeze", tmp_path / "run", "--rank", 1, "--out", tmp_path / "small")[0] == 0


def test_command_says_zero_of_a_fresh_adapter(launch, tmp_path):
    save(tmp_path, fresh=True)
    assert {(layer.energy_rank(0.9), layer.effective_rank) for layer in dynrank.inspect(tmp_path)} == {(0, 0.0)}
    assert launch("inspect", tmp_path, "--plot", tmp_path / "zero.png")[0] == 0
    assert (tmp_path / "zero.png").stat().st_size > 0
