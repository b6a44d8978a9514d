"""The studies in miniature, a tiny model and a few steps: the rows they write, and going on where one stopped."""

import csv
import sys
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft.tuners.adalora.layer import SVDLinear

from dynrank.errors import ConfigurationError

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
WIDTHS = 2 * (4 * (32 + 32) + 2 * (32 + 64)) + (32 + 32)  # d_in + d_out over the adapted layers of the tiny model


@pytest.fixture(scope="module")
def scripts():
    sys.path.insert(0, str(SCRIPTS))
    import compare_adalora
    import medical_bench
    import study
    import study_truncation

    sys.path.remove(str(SCRIPTS))
    return SimpleNamespace(bench=medical_bench, truncation=study_truncation, adalora=compare_adalora, study=study)


@pytest.fixture
def short(scripts, tiny_bert, monkeypatch):
    """The scripts, on 80 terms and with a run of a few steps."""
    bench, truncation, adalora = scripts.bench, scripts.truncation, scripts.adalora
    small, real = ["task.limit=80", f"task.model={tiny_bert}"], bench.compose
    monkeypatch.setattr(bench, "compose", lambda overrides: real([*overrides, *small]))
    for name, value in {"STEPS": 6, "CUT": 4, "WINDOW": 2}.items():
        monkeypatch.setattr(truncation, name, value)
    monkeypatch.setattr(truncation, "ARMS", [truncation.Arm("weight"), truncation.Arm("loss", shared=True)])
    for name, value in {"STEPS": 10, "FIRST": 1, "LAST": 6, "WINDOW": 2, "RATES": (1e-3, 2e-3)}.items():
        monkeypatch.setattr(adalora, name, value)
    monkeypatch.setattr(adalora, "ARMS", {"dynrank": adalora.Cuts((2, 6))})
    return scripts


def launch(monkeypatch, script, folder, *options):
    monkeypatch.setattr(sys, "argv", [script.__name__, "--seeds", "1", "--out", str(folder), *options])
    script.main()


def rows(file):
    with file.open(newline="") as text:
        return list(csv.DictReader(text))


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_truncation_study_writes_a_row_per_arm_and_goes_on_where_it_stopped(short, monkeypatch, tmp_path, capsys):
    truncation = short.truncation
    launch(monkeypatch, truncation, tmp_path)
    file = tmp_path / "truncation.csv"
    written = rows(file)
    uniform, shared = (next(row for row in written if row["arm"] == str(arm)) for arm in truncation.ARMS)
    assert len(written) == len(truncation.BOUNDS) + 2
    assert int(uniform["parameters"]) == WIDTHS * 2 >= int(shared["parameters"])
    assert uniform["val_before"] == shared["val_before"] != ""
    assert float(uniform["energy_kept"]) < 1
    assert "right after" in capsys.readouterr().out
    assert (tmp_path / "truncation.png").stat().st_size > 0

    file.write_text("\n".join(line for line in file.read_text().splitlines() if "budget" not in line) + "\n")
    launch(monkeypatch, truncation, tmp_path)
    assert rows(file) == [*(row for row in written if row is not shared), shared]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adalora_comparison_gives_dynrank_no_more_than_adalora_kept(short, monkeypatch, tmp_path, capsys):
    adalora = short.adalora
    launch(monkeypatch, adalora, tmp_path)
    written = rows(tmp_path / "adalora.csv")
    theirs, ours = (
        [int(row["parameters"]) for row in written if row["arm"] == arm] for arm in (adalora.ADALORA, "dynrank")
    )
    assert len(written) == 3 * 2
    assert max(ours) <= min(theirs) < 16 * WIDTHS
    assert "less AdaLoRA's" in capsys.readouterr().out
    assert (tmp_path / "adalora.png").stat().st_size > 0


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_costs_of_adalora_stay_and_ours_fall(short, monkeypatch, tmp_path):
    adalora = short.adalora
    launch(monkeypatch, adalora, tmp_path, "--cost", "--rounds", "2")
    measured = {row["model"]: row for row in rows(tmp_path / "adalora_cost.csv")}
    before, _, after, theirs_before, theirs_after = measured.values()
    assert int(after["adapter_bytes"]) <= int(before["adapter_bytes"]) // 4
    assert int(after["optimizer_bytes"]) <= int(before["optimizer_bytes"]) // 4 + 4 * 26  # a step count for each factor
    assert theirs_after["adapter_bytes"] == theirs_before["adapter_bytes"]
    assert int(theirs_before["score_bytes"]) == 3 * int(theirs_before["adapter_bytes"])
    assert theirs_after["score_bytes"] == "0"


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_kept_parameters_are_those_of_the_layers_that_peft_would_build(short):
    bench, adalora = short.bench, short.adalora
    trainee = adalora.adalora(bench.Setting(0, 10), 1e-3, first=1, last=6)
    trainee.train(8, adalora.allocation_of(trainee))
    expected = 0
    for module in trainee.model.modules():
        if isinstance(module, SVDLinear):
            kept = int(module.lora_E["default"].ne(0).sum())
            expected += kept * (module.in_features + 1 + module.out_features)
    assert adalora.kept_parameters(trainee.model) == expected
    pattern = trainee.model.peft_config["default"].rank_pattern
    assert sum(map(sum, pattern.values())) == adalora.LOW * len(pattern)


def test_copy_of_a_trainee_goes_on_as_the_trainee_does(short):
    bench = short.bench
    one = bench.adapted(bench.Setting(0, 6), 4)
    one.train(3)
    two = deepcopy(one)
    for trainee in (one, two):
        trainee.train(6)
    pairs = zip(one.model.parameters(), two.model.parameters(), strict=True)
    assert all(torch.equal(a, b) and a is not b for a, b in pairs)
    logits = [trainee.evaluate(trainee.setting.val) for trainee in (one, two)]
    assert logits[0] == logits[1]


def test_table_of_other_columns_is_refused_and_kept(scripts, tmp_path):
    bench, truncation = scripts.bench, scripts.truncation
    file = tmp_path / "truncation.csv"
    file.write_text("a,b\n1,2\n")
    with pytest.raises(ConfigurationError, match=r"truncation\.csv.*'a', 'b'"):
        bench.Table(file, truncation.FIELDS, ("seed", "arm"))
    assert file.read_text() == "a,b\n1,2\n"


ARMS_OF_STUDY = ("rank 2", "rank 16", "16 → 2 at 0.5", "16 → 2 at 0.5, budget", "AdaLoRA 16 → 2")


@pytest.fixture
def study(scripts, tiny_bert, monkeypatch, tmp_path):
    """The study on 80 terms, five of its arms, two learning rates of which one diverges; a function that runs it."""
    study = scripts.study
    monkeypatch.syspath_prepend(SCRIPTS)  # for the processes that it starts
    monkeypatch.setattr(study, "ARMS", [arm for arm in study.ARMS if str(arm) in ARMS_OF_STUDY])
    monkeypatch.setattr(study, "RATES", (1e-3, 1e30))
    small = ["task.limit=80", f"task.model={tiny_bert}", "optimizer.warmup_steps=1"]

    def start():
        options = ["--seeds", "2", "--steps", "10", "--rounds", "2", "--processes", "1"]
        study.main([*options, "--out", str(tmp_path), *small])
        return rows(tmp_path / "study.csv")

    return start


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_study_trains_what_its_table_lacks_and_takes_no_rate_that_diverges(study, tmp_path, capsys):
    written = study()
    at_best = [row for row in written if row["lr"] == "0.001"]
    assert {(row["equal"], row["seed"], row["arm"]) for row in at_best} == {
        (equal, seed, arm) for equal in ("steps", "time") for seed in "01" for arm in ARMS_OF_STUDY
    }
    diverged = [row for row in written if row not in at_best]
    assert [(row["seed"], row["test_loss"], row["bytes"]) for row in diverged] == [("0", "inf", "")] * len(
        ARMS_OF_STUDY
    )
    for row in at_best:
        if row["arm"] in ("rank 2", "16 → 2 at 0.5"):
            assert int(row["bytes"]) == 4 * int(row["parameters"]) == 4 * 2 * WIDTHS
        if row["arm"] == "16 → 2 at 0.5, budget":
            assert int(row["parameters"]) <= 2 * WIDTHS
        assert bool(row["spike"]) == ("→ 2 at" in row["arm"])
    printed = capsys.readouterr().out
    assert "equal steps" in printed
    assert "equal time" in printed
    assert (tmp_path / "study.png").stat().st_size > 0

    lost = [row for row in written if row["arm"] == "16 → 2 at 0.5" and row["seed"] == "1" and row["equal"] == "steps"]
    file = tmp_path / "study.csv"
    header, *lines = file.read_text(encoding="utf-8").splitlines()
    kept = [line for line, row in zip(lines, written, strict=True) if row not in lost]
    file.write_text("\n".join([header, *kept]) + "\n", encoding="utf-8")
    assert study() == [*(row for row in written if row not in lost), *lost]  # the same numbers again
