"""The studies in miniature, a tiny model and a few steps: the rows they write, and going on where one stopped."""

from types import SimpleNamespace

import pytest
import torch
from peft.tuners.adalora.layer import SVDLinear
from tables import rows

import dynrank

# This is the sum of d_in + d_out over the adapted layers of the tiny model.
WIDTHS = 2 * (4 * (32 + 32) + 2 * (32 + 64)) + (32 + 32)


@pytest.fixture(scope="module")
def scripts(script):
    names = ("study_bench", "study_bits", "study_after", "adalora", "study")
    return SimpleNamespace(**{name.removeprefix("study_"): script(name) for name in names})


@pytest.fixture
def short(scripts, tiny_bert, monkeypatch):
    """The scripts, on 80 terms."""
    small = ["task.limit=80", f"task.model={tiny_bert}"]
    real = scripts.bench.compose
    monkeypatch.setattr(scripts.bench, "compose", lambda overrides, **place: real([*overrides, *small], **place))
    return scripts


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_kept_parameters_are_those_of_the_layers_that_peft_would_build(short):
    bench = short.bench
    adalora = short.adalora
    trainee = adalora.adalora(bench.Setting(0, 10), 16, 4, 1e-3)
    trainee.train(8, adalora.allocation_of(trainee))
    expected = 0
    for module in trainee.model.modules():
        if isinstance(module, SVDLinear):
            kept = int(module.lora_E["default"].ne(0).sum())
            expected += kept * (module.in_features + 1 + module.out_features)
    assert adalora.kept_parameters(trainee.model) == expected
    pattern = trainee.model.peft_config["default"].rank_pattern
    assert sum(map(sum, pattern.values())) == 4 * len(pattern)
    layers = {name.partition(".lora_E")[0]: max(1, sum(kept)) for name, kept in pattern.items()}
    assert adalora.kept_ranks(trainee.model) == layers


@pytest.fixture
def study(scripts, tiny_bert, monkeypatch, tmp_path):
    """A function that runs the study on 48 terms with these options, and with an arm of each kind; its rows."""
    study = scripts.study
    kinds = [
        study.Arm(2),
        study.Arm(16, rate=2.0),
        *(study.Arm(2, by, rate=2.0) for by in ("brought", "found")),
        study.Arm(2, "AdaLoRA"),
        study.Arm(2, "GoRA"),
        study.Arm(16, "auto"),
        study.Arm(2, "weight", highest=3, but="pooler"),
        study.Arm(4, "AdaLoRA's ranks", rate=2.0),
        study.Arm(4, "AdaLoRA's bytes", rate=2.0),
        study.Arm(2, "EVA"),
        study.Arm(2, "rsLoRA"),
        study.Arm(2, plus=4.0),
        study.Arm(2, "brought", rate=2.0, clip=0.01),
    ]
    monkeypatch.setitem(study.ARMS, "medical_terms", kinds)
    small = ["task.limit=48", f"task.model={tiny_bert}", "optimizer.warmup_steps=1"]

    def start(*options):
        study.main([*options, "--steps", "8", "--out", str(tmp_path), "--set", *small])
        return rows(tmp_path / "study.csv")

    return start


@pytest.mark.filterwarnings("ignore:.*without any adapter:UserWarning")
def test_study_trains_what_its_table_lacks_and_takes_no_rate_that_diverges(study, scripts, tmp_path, capsys):
    written = study("--seeds", "0", "--rates", "1e-3")
    arms = list(map(str, scripts.study.ARMS["medical_terms"]))
    row_of = {row["arm"]: row for row in written}
    assert row_of.keys() == {*arms}
    size = {arm: int(row_of[arm]["parameters"]) for arm in arms}
    fixed, doubled, brought, found, theirs, gora, auto, but, guided, equal, eva, root, plus, clipped = arms
    assert size[fixed] == size[root] == size[plus] == 2 * WIDTHS
    assert len({row_of[arm]["val_loss"] for arm in (fixed, root, plus)}) == 3
    assert row_of[brought]["val_loss"] != row_of[clipped]["val_loss"]
    assert size[auto] < size[doubled] == 16 * WIDTHS
    assert size[found] == size[brought] <= 2 * WIDTHS
    assert 0 < size[theirs] < 16 * WIDTHS
    # GoRA rounds the rank of each layer by itself.
    assert 1.5 * WIDTHS < size[gora] <= 2.1 * WIDTHS
    # The pooler has 32 inputs and 32 outputs.
    assert 0 < size[but] - 16 * 64 <= 2 * (WIDTHS - 64)
    assert [arm for arm in arms if row_of[arm]["rise"]] == [brought, auto, but, guided, equal, clipped]
    assert 0 < size[equal] <= size[guided] < 16 * WIDTHS
    ranks = {arm: [*map(int, row_of[arm]["ranks"].split())] for arm in arms}
    assert sum(ranks[fixed]) == 2 * len(ranks[theirs])
    # EVA moves whole ranks, at most to twice as many.
    assert sum(ranks[eva]) == sum(ranks[fixed])
    assert len(ranks[eva]) == len(ranks[fixed])
    assert 0 <= min(ranks[eva]) < max(ranks[eva]) <= 4

    # One of these two shares its start with other arms.
    more = study("--seeds", "0", "2", "--rates", "1e-3", "1e30", "--only", "brought at 0.33, rate|^AdaLoRA")
    assert more[: len(written)] == written
    added = [(row["seed"], row["arm"], row["lr"], row["test_loss"] == "inf") for row in more[len(written) :]]
    high = [("0", arm, "1e+30", True) for arm in (brought, theirs)]
    assert added == [*high, *(("2", arm, "0.001", False) for arm in (brought, theirs))]
    printed = capsys.readouterr().out
    assert f"| {brought} | 2 |" in printed
    slots = sorted({max(map(int, row["ranks"].split())) for row in more if row["arm"] == brought and row["ranks"]})
    line = [line for line in printed.splitlines() if line.startswith(f"| {brought} |")][-1]
    assert line.split(" | ")[3] == "-".join(map(str, slots))
    assert (tmp_path / "study_medical_terms.png").stat().st_size > 0


def test_a_trainee_is_clipped_so_that_no_step_is_longer_than_its_rate(scripts):
    class Steep(torch.nn.Linear):
        def forward(self, **batch):
            return SimpleNamespace(loss=1e3 * super().forward(batch["x"]).square().sum())

    model = Steep(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    setting = SimpleNamespace(seed=0, batches=[{"x": torch.ones(1, 3)}])
    before = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    scripts.bench.Trainee(setting, model, optimizer, scheduler, clip=2.0).train(1)
    after = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    assert (after - before).norm().item() == pytest.approx(0.2, rel=1e-4)


def test_rate_is_the_best_of_two_seeds_and_the_next_one_beyond_the_best_edge(scripts, tmp_path):
    study = scripts.study
    table = scripts.bench.Table(tmp_path / "study.csv", study.FIELDS, ("arm", "lr"))
    low, inside, high, broken = (study.Arm(rank) for rank in (2, 4, 8, 16))
    # Each has the losses of two seeds by rate.
    losses = {low: [(1.0, 1.0), (0.9, 1.3), (3, 3)], inside: [(2, 2), (1, 1), (3, 3)], high: [(3, 3), (2, 2), (1, 1)]}
    losses[broken] = [(float("inf"),) * 2] * 3
    for arm, by_rate in losses.items():
        for lr, pair in zip((1e-3, 2e-3, 4e-3), by_rate, strict=True):
            for seed, loss in enumerate(pair):
                row = dict.fromkeys(study.FIELDS, "") | {"task": "any", "seed": seed, "arm": str(arm), "lr": lr}
                table.add(row | {"val_loss": loss})
    assert study.best_rate(table, "any", low) == 1e-3
    # An arm that diverges has no edge that is best.
    assert study.at_an_edge(table, "any", list(losses)) == [(low, 5e-4), (high, 8e-3)]


def test_headers_fall_into_splits_by_file(script):
    headers = script("study_headers")
    one = headers.cpp_headers(0)
    other = headers.cpp_headers(1)
    texts = [{row["text"] for row in splits["train"]} for splits in (one, other)]
    assert texts[0] != texts[1]
    assert 0 < len(one["val"]) < len(one["test"]) < len(one["train"])
    assert {len(text) for text in texts[0]} <= {*range(1, headers.CHARACTERS + 1)}


def test_kept_adapters_are_rounded_and_tested_without_training(study, scripts, tiny_bert, tmp_path, capsys):
    kept = tmp_path / "kept"
    trained = study("--seeds", "3", "--rates", "1e-3", "--only", "^rank 16|brought at 0.33, rate", "--keep", str(kept))
    options = ["--seeds", "3", "--keep", str(kept), "--out", str(tmp_path)]
    options += ["--set", "task.limit=48", f"task.model={tiny_bert}"]
    scripts.bits.main(options)
    written = rows(tmp_path / "bits.csv")
    assert [row["format"] for row in written] == [*scripts.bits.FORMATS] * 2
    for start, row in zip((0, len(written) // 2), trained, strict=True):
        whole, half, eight, four, three, nf4 = written[start : start + 6]
        # What was kept is what was trained, head included.
        assert whole["arm"] == row["arm"]
        assert float(half["test_loss"]) == pytest.approx(float(row["test_loss"]), rel=1e-3)
        numbers = int(row["parameters"])
        assert [int(part["bytes"]) for part in (whole, half, eight)] == [4 * numbers, 2 * numbers, numbers]
        # All layers of this model are 32 or 64 wide, so each direction has a float16 scale on either side.
        scales = 2 * 2 * sum(map(int, row["ranks"].split()))
        assert int(four["bytes"]) == int(nf4["bytes"]) == numbers // 2 + scales
        assert int(three["bytes"]) == numbers * 3 // 8 + scales
        errors = [float(part["error"]) for part in (whole, half, eight, four, three)]
        assert errors[0] == 0 < errors[1] < 0.004 < errors[2] < 0.06 < errors[3] < errors[4] < 0.4
        assert errors[3] / 2 < float(nf4["error"]) < errors[4]
        assert float(three["test_loss"]) == pytest.approx(float(whole["test_loss"]), rel=0.05)
        # What is tested is what was rounded.
        assert len({part["test_loss"] for part in (whole, eight, four, three)}) == 4
    printed = capsys.readouterr().out
    assert "| rank 16, rate × 2 | 0.001 | normal4 | 1 |" in printed
    scripts.bits.main(options)
    assert rows(tmp_path / "bits.csv") == written


def test_kept_adapters_are_squeezed_and_tested_without_training(study, scripts, tiny_bert, tmp_path, capsys):
    kept = tmp_path / "kept"
    only = "^rank 2, rsLoRA$|^rank 16|brought at 0.33, rate × 2$"
    trained = {row["arm"]: row for row in study("--seeds", "3", "--rates", "1e-3", "--only", only, "--keep", str(kept))}
    # rsLoRA's scaling is that of the others at rank 16.
    root = dynrank.inspect(scripts.bench.kept_adapter(kept, trained["rank 2, rsLoRA"]))
    assert [layer.scaling for layer in root] == pytest.approx([2 * 8**0.5] * len(root))
    options = ["--seeds", "3", "--keep", str(kept), "--out", str(tmp_path), "--only", "^rank 16|brought at"]
    options += ["--set", "task.limit=48", f"task.model={tiny_bert}"]
    scripts.after.main(options)
    written = rows(tmp_path / "after.csv")
    row_of = {(row["arm"], row["way"]): row for row in written}
    assert len(row_of) == len(written) == 2 * len(scripts.after.WAYS)
    for arm in ("rank 16, rate × 2", "16 → 2 brought at 0.33, rate × 2"):
        whole, most, some, few, packed = (
            row_of[arm, way] for way in ("as trained", "energy 0.999", "energy 0.98", "energy 0.95", "4 bits")
        )
        assert whole["test_loss"] == trained[arm]["test_loss"]
        assert whole["ranks"] == packed["ranks"] == trained[arm]["ranks"]
        sizes = [int(row["parameters"]) for row in (few, some, most, whole)]
        assert sizes == sorted(sizes)
        assert int(whole["bytes"]) == 2 * int(whole["parameters"])
        assert 1 / 4 < int(packed["bytes"]) / int(whole["bytes"]) < 0.32
        # 4 bits change the update, and little.
        loss = float(whole["test_loss"])
        assert float(packed["test_loss"]) != loss == pytest.approx(float(packed["test_loss"]), rel=0.05)
    assert int(row_of["rank 16, rate × 2", "energy 0.95"]["parameters"]) < int(
        trained["rank 16, rate × 2"]["parameters"]
    )
    scripts.after.main(options)
    assert rows(tmp_path / "after.csv") == written
