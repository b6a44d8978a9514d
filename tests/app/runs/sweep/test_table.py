"""The table of a sweep, from folders as its runs leave them; numbers are checked against NumPy's."""

import json

import numpy as np
import pytest
from tables import rows

from dynrank import plot
from dynrank.app.commands import cli
from dynrank.app.runs.sweep import read_sweep, show_sweep


def write(folder, overrides, test=None, **fields):
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "overrides.yaml").write_text("".join(f"- {text}\n" for text in overrides))
    (folder / "rank_history.csv").write_text("step\n")
    if test is not None:
        summary = {"test": test, "parameters": {"adapter": 100}, "final_ranks": {}, "seconds": 1.0}
        summary |= {"tokens_per_second": 1.0, "peak_memory_bytes": 1, **fields}
        (folder / "summary.json").write_text(json.dumps(summary))


@pytest.fixture
def sweep(tmp_path):
    """Three ranks of three seeds, in the order in which Hydra makes them; folder and accuracies by rank."""
    accuracies = {}
    random = np.random.default_rng(0)
    for number, (rank, seed) in enumerate((rank, seed) for rank in (16, 4, 8) for seed in range(3)):
        value = float(random.random())
        accuracies.setdefault(rank, []).append(value)
        write(
            tmp_path / str(number), [f"lora.rank={rank}", f"seed={seed}", "ckpt_path=last"][: 2 + seed],
            {"test/accuracy": value, "test/loss": 2 * value}, gap=-value, step_seconds=value / 100,
            bytes={"adapter": 400 * rank, "gradients": 500 * rank, "optimizer": 1000 * rank},
        )  # fmt: skip
    return tmp_path, accuracies


def test_table_holds_mean_and_sample_deviation_over_seeds_by_rank(sweep, capsys):
    folder, accuracies = sweep
    show_sweep(folder)
    found = rows(folder / "sweep.csv")
    assert [row["lora.rank"] for row in found] == ["4", "8", "16"]
    for row in found:
        values = np.array(accuracies[int(row["lora.rank"])])
        expected = {"test/accuracy": values, "test/loss": 2 * values, "gap": -values, "step_seconds": values / 100}
        for name, numbers in expected.items():
            assert float(row[name]) == pytest.approx(numbers.mean(), rel=1e-12)
            assert float(row[f"{name}_sd"]) == pytest.approx(numbers.std(ddof=1), rel=1e-12)
        assert (row["runs"], row["without_result"]) == ("3", "0")
        assert float(row["optimizer_bytes"]) == 1000 * int(row["lora.rank"])
        assert float(row["gradient_bytes_sd"]) == 0
    printed = capsys.readouterr().out
    assert "over seeds" in printed
    for values in accuracies.values():
        assert f"{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}" in printed
    assert (folder / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert not list(folder.glob("*.part"))


def test_runs_without_a_result_are_named_and_counted_and_refused_ones_left_out(tmp_path, capsys):
    write(tmp_path / "0", ["lora.rank=4", "seed=0"], {"test/loss": 1.0})
    write(tmp_path / "1", ["lora.rank=4", "seed=1"])
    write(tmp_path / "2", ["lora.rank=8", "seed=0"])
    write(tmp_path / "3", ["lora.rank=8", "seed=1"])
    (tmp_path / "3" / "summary.json").write_text("{")
    write(tmp_path / "4", ["lora.rank=8", "seed=2"])
    # This run was refused before it began.
    (tmp_path / "4" / "rank_history.csv").unlink()
    show_sweep(tmp_path)
    found = rows(tmp_path / "sweep.csv")
    counted = [(row["lora.rank"], row["runs"], row["without_result"]) for row in found]
    assert counted == [("4", "1", "1"), ("8", "0", "2")]
    assert found[0]["test/loss_sd"] == found[1]["test/loss"] == ""
    printed = capsys.readouterr().out
    for text in ("1 of 2", "0 of 2", "1 (lora.rank=4 seed=1): has not ended", "2 (lora.rank=8 seed=0): has not ended"):
        assert text in printed
    assert "summary.json' is not what a run writes" in printed
    # No row has more than one result.
    assert "over seeds" not in printed


def test_results_are_what_the_summaries_hold_in_the_order_of_the_runs_numbers(tmp_path):
    for number in (10, 2, 1):
        more = {"test/bleu": 0.5} if number == 10 else {}
        write(tmp_path / "sweep7" / str(number), ["task=code"], {"test/loss": float(number), **more}, gap=None)
    runs = read_sweep(tmp_path / "sweep7")
    assert [run.folder.name for run in runs] == ["1", "2", "10"]
    assert list(runs[2].results) == ["test/loss", "test/bleu", "adapter_parameters"]
    show_sweep(tmp_path)
    (row,) = rows(tmp_path / "sweep.csv")
    assert (row["runs"], row["test/bleu"], float(row["test/loss"])) == ("3", "0.5", pytest.approx(13 / 3))
    assert [*row][:3] == ["runs", "without_result", "test/loss"]


def test_arms_of_several_settings_keep_all_that_differ(tmp_path, capsys):
    settings = [("[query,value]", "8"), ("[query,value]", "4"), ("attention", "8")]
    for number, (names, rank) in enumerate(settings):
        overrides = [f"lora.target_modules={names}", f"+lora.rank={rank}", "seed=1"]
        write(tmp_path / str(number), overrides, {"test/loss": 1.0})
    show_sweep(tmp_path)
    found = [[*row.items()] for row in rows(tmp_path / "sweep.csv")]
    assert [tuple(value for _, value in row[:2]) for row in found] == settings
    assert [name for name, _ in found[0][:3]] == ["lora.target_modules", "lora.rank", "runs"]
    # It is no markup.
    assert "[query,value]" in capsys.readouterr().out


def test_picture_shows_every_run_the_means_and_deviations_of_several():
    figure = plot.arms([["4"], ["16"]], "lora.rank", {"loss": [[1.0, 3.0], [5.0]], "gap": [[], [7.0]]})
    loss, gap = figure.axes
    dots = [(float(x), float(y)) for line in loss.lines if line.get_marker() == "o" for x, y in line.get_xydata()]
    assert dots == [(0, 1), (0, 3), (1, 5)]
    bars = [(bar.lines[0].get_xydata().tolist(), bar.has_yerr) for bar in loss.containers]
    assert bars == [([[0, 2]], True), ([[1, 5]], False)]
    assert len(gap.containers) == 1
    named = plot.arms([["fixed"], ["anneal"]], "schedule", {"loss": [[1.0], [2.0]]})
    assert [text.get_text() for text in named.axes[0].get_xticklabels()] == ["fixed", "anneal"]


def test_command_makes_the_table_again_without_a_picture_and_refuses_what_is_no_sweep(
    sweep, launch, tmp_path_factory, monkeypatch
):
    monkeypatch.setattr("dynrank.app.runs.sweep.find_spec", lambda name: None)
    code, _, message = launch(cli.main, "sweep", sweep[0])
    assert (code, message) == (0, "")
    assert (sweep[0] / "sweep.csv").exists()
    assert not (sweep[0] / "sweep.png").exists()
    code, _, message = launch(cli.main, "sweep", tmp_path_factory.mktemp("empty"))
    assert (code, "holds no run" in message) == (2, True)
