"""What a reader needs of a picture can be seen in it."""

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

import dynrank
from dynrank import plot
from dynrank.errors import ConfigurationError

KINDS = [f"self_attn.{kind}_proj" for kind in "qkvo"] + [f"mlp.{kind}_proj" for kind in ("gate", "up", "down")]


def drawn(figure):
    FigureCanvasAgg(figure).draw()
    return figure


def written(axes):
    """{(row's name, column's name): text} of the cells of a table."""
    rows, columns = ([tick.get_text() for tick in ticks] for ticks in (axes.get_yticklabels(), axes.get_xticklabels()))
    return {(rows[text.get_position()[1]], columns[text.get_position()[0]]): text.get_text() for text in axes.texts}


def test_ranks_stand_in_a_table_of_blocks_and_kinds_others_below():
    names = [f"bert.encoder.layer.{block}.attention.self.{kind}" for block in (0, 1, 10) for kind in ("query", "key")]
    ranks = {name: [32, 4 + number] for number, name in enumerate(names)} | {"bert.pooler.dense": [16]}
    ranks[names[0]] = [32]
    blocks, others = plot.ranks(ranks).axes
    found = written(blocks)
    rows = ("block 0", "block 1", "block 10")
    assert list(found) == [(row, f"attention.self.{kind}") for row in rows for kind in ("query", "key")]
    assert list(found.values()) == ["32", "32→5", "32→6", "32→7", "32→8", "32→9"]
    assert written(others) == {("bert.pooler.dense", ""): "16"}


@pytest.mark.parametrize("most", [9, 1024])
def test_thirty_blocks_fit_in_one_picture_whose_texts_stay_in_their_cells(most):
    ranks = {f"model.layers.{block}.{kind}": [most, most - block % 8] for block in range(30) for kind in KINDS}
    figure = drawn(plot.ranks(ranks))
    assert figure.bbox.height < 2000
    (axes,) = figure.axes
    cell = axes.get_window_extent().width / len(KINDS)
    assert max(text.get_window_extent().width for text in axes.texts) < cell
    for text in axes.get_xticklabels():
        assert text.get_window_extent().x1 <= figure.bbox.width


def test_layers_without_blocks_are_a_list():
    (axes,) = drawn(plot.ranks({"0": [8], "2": [8, 6, 4]})).axes
    assert written(axes) == {("0", ""): "8", ("2", ""): "8→4"}


def test_median_of_a_single_direction_is_a_visible_point():
    figure = plot.spectra({"h.0.q": [2.0, 1.0], "h.1.q": [3.0, 1.0], "pooler": [0.7]}, "at the end")
    markers = {line.get_label(): line.get_marker() for line in figure.axes[0].lines}
    assert (markers["pooler (1)"], markers["q (2)"]) == ("o", "None")


def test_loss_picture_has_a_line_of_the_rate_beside_the_legend():
    steps = [0, 1, 2]
    rates = [1.0, 0.5, 0.25]
    figure = drawn(plot.loss({"train/loss": (steps, [3.0, 2.0, 1.0]), "lr/head": (steps, rates)}, {}))
    axes, beside = figure.axes
    (line,) = beside.lines
    assert [*line.get_ydata()] == rates
    assert line.get_linewidth() < 1
    (legend,) = figure.legends
    assert "rate of head" in [text.get_text() for text in legend.get_texts()]
    assert not legend.get_window_extent().overlaps(axes.get_window_extent())


def test_a_long_run_is_drawn_in_fewer_points_than_it_has_steps():
    axes, _ = plot.loss({name: ([*range(10_000)], [1.0] * 10_000) for name in ("train/loss", "lr/head")}).axes
    assert {len(line.get_xdata()) for line in axes.lines if len(line.get_xdata())} == {3334}


def test_a_notebook_shows_a_picture_without_pyplot():
    picture = plot.ranks({"layers.0.up": [4, 2]})
    assert picture._repr_png_().startswith(b"\x89PNG")


def test_a_model_and_its_stored_adapter_have_the_same_pictures(tmp_path):
    torch.manual_seed(0)
    blocks = torch.nn.ModuleList(torch.nn.ModuleDict({"up": torch.nn.Linear(6, 10)}) for _ in range(3))
    model = dynrank.add_lora(torch.nn.ModuleDict({"layers": blocks}), rank=4, alpha=6, rank_map={"0.up": 2})
    for _, layer in dynrank.lora_layers(model):
        torch.nn.init.normal_(layer.lora_B)
    dynrank.save_adapter(model, tmp_path)
    (axes,) = plot.ranks(model).axes
    assert written(axes) == {("block 0", "up"): "2", ("block 1", "up"): "4", ("block 2", "up"): "4"}
    drawn_lines = [
        [line.get_ydata() for line in plot.spectra(of).axes[0].lines]
        for of in (model, tmp_path, str(tmp_path), dynrank.inspect(tmp_path))
    ]
    dense = torch.linalg.svdvals(dict(dynrank.lora_layers(model))["layers.1.up"].delta_weight().detach())[:4]
    assert [*drawn_lines[0][1]] == pytest.approx((dense / dense[0]).tolist(), rel=1e-5)
    for lines in drawn_lines[1:]:
        for line, other in zip(lines, drawn_lines[0], strict=True):
            assert [*line] == pytest.approx([*other], rel=1e-5)


@pytest.mark.parametrize("draw", [plot.ranks, plot.spectra])
def test_a_model_without_layers_is_refused(draw):
    with pytest.raises(ConfigurationError, match="no LoRA layers to draw"):
        draw(torch.nn.Linear(2, 2))
