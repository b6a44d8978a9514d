"""The table of a sweep, from folders as its runs leave them; numbers are checked against NumPy's."""

import json

import numpy as np
import pytest
from tables import rows

from dynrank import plot
from dynrank.app.commands import cli
from dynrank.app.runs.sweep import show_sweep


def write(folder, overrides, test=None, **fields):
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "overrides.yaml").write_text("".join(f"- {text}\n" for text in overrides))
    if test is not None:
        summary = {"test": test, "parameters": {"adapter": 100}, "final_ranks": {}, "seconds": 1.0}
        summary |= {"tokens_per_second": 1.0, "peak_memory_bytes": 1, **fields}
        (folder / "summary.json").write_text(json.dumps(summary))


def test_table_holds_mean_and_sample_deviation_over_seeds_in_the_order_of_the_runs_numbers(tmp_path, capsys):
    accuracies = {}
    random = np.random.default_rng(0)
    settings = [("[query,value]", "16"), ("[query,value]", "4"), ("attention", "4"), ("attention", "8")]
    for number, (setting, seed) in enumerate((setting, seed) for setting in settings for seed in range(3)):
        value = float(random.random())
        accuracies.setdefault(setting, []).append(value)
        overrides = [f"+lora.target_modules={setting[0]}", f"lora.rank={setting[1]}", "schedule=fixed", f"seed={seed}"]
        overrides += ["ckpt_path=last"] if seed else []
        write(tmp_path / f"sweep7/{number}", overrides, {"test/accuracy": value}, gap=-value)
    show_sweep(tmp_path)
    found = rows(tmp_path / "sweep.csv")
    assert [*found[0]][:5] == ["lora.target_modules", "lora.rank", "runs", "test/accuracy", "test/accuracy_sd"]
    printed = capsys.readouterr().out
    # It is no markup.
    assert "[query,value]" in printed
    for row, (setting, values) in zip(found, accuracies.items(), strict=True):
        assert (row["lora.target_modules"], row["lora.rank"], row["runs"]) == (*setting, "3")
        for name, numbers in (("test/accuracy", np.array(values)), ("gap", -np.array(values))):
            assert float(row[name]) == pytest.approx(numbers.mean(), rel=1e-12)
            assert float(row[f"{name}_sd"]) == pytest.approx(numbers.std(ddof=1), rel=1e-12)
        assert f"{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}" in printed
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_runs_without_a_result_are_named_and_do_not_hide_others(tmp_path, capsys):
    write(tmp_path / "0", ["lora.rank=4", "seed=0"], {"test/loss": 1.0}, final={"val/loss": 2.0})
    write(tmp_path / "1", ["lora.rank=4", "seed=1"])
    write(tmp_path / "2", ["lora.rank=8", "seed=0"])
    write(tmp_path / "3", ["lora.rank=8", "seed=1"])
    (tmp_path / "3" / "summary.json").write_text("{")
    show_sweep(tmp_path)
    found = rows(tmp_path / "sweep.csv")
    assert [(row["lora.rank"], row["runs"], row["final/val/loss"]) for row in found] == [
        ("4", "1", "2.0"),
        ("8", "0", ""),
    ]
    assert found[0]["test/loss_sd"] == found[1]["test/loss"] == ""
    faults = [line for line in capsys.readouterr().out.splitlines() if line.startswith("no result")]
    for line, told in zip(faults, ("1 (lora.rank=4 seed=1)", "2 (lora.rank=8 seed=0)", "3 (lora.rank=8"), strict=True):
        assert told in line
        assert "summary.json" in line


def test_picture_shows_every_run_the_means_and_deviations_of_several():
    figure = plot.arms([["4"], ["16"]], "lora.rank", {"loss": [[1.0, 3.0], [5.0]], "gap": [[], [7.0]]})
    loss, gap = figure.axes
    dots = [(float(x), float(y)) for line in loss.lines if line.get_marker() == "o" for x, y in line.get_xydata()]
    assert dots == [(0, 1), (0, 3), (1, 5)]
    bars = [(bar.lines[0].get_xydata().tolist(), bar.has_yerr) for bar in loss.containers]
    assert (bars, len(gap.containers)) == ([([[0, 2]], True), ([[1, 5]], False)], 1)


def test_command_works_without_matplotlib_and_for_equal_runs_and_refuses_what_is_no_sweep(
    launch, tmp_path, monkeypatch
):
    monkeypatch.setattr("dynrank.app.runs.sweep.find_spec", lambda name: None)
    for number, loss in enumerate((1.0, 2.0)):
        write(tmp_path / "s" / str(number), ["lora.rank=8"], {"test/loss": loss})
    assert launch(cli.main, "sweep", tmp_path / "s")[::2] == (0, "")
    (row,) = rows(tmp_path / "s" / "sweep.csv")
    assert [*row.values()][:2] == ["2", "1.5"]
    assert not (tmp_path / "s" / "sweep.png").exists()
    (tmp_path / "empty").mkdir()
    code, _, message = launch(cli.main, "sweep", tmp_path / "empty")
    assert (code, "holds no run" in message) == (2, True)
