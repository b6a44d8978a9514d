"""The benchmarks in miniature: that they run, and what they say of bytes; times of such sizes mean nothing."""

import re
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from dynrank.kernels.backends import MEASURED, paying_size

SIZE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}


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
    rows = bench("layer", "--rounds", "2", "--tokens", "256", "--widths", "64", "--ranks", "4")
    assert [row[:4] for row in rows] == [[kind, "64", "4", p] for kind in ("fp32", "bf16") for p in ("0.0", "0.1")]
    saved = {(row[0], row[3]): float(row[-1]) for row in rows}
    assert saved["fp32", "0.0"] <= 1.01
    assert saved["fp32", "0.1"] <= 0.55
    assert saved["bf16", "0.0"] <= 0.55
    assert saved["bf16", "0.1"] <= 0.3


def test_bench_experts(bench):
    rows = bench("experts", "layers", "--rounds", "2", "--tokens", "16", "--width", "32")
    assert [row[0] for row in rows] == ["16"]
    # These are the bytes that are kept for the backward pass.
    assert float(rows[0][5]) < float(rows[0][6])


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


def test_bench_gpu_on_a_cpu(bench):
    sizes = ("--shapes", "64x96", "--tokens", "32", "--ranks", "8", "--rounds", "2")
    rows = [row for row in bench("gpu", "--device", "cpu", *sizes) if "→" in row[1]]
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


def test_bench_step(bench):
    model = {"smollm2": lambda: (llama(vocab_size=20001, use_cache=False), None)}
    sizes = ("--models", "smollm2", "--blocks", "1", "--rounds", "2")
    rows = bench("step", *sizes, MODELS=model, BATCHES={"smollm2": (2, 8)})
    assert all(float(row[2]) > 0 for row in rows)
    steps = [row for row in rows if row[0] in ("0.0", "0.1")]
    assert [row[1] for row in steps[:2]] == ["PEFT, r = 32", "dynrank, r = 32 / PEFT, r = 32"]
    assert len(steps) == 8
    waiting = ["none", "by weight", "default schedule"]
    assert [row[:2] for row in rows[8:]] == [
        *(["Lightning", name] for name in [*waiting, "by weight, and RankMonitor"]),
        *(["transformers", name] for name in waiting),
    ]


def test_bench_generation(bench):
    arguments = ("--ranks", "8", "4", "--rows", "2", "--prompt", "3", "--tokens", "4", "--rounds", "3")
    rows = bench("generation", *arguments, MODEL=lambda: llama(vocab_size=64))
    assert [row[0] for row in rows] == ["base", "merged", "r = 8", "r = 4", "PEFT, r = 8"]
    assert all(float(row[1]) > 0 for row in rows)
    assert (rows[0][2], rows[2][4]) == ("1.000", "1.000")
    # One rank adds d_in + d_out for q, k, v, o and the three layers of the MLP.
    added = 4 * (32 + 32) + 3 * (32 + 48)
    own = 4 * 32 * 32 + 3 * 32 * 48 + 64 * 32
    assert [row[6] for row in rows] == [f"+{100 * rank * added / own:.1f}%" for rank in (0, 0, 8, 4, 8)]
