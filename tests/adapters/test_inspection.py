"""What inspect says is what the dense updates say; it draws, and takes adapters of nothing."""

import json
import re
import sys

import pytest
import torch
from torch import nn

import dynrank
from dynrank import cli, inspection
from dynrank.adapters.inspection import inspect_adapter, plot_inspection, print_inspection
from dynrank.errors import ConfigurationError


def save(folder, layers=2, rank=4, fresh=False):
    """An adapter of ``layers`` blocks with two kinds of layers each; returns the model."""
    torch.manual_seed(0)
    blocks = [nn.ModuleDict({"up": nn.Linear(6, 10), "down": nn.Linear(10, 6)}) for _ in range(layers)]
    model = dynrank.add_lora(nn.ModuleDict({"layers": nn.ModuleList(blocks)}), rank=rank, alpha=6)
    if not fresh:
        for _, layer in dynrank.lora_layers(model):
            nn.init.normal_(layer.lora_B)
    dynrank.save_adapter(model, folder)
    return model


def test_inspect_agrees_with_the_dense_updates(tmp_path):
    model = save(tmp_path)
    layers = inspect_adapter(tmp_path)
    for found, (name, layer) in zip(layers, sorted(dynrank.lora_layers(model)), strict=True):
        delta = layer.delta_weight().detach().double()
        values = torch.linalg.svdvals(delta)[:4]
        assert found.layer == name
        assert (found.shape, found.rank, found.alpha, found.scaling) == (tuple(delta.shape), 4, 6, 1.5)
        assert found.parameters == 4 * 16
        assert found.singular_values == pytest.approx(values.tolist(), rel=1e-5)
        share = values.square().cumsum(0) / values.square().sum()
        assert found.energy_rank(0.9) == 1 + int((share < 0.9).sum())
        p = values / values.sum()
        assert found.effective_rank == pytest.approx(float((-p * p.log()).sum().exp()))


def test_inspect_puts_layer_10_after_layer_2(tmp_path):
    save(tmp_path, layers=11)
    assert [layer.layer for layer in inspect_adapter(tmp_path)][::2] == [f"layers.{i}.down" for i in range(11)]


def test_inspect_prints_whole_names_and_totals(tmp_path, capsys):
    save(tmp_path)
    print_inspection(inspect_adapter(tmp_path))
    lines = [line.strip("│").split("│") for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    rows = [[cell.strip() for cell in line] for line in lines]
    assert rows[0][:5] == ["layers.0.down", "6 x 10", "4", "6", "1.5"]
    assert rows[-1][0] == "4 layers"
    assert rows[-1][-1] == f"{4 * 4 * 16}"


def test_inspect_of_a_fresh_adapter_says_zero(tmp_path, capsys):
    save(tmp_path, fresh=True)
    layers = inspect_adapter(tmp_path)
    print_inspection(layers)
    assert "4 layers" in capsys.readouterr().out
    assert {(layer.energy_rank(0.9), layer.effective_rank) for layer in layers} == {(0, 0.0)}
    plot_inspection(layers, tmp_path / "zero.png")
    assert (tmp_path / "zero.png").stat().st_size > 0


@pytest.mark.parametrize("layers", [1, 112])
def test_inspect_draws_every_layer(layers, tmp_path, monkeypatch, capsys):
    save(tmp_path / "adapter", layers=layers)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["dynrank", "inspect", "adapter", "--plot", "a.png"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 0
    assert f"{2 * layers} layers" in capsys.readouterr().out
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_inspect_without_matplotlib_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(inspection, "find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r"--plot needs matplotlib: pip install 'dynrank\[plots\]'"):
        inspection.check_plot(tmp_path / "a.png")


def test_squeeze_command_says_what_it_did(tmp_path, monkeypatch, capsys):
    save(tmp_path / "adapter")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["dynrank", "squeeze", "adapter", "--rank", "1", "--out", "small"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert re.search(r"│ down +│ +2 │ 4 → 1 │ +0\.\d{3} \(0\.\d{3}\) │ +96 │", printed)
    assert "parameters       256 → 64 (25.0%)" in printed
    assert "small" in printed
    assert json.loads((tmp_path / "small" / "adapter_config.json").read_text())["r"] == 1
