"""The benchmarks in miniature: that they run, and what they say of bytes; times of such sizes mean nothing."""

import argparse
import csv
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from dynrank.kernels.backends import MEASURED, paying_size

SIZE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
# Parameters of one rank of SIZE: d_in + d_out for q, k, v, o and the three layers of the MLP.
ADDED_BY_A_RANK = 4 * (32 + 32) + 3 * (32 + 48)


@pytest.fixture
def bench(script, main, monkeypatch):
    """Runs the named script with arguments; returns the rows of the tables that it has printed, as cells."""
    monkeypatch.setenv("COLUMNS", "220")

    def run(name, *arguments, **replacements):
        for attribute, value in replacements.items():
            monkeypatch.setattr(script(name), attribute, value)
        lines = main(name, *arguments).splitlines()
        return [[cell.strip() for cell in re.split(r"[│|]", line)[1:-1]] for line in lines if line[:1] in ("│", "|")]

    return run


def llama(**values):
    return LlamaForCausalLM(LlamaConfig(**SIZE, **values))


def test_bench_layer(bench):
    rows = bench("layer", "--rounds", "2", "--tokens", "4096", "--widths", "128", "--ranks", "4")
    assert [row[:4] for row in rows] == [[kind, "128", "4", p] for kind in ("fp32", "bf16") for p in ("0.0", "0.1")]
    # Of dynrank's layer, and of PEFT's with the op.
    for column in (-2, -1):
        saved = {(row[0], row[3]): float(row[column]) for row in rows}
        assert saved["fp32", "0.0"] <= 1.01
        assert saved["fp32", "0.1"] <= 0.55
        assert saved["bf16", "0.0"] <= 0.55
        assert saved["bf16", "0.1"] <= 0.3


def test_bench_experts(bench):
    rows = bench("experts", "layers", "--rounds", "2", "--tokens", "16", "--width", "64")
    assert [row[0] for row in rows] == ["16"]
    # What is kept for the backward pass by dynrank's layers, PEFT's, and PEFT's with the op.
    ours, peft, with_op = map(float, rows[0][-3:])
    assert max(ours, with_op) < peft


def test_bench_single_file(bench, script):
    shapes = {"lora_unet_a": (20, 12), "lora_unet_b": (12, 30), "lora_unet_c": (20, 12)}
    tiny: dict[str, Any] = {"LAYERS": {"96 x 80": (96, 80)}, "FILES": {"tiny": (lambda: shapes, 4, 2)}}
    # The process of each method is this one.
    tiny["in_a_process"] = script("single_file").resize
    layers = []
    files = []
    for row in bench("single_file", "--rounds", "2", "--turns", "1", **tiny):
        (layers if len(row) == 10 else files).append(row)
    above = [float(cell) for cell in layers[-1][-3:]]
    assert [abs(a) < most for a, most in zip(above, (1e-5, 1e-5, 1e-2), strict=True)] == [True] * 3
    assert [row[:5] for row in files[2:]] == [
        ["tiny", "3", "4 → 2", "0 → 0", m] for m in ("dynrank", "svd_lowrank", "whole SVD, of samples")
    ]
    # The files are stored in half precision.
    assert all(abs(float(row[-1])) < 1e-3 for row in files[2:])


def test_bench_host(bench):
    rows = bench("host", "--rounds", "2")
    assert [row[:2] for row in rows] == [[what, p] for what in ("one layer", "q, k, v") for p in ("0.0", "0.1")]
    assert all(float(value) > 0 for row in rows for value in row[2:])


@pytest.fixture
def miniature(script):
    """The arguments of a phase of gpu_day.py on a machine without a GPU."""
    return lambda phase: shlex.split(script("gpu_day").PHASES[phase].miniature)


def test_bench_gpu_on_a_cpu(bench, miniature):
    rows = [row for row in bench("gpu", *miniature("backend")) if "→" in row[1]]
    assert [row[:5] for row in rows] == [["one layer", "64 → 96", "32", "8", p] for p in ("0.0", "0.1")]
    assert all(float(row[-1]) > 0 for row in rows)


def test_bench_gpus_rows_are_those_that_auto_decides_from(script, tmp_path):
    """With times that are made up, in a file in which auto then finds the size."""
    bench_gpu = script("gpu")
    file = tmp_path / "measured.csv"
    file.write_text(MEASURED.read_text())
    at = {"frozen": 100.0, "PEFT": 160.0, "ATen": 130.0, "unsloth's order": 128.0}
    rows = [
        bench_gpu.Row(
            "one layer", 4096, 4096, tokens, 16, 0.0,
            {name: bench_gpu.Times(gpu, 50.0, name != "ATen") for name, gpu in {**at, "Triton": triton}.items()},
        )
        for tokens, triton in ((512, 135.0), (2048, 125.0), (8192, 124.0))
    ]  # fmt: skip
    bench_gpu.append(rows, "A card", file)
    assert paying_size("A card", file) == 2048 * 4096
    first = "| one layer | 4096 → 4096 | 512 | 16 | 0.0 | 100 | 1.60 | 1.30 eager | 1.28 | 1.35 |"
    assert bench_gpu.markdown(rows).splitlines()[2].startswith(first)


def test_bench_swap(main, tiny_bert):
    # So few samples of memory may be too noisy for a verdict, so the exit code does not count.
    printed = main("swap", "--swaps", "4", "--model", tiny_bert)
    rows = re.findall(r"^(memory|disk) +(\d+\.\d\d) \(", printed, re.MULTILINE)
    assert [source for source, median in rows if float(median) > 0] == ["memory", "disk"]
    before, after = re.search(r"file handles (\d+) -> (\d+)", printed).groups()
    assert before == after


def test_bench_step(bench, miniature):
    model = {"minilm": lambda: (llama(vocab_size=20001, use_cache=False), None)}
    rows = bench("step", *miniature("step"), MODELS=model, BATCHES={"minilm": (2, 8)})
    assert all(float(row[2]) > 0 for row in rows)
    steps = [row for row in rows if row[0] == "0.1"]
    pair = ["PEFT with the op / PEFT, r = 8", "dynrank, r = 8 / PEFT, r = 8"]
    assert [row[1] for row in steps[:3]] == ["PEFT, r = 8", *pair]
    # Factors, gradients, two moments and AdamW's counters, in MB; a cut to half after a third of a run.
    peft, with_op, uncut, cut, _ = ([float(cell) for cell in row[6:8]] for row in steps)
    assert peft == with_op == uncut
    assert peft[0] == pytest.approx(16 * 8 * ADDED_BY_A_RANK / 1e6, abs=0.006)
    assert cut == pytest.approx([peft[0] / 2, peft[0] * 2 / 3], abs=0.006)
    waiting = ["none", "by weight", "default schedule"]
    assert [row[:2] for row in rows[5:]] == [
        *(["Lightning", name] for name in [*waiting, "by weight, and RankMonitor"]),
        *(["transformers", name] for name in waiting),
    ]


def test_bench_generation(bench):
    arguments = ("--ranks", "8", "4", "--rows", "2", "--prompt", "3", "--tokens", "4", "--rounds", "3")
    rows = bench("generation", *arguments, MODEL=lambda: llama(vocab_size=64))
    assert [row[0] for row in rows] == ["base", "merged", "r = 8", "r = 4", "PEFT, r = 8"]
    assert all(float(row[1]) > 0 for row in rows)
    assert (rows[0][2], rows[2][4]) == ("1.000", "1.000")
    own = 4 * 32 * 32 + 3 * 32 * 48 + 64 * 32
    assert [row[6] for row in rows] == [f"+{100 * rank * ADDED_BY_A_RANK / own:.1f}%" for rank in (0, 0, 8, 4, 8)]


def test_cut_and_whole_in_miniature(main, miniature):
    printed = main("truncate", *miniature("cut"))
    assert "14 of 32 x 32, 8 -> 4" in printed
    assert float(re.search(r"agree to +(\S+)", printed)[1]) < 1e-5
    printed = main("whole", *miniature("whole"))
    assert "before the cut: " in printed
    assert "ranks 1 to " in printed
    assert float(re.search(r"within (\S+)", printed)[1]) < 1e-5


@pytest.mark.parametrize("phase", ["tests", "kernel", "backend", "step", "cut", "whole"])
def test_what_a_gpu_day_runs_exists_and_takes_its_arguments(script, monkeypatch, phase):
    """The programs end as soon as they have read their arguments."""
    gpu_day = script("gpu_day")
    assert [*gpu_day.PHASES] == ["tests", "kernel", "backend", "step", "cut", "whole"]
    assert sum(each.minutes for each in gpu_day.PHASES.values()) <= 45
    program = gpu_day.PHASES[phase].program
    words = gpu_day.PHASES[phase].command("cuda")
    if program == "pytest":
        for word in words + gpu_day.PHASES[phase].command("cpu"):
            assert not word.startswith("tests/") or (gpu_day.ROOT / word).is_file()
        return

    class ReadError(Exception):
        pass

    parse = argparse.ArgumentParser.parse_args

    def parse_and_end(parser, *given):
        raise ReadError(parse(parser, *given).device)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_end)
    monkeypatch.setattr(sys, "argv", words[1:])
    with pytest.raises(ReadError, match="cuda"):
        script(Path(program).stem).main()


def test_a_phase_that_fails_or_takes_too_long_leaves_the_others_alone(script, monkeypatch, tmp_path):
    gpu_day = script("gpu_day")
    monkeypatch.setattr(gpu_day, "HERE", tmp_path)
    programs = {
        "good": "print('a row')",
        "bad": "print('half a row'); raise SystemExit(3)",
        "long": "import time; time.sleep(60)",
    }
    for name, text in programs.items():
        (tmp_path / f"{name}.py").write_text(text)
    phases = {name: gpu_day.Phase(0.02 if name == "long" else 1, f"{name}.py", "", "") for name in programs}
    monkeypatch.setattr(gpu_day, "PHASES", {name: phases[name] for name in ("bad", "long", "good")})
    arguments = ["gpu_day", "--device", "cpu", "--out", str(tmp_path / "out")]
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", arguments)
        with pytest.raises(SystemExit, match="failed: bad long"):
            gpu_day.main()
    with (tmp_path / "out/phases.csv").open() as file:
        rows = [(row["phase"], row["exit"]) for row in csv.DictReader(file)]
    # What has passed is not run again.
    assert rows == [("bad", "3"), ("long", "124"), ("good", "0"), ("bad", "3"), ("long", "124")]
    assert [(tmp_path / "out" / f"{name}.txt").read_text() for name in ("good", "bad")] == ["a row\n", "half a row\n"]
