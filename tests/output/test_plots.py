"""What a reader needs of a picture can be seen in it."""

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from dynrank.output.plots import loss_figure, ranks_figure


@pytest.mark.parametrize("levels", [1, 2, 5, 32])
def test_legend_of_ranks_lies_inside_and_has_the_lowest_and_the_highest(levels):
    ranks = {f"layer{rank}": [(0, rank)] for rank in range(33 - levels, 33)}
    figure = ranks_figure(ranks, 100)
    FigureCanvasAgg(figure).draw()
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert 0 <= box.x0 < box.x1 <= figure.bbox.width
    assert 0 <= box.y0 < box.y1 <= figure.bbox.height
    named = [int(text.get_text()) for text in legend.get_texts()]
    assert named == sorted({*named, 33 - levels, 32})


def test_rank_after_the_last_step_is_seen():
    axes = ranks_figure({"layer": [(0, 8), (100, 2)]}, 100).axes[0]
    (bars,) = axes.collections
    widths = [path.vertices[:, 0].max() - path.vertices[:, 0].min() for path in bars.get_paths()]
    assert min(widths) > 0
    assert max(path.vertices[:, 0].max() for path in bars.get_paths()) <= axes.get_xlim()[1]


def test_loss_picture_has_a_thin_line_of_the_rate():
    steps, rates = [0, 1, 2], [1.0, 0.5, 0.25]
    figure = loss_figure({"train/loss": (steps, [3.0, 2.0, 1.0]), "lr/head": (steps, rates)}, {})
    axes, beside = figure.axes
    (line,) = beside.lines
    assert [*line.get_ydata()] == rates
    assert line.get_linewidth() < 1
    assert "rate of head" in [text.get_text() for text in axes.get_legend().get_texts()]
