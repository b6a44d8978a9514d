"""The LoRA on a UNet in miniature: it is cut, loads again as it was, and its file is squeezed by the command's way."""

import re

import pytest

from dynrank.adapters.squeeze import squeeze


@pytest.mark.filterwarnings("ignore")
def test_a_cut_unet_draws_the_same_once_it_is_loaded_again(script, main, tmp_path, monkeypatch):
    module = script("diffusers_lora")
    monkeypatch.setattr(module, "HELD_BACK", 8)
    printed = main("diffusers_lora", "--out", tmp_path, "--base-steps", "2", "--steps", "18")
    low, high = map(int, re.search(r"ranks +16 -> (\d+)-(\d+) in 48 layers", printed).groups())
    assert 1 <= low < high <= 16
    assert "differs by 0.0e+00" in printed
    assert [line.split("  ")[0] for line in printed.splitlines()[:4]] == [
        "the UNet alone", "before the cut", "after the cut", "at the end",
    ]  # fmt: skip
    assert (tmp_path / "digits.png").read_bytes().startswith(b"\x89PNG")
    reports = squeeze(tmp_path / module.FILE, tmp_path / "small.safetensors", rank=2)
    assert {report.rank_before for report in reports} >= {low, high}
