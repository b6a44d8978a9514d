"""Layers are grouped by their kind: their name without its numbers."""

import io

from rich.console import Console

from dynrank.change.resize import LayerReport
from dynrank.output.change_table import change_table, layer_kinds


def test_kind_is_what_follows_the_last_number_or_the_whole_name_where_that_would_collide():
    names = ["m.h.0.attn.q", "m.h.11.attn.q", "m.h.0.mlp", "m.head"]
    assert list(layer_kinds(names).values()) == ["attn.q", "attn.q", "mlp", "m.head"]
    assert list(layer_kinds(["encoder.0.q", "decoder.0.q"]).values()) == ["encoder.*.q", "decoder.*.q"]


def test_table_has_a_line_for_each_kind_and_one_for_all():
    layers = [LayerReport(name, 8, 4, 0.9, 0.1, (1.0,), params_per_rank=5) for name in ("h.0.q", "h.1.q", "head")]
    assert change_table("change", layers).caption is None
    wide = [*layers, LayerReport("pooler", 16, 13, 0.9, 0.1, (1.0,), params_per_rank=5)]
    assert change_table("change", wide).caption == (
        "highest rank 13, average 6.2: a server's slot has 16 in every layer, because of 1 of 4 layers: pooler (13)"
    )
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(change_table("change", layers))
    lines = [line.split("│")[1:-1] for line in console.export_text().splitlines() if line.startswith("│")]
    assert [[cell.strip() for cell in line] for line in lines] == [
        ["q", "2", "8 → 4", "0.900 (0.900)", "40"],
        ["head", "1", "8 → 4", "0.900 (0.900)", "20"],
        ["all", "3", "8 → 4", "0.900 (0.900)", "60"],
    ]
