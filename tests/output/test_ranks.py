"""The tables of ranks say what the model has, printed and as a DataFrame; a table of a change knows all layers."""

import io
import re
from dataclasses import replace

import pandas as pd
import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from torch import nn

import dynrank
from dynrank.change.reports import LayerReport
from dynrank.errors import ConfigurationError
from dynrank.output.ranks import change_table
from dynrank.output.slots import SLOTS, slot_line
from dynrank.targets import Budget, LayerState


def change(*names, before=8, after=4):
    return [LayerReport(name, before, after, 0.9, 0.1, (1.0,), params_per_rank=5) for name in names]


def printed(table, width):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


def cells(text):
    lines = [line.split("│")[1:-1] for line in text.splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line] for line in lines]


def test_table_counts_unchanged_layers_and_the_slot_holds_them():
    ranks = {"h.0.q": 4, "h.1.q": 8, "head": 4, "pooler": 13}
    table = change_table("change", change("h.0.q", "head"), ranks)
    assert [row[:2] for row in cells(printed(table, 120))] == [["q", "1 of 2"], ["head", "1"], ["all", "2 of 4"]]
    assert table.caption == (
        "highest rank 13, average 7.2: a server's slot has 16 in every layer; "
        "without 1 of 4 layers it has 8: pooler (13)"
    )


def test_importance_has_a_column_in_shares_to_which_the_ranks_of_a_pool_are_in_proportion():
    """Ranks and shares are those of the budget's rule: importance, at least 0, plus its error."""
    measured = {"h.0.q": (0.2, 0.1), "h.1.q": (0.05, 0.05), "h.0.k": (-0.3, 0.1), "h.1.k": (0.4, 0.1)}
    scores = {name: max(value, 0) + error for name, (value, error) in measured.items()}
    states = {name: LayerState(16, 5, 5, importance=score) for name, score in scores.items()}
    ranks = Budget(final_rank=5).ranks(states)
    reports = [
        replace(report, rank_after=ranks[report.layer], importance=value, importance_error=error)
        for report, (value, error) in zip(change(*measured, before=16), measured.values(), strict=True)
    ]
    table = change_table("change", reports, ranks)
    headings = [str(column.header) for column in table.columns]
    assert headings == ["layers", "count", "rank", "importance", "energy kept (min)", "params saved"]
    found = {row[0]: dict(zip(headings, row, strict=True)) for row in cells(printed(table, 120))}
    assert {name: row["rank"] for name, row in found.items()} == {"q": "16 → 2-6", "k": "16 → 2-10", "all": "16 → 2-10"}
    assert [found[name]["importance"] for name in ("q", "k", "all")] == ["10.0-30.0%", "10.0-50.0%", "10.0-50.0%"]
    assert table.caption.startswith("importance: ")
    assert table.caption.count("\n") == 1


def test_an_undone_change_has_saved_nothing_and_says_nothing_of_slots():
    reports = change("h.0.q", "head")
    table = change_table("change", reports, {"h.0.q": 8, "head": 4}, undone=True)
    assert [column.header for column in table.columns] == ["layers", "count", "rank tried", "energy kept (min)"]
    assert table.caption is None


def slot_by_hand(ranks):
    return min(slot for slot in SLOTS if slot >= max(ranks))


@given(st.lists(st.integers(1, 70), min_size=1, max_size=9))
def test_what_the_highest_layers_cost_is_true_of_the_layers_without_them(ranks):
    line = slot_line({f"layer{i}": rank for i, rank in enumerate(ranks)})
    assert f"highest rank {max(ranks)}, " in line
    assert f"slot has {slot_by_hand(ranks)} in every layer" in line
    said = re.search(r"without (\d+) of (\d+) layers it has (\d+)", line)
    if said:
        dropped, of, slot = map(int, said.groups())
        rest = sorted(ranks)[: len(ranks) - dropped]
        assert (of, slot) == (len(ranks), slot_by_hand(rest))
        assert slot < slot_by_hand(ranks)
        assert dropped <= len(ranks) / 2
        names = re.findall(r"layer(\d+) \((\d+)\)", line)
        assert len(names) == (dropped if dropped <= 5 else 0)
        assert all(ranks[int(number)] == int(rank) > max(rest) for number, rank in names)


def test_names_of_kinds_stay_in_one_line_of_a_narrow_terminal():
    names = [f"bert.encoder.layer.{block}.attention.output.dense" for block in range(2)] + ["bert.pooler.dense"]
    table = change_table("change", change(*names), dict.fromkeys(names, 4))
    assert "attention.output.dense" in printed(table, 70)


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
    of_block = [("up", 10, 6, 4, 8, 2, False), ("down", 6, 10, 4, 8, 2, False)]
    expected = [(f"layers.{i}.{kind}", kind, *values) for i in range(3) for kind, *values in of_block]
    # A rule of dynrank keeps the scaling of the others, and a pattern of PEFT the alpha.
    own = (4, 2) if by == "dynrank" else (8, 4)
    expected.append(("head", "head", 4, 6, 2, *own, by == "dynrank"))
    columns = ["layer", "kind", "d_out", "d_in", "rank", "alpha", "scaling", "pinned"]
    assert [*frame[columns].itertuples(index=False, name=None)] == expected


def test_printed_it_has_a_line_for_each_kind_and_follows_a_change():
    model = dynrank.add_lora(blocks(), rank=4, alpha=4)
    dynrank.resize(model, {"layers.1.up": 1}, optimizers=())
    assert cells(str(dynrank.ranks(model))) == [
        ["up", "3", "1-4", "3.0", "1-4", "144"],
        ["down", "3", "4", "4.0", "4", "192"],
        ["head", "1", "4", "4.0", "4", "40"],
        ["all", "7", "1-4", "3.6", "1-4", "376"],
    ]
    assert repr(dynrank.ranks(model)) == str(dynrank.ranks(model))


def test_a_model_without_layers_is_refused():
    with pytest.raises(ConfigurationError, match="no LoRA layers; call dynrank.add_lora"):
        dynrank.ranks(torch.nn.Linear(2, 2))
