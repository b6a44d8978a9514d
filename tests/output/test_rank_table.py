"""The table of a model's ranks says what the model has, printed and as a DataFrame."""

import pandas as pd
import peft
import pytest
import torch
from torch import nn

import dynrank
from dynrank.errors import ConfigurationError


def blocks():
    make = [nn.ModuleDict({"up": nn.Linear(6, 10), "down": nn.Linear(10, 6)}) for _ in range(3)]
    return nn.ModuleDict({"layers": nn.ModuleList(make), "head": nn.Linear(6, 4)})


@pytest.mark.parametrize("by", ["dynrank", "peft"])
def test_a_row_for_each_layer_with_its_rank_scaling_and_parameters(by):
    if by == "dynrank":
        model = dynrank.add_lora(blocks(), rank=4, alpha=8, rank_map={"head": {"rank": 2, "pinned": True}})
    else:
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["up", "down", "head"], rank_pattern={"head": 2})
        model = peft.inject_adapter_in_model(config, blocks())
    table = dynrank.ranks(model)
    frame = pd.DataFrame(table)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert table.parameters == frame["parameters"].sum() == trained
    by_kind = frame.groupby("kind")[["layer", "rank", "d_out", "d_in"]].agg(
        {"layer": "count", "rank": "max", "d_out": "max", "d_in": "max"}
    )
    assert by_kind.loc["up"].tolist() == [3, 4, 10, 6]
    assert by_kind.loc["head"].tolist() == [1, 2, 4, 6]
    assert (frame["alpha"] == frame["rank"] * frame["scaling"]).all()
    assert frame["pinned"].tolist() == [False] * 6 + [by == "dynrank"]
    assert list(frame["layer"]) == [name for name, _ in dynrank.lora_layers(model)]


def test_printed_it_has_a_line_for_each_kind_and_follows_a_change():
    model = dynrank.add_lora(blocks(), rank=4)
    dynrank.resize(model, {"layers.1.up": 1})
    lines = [
        [cell.strip() for cell in line.split("│")[1:-1]]
        for line in str(dynrank.ranks(model)).splitlines()
        if "│" in line
    ]
    assert lines == [
        ["up", "3", "1-4", "3.0", "1-4", "144"],
        ["down", "3", "4", "4.0", "4", "192"],
        ["head", "1", "4", "4.0", "4", "40"],
        ["all", "7", "1-4", "3.6", "1-4", "376"],
    ]
    assert repr(dynrank.ranks(model)) == str(dynrank.ranks(model))


def test_a_model_without_layers_is_refused():
    with pytest.raises(ConfigurationError, match="no LoRA layers; call dynrank.add_lora"):
        dynrank.ranks(torch.nn.Linear(2, 2))
