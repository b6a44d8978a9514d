"""The table of a change of rank groups layers by their place in a block."""

from dynrank.change.resize import LayerReport
from dynrank.output.change_table import group_layers


def report(name):
    return LayerReport(name, 8, 4, 0.9, 0.1, (1.0,), 10)


def test_layers_are_grouped_by_their_name_without_numbers():
    names = ["m.h.0.attn.q", "m.h.11.attn.q", "m.h.0.mlp", "m.head"]
    groups = group_layers(report(name) for name in names)
    assert {name: len(layers) for name, layers in groups.items()} == {"attn.q": 2, "mlp": 1, "m.head": 1}


def test_groups_keep_their_full_names_where_the_short_ones_collide():
    groups = group_layers(report(name) for name in ["encoder.0.q", "decoder.0.q"])
    assert set(groups) == {"encoder.*.q", "decoder.*.q"}
