"""A small round of each script that is neither a benchmark nor a study."""

import re
from pathlib import Path

import forked
import numpy as np
import pytest
import torch

from dynrank.adapters.squeeze import squeeze
from dynrank.app.models.pretrained import load_causal_lm, load_tokenizer

CRASH_MATRIX = "import sys; sys.path.insert(0, sys.argv.pop(1)); from crash_matrix import main; sys.exit(main())"


def test_runs_that_are_stopped_end_in_the_bits_of_those_that_were_not(tmp_path):
    scripts = Path(__file__).parents[2] / "scripts" / "bench"
    code, printed = forked.run(CRASH_MATRIX, scripts, "--tries", "2", "--seed", "6508", cwd=tmp_path)
    assert code == 0, printed
    # The columns are tried, survived and lost.
    assert printed.splitlines()[-1].split() == ["all", "2", "2", "0"]


def test_fuzz_repeats_a_case_by_its_seed(main, capsys):
    with pytest.raises(SystemExit, match="0"):
        main("fuzz", "--seed", 3)
    printed = capsys.readouterr().out
    assert "1 cases before seed 4" in printed
    assert "1 compared whole" in printed


# The names of parameters of some change when they are saved.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["llava", "mixtral"])
def test_family_trains_resumes_and_goes_to_peft_and_back(family, script):
    families = script("families")
    row = families.row_of(family, families.families()[family])
    assert row["layers"] > 0
    assert {check: row.get(check, row.get("reason")) for check in families.CHECKS} == dict.fromkeys(
        families.CHECKS, "equal"
    )


@pytest.mark.filterwarnings("ignore")
def test_a_cut_unet_draws_the_same_once_it_is_loaded_again(script, main, tmp_path, monkeypatch):
    module = script("diffusers_lora")
    monkeypatch.setattr(module, "HELD_BACK", 8)
    printed = main("diffusers_lora", "--out", tmp_path, "--base-steps", "2", "--steps", "18")
    low, high = map(int, re.search(r"ranks +16 -> (\d+)-(\d+) in 48 layers", printed).groups())
    assert 1 <= low < high <= 16
    assert "differs by 0.0e+00" in printed
    reports = squeeze(tmp_path / module.FILE, tmp_path / "small.safetensors", rank=2)
    assert {report.rank_before for report in reports} >= {low, high}


SIZE = ["--steps", "6", "--characters", "40000", "--batch", "4", "--length", "32", "--width", "64"]
SIZE += ["--layers", "2", "--vocabulary", "600"]


def test_pretrained_folder_is_a_model_for_tasks_and_interrupted_it_is_the_same(script, main, monkeypatch, tmp_path):
    def launch(name):
        return main("pretrain_small", "--architecture", "qwen3_moe", "--out", tmp_path / name, *SIZE)

    monkeypatch.setattr(script("pretrain_small"), "KEEP_EVERY", 2)
    monkeypatch.setattr(script("pretrain_small"), "PACKAGES", ("torchmetrics",))
    losses = re.findall(r"held out (.*?),", launch("whole"))
    assert float(losses[-1]) < float(losses[0])

    save = torch.save

    def interrupt(values, file):
        save(values, file)
        if values["step"] == 4:
            Path(file).rename(tmp_path / "part" / "pretraining.pt")
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", interrupt)
        with pytest.raises(KeyboardInterrupt):
            launch("part")
    assert "goes on at step 4" in launch("part")

    whole, part = (load_causal_lm(str(tmp_path / name)) for name in ("whole", "part"))
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), part.parameters(), strict=True))
    experts = whole.get_submodule("model.layers.1.mlp.experts")
    assert [tuple(p.shape) for p in experts.parameters()] == [(8, 128, 64), (8, 64, 64)]
    assert whole.lm_head.weight is whole.get_input_embeddings().weight
    tokenizer = load_tokenizer(str(tmp_path / "whole"))
    text = "Returns a tensor, if any: naïve."
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.eos_token_id == whole.config.eos_token_id == 0


def test_short_soak_changes_ranks_and_leaves_no_handle_open(script, tiny_bert, tmp_path):
    soak = script("soak")
    overrides = ["task.limit=80", f"task.model={tiny_bert}"]
    samples = soak.soak(overrides, minutes=1, steps=40, every=5, folder=tmp_path)
    assert [sample.step for sample in samples] == list(range(10, 41, 10))
    # The samples lie between the changes at 5 and 10, at 15 and 20, and so on.
    assert {sample.rank for sample in samples} == {16}
    changes = (tmp_path / "history.csv").read_text().splitlines()[1:]
    assert len({line.split(",")[0] for line in changes}) == 7
    assert len({sample.handles for sample in samples[1:]}) == 1


@pytest.mark.parametrize(("leak", "handles", "level"), [(0.0, 0, True), (0.05, 0, False), (0.0, 1, False)])
def test_verdict_of_a_soak_tells_a_leak_from_noise(script, leak, handles, level):
    soak = script("soak")
    noise = np.random.default_rng(1).normal(0, 5, 400)
    samples = [
        soak.Sample(step, step / 100, 16, 1000 + noise[step // 10 - 1] + leak * step, 20 + handles * (step > 3000))
        for step in range(10, 4001, 10)
    ]
    text, found = soak.verdict(samples, 50)
    assert (found, "NOT" in text) == (level, not level)
