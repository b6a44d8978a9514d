"""Layers are grouped by their kind, their name without its numbers; a table of a change knows all layers."""

import io

from rich.console import Console

from dynrank.change.resize import LayerReport
from dynrank.output.ranks import change_table, layer_kinds


def test_kind_follows_the_last_number_or_is_the_whole_name():
    names = ["m.h.0.attn.q", "m.h.11.attn.q", "m.h.0.mlp", "m.head"]
    assert list(layer_kinds(names).values()) == ["attn.q", "attn.q", "mlp", "m.head"]
    assert list(layer_kinds(["encoder.0.q", "decoder.0.q"]).values()) == ["encoder.*.q", "decoder.*.q"]


def change(*names, before=8, after=4):
    return [LayerReport(name, before, after, 0.9, 0.1, (1.0,), params_per_rank=5) for name in names]


def cells(table):
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(table)
    lines = [line.split("│")[1:-1] for line in console.export_text().splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line] for line in lines]


def test_table_counts_unchanged_layers_and_the_slot_holds_them():
    ranks = {"h.0.q": 4, "h.1.q": 8, "head": 4, "pooler": 13}
    table = change_table("change", change("h.0.q", "head"), ranks)
    assert [row[:2] for row in cells(table)] == [["q", "1 of 2"], ["head", "1"], ["all", "2 of 4"]]
    assert table.caption == (
        "highest rank 13, average 7.2: a server's slot has 16 in every layer, because of 1 of 4 layers: pooler (13)"
    )


def test_names_of_kinds_stay_in_one_line_of_a_narrow_terminal():
    names = [f"bert.encoder.layer.{block}.attention.output.dense" for block in range(2)] + ["bert.pooler.dense"]
    console = Console(width=70, record=True, file=io.StringIO())
    console.print(change_table("change", change(*names), dict.fromkeys(names, 4)))
    assert "attention.output.dense" in console.export_text()
