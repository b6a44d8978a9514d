"""The bench of swaps in miniature: it swaps, measures all that it says, and finds a leak."""

import re

import pytest

from dynrank.adapters import load
from dynrank.adapters.call_lock import CallLock


@pytest.fixture(scope="module")
def bench(script):
    return script("bench_swap")


def test_every_row_is_measured_and_nothing_is_kept(bench, tiny_bert, capsys):
    # So few samples of memory may be too noisy for a verdict, so the exit code does not count.
    bench.main(["--swaps", "4", "--model", str(tiny_bert)])
    printed = capsys.readouterr().out
    rows = re.findall(r"^(memory|disk) +(quiet|in use) +(\d+\.\d\d) \(", printed, re.MULTILINE)
    assert [row[:2] for row in rows] == [(a, b) for a in ("memory", "disk") for b in ("quiet", "in use")]
    assert all(float(row[2]) > 0 for row in rows)
    assert "adapters of 13 and 8 layers" in printed
    before, after = re.search(r"file handles (\d+) -> (\d+)", printed).groups()
    assert before == after


def test_texts_under_swaps_are_one_adapters_or_the_others(bench, script, tiny_llama, tmp_path, capsys, monkeypatch):
    arguments = f"--swaps 4 --model {tiny_llama} --steps 6 --tokens 12 --adapters {tmp_path}".split()
    # At this rate a few steps make unlike texts.
    monkeypatch.setattr(script("two_writers"), "RATE", 0.05)
    monkeypatch.setattr(bench, "leak", lambda *_: ("", True))
    assert bench.main(arguments) == 0
    printed = capsys.readouterr().out
    rows = re.findall(r"in use +\d+\.\d\d \(.*a text takes \d+\.\d ms; texts of the (.*)", printed)
    assert len(rows) == 2
    for text in rows:
        assert re.fullmatch(r"first: [1-9]\d*, second: [1-9]\d*", text)
    assert "WRONG" not in printed
    assert re.search(r"adapters of (\d+) and 14 layers", printed)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")}
    assert len(before) == 2

    # With a lock that is not the model's, a swap comes between two tokens.
    monkeypatch.setattr(load, "call_lock_of", lambda model: CallLock())
    assert bench.main(arguments) == 1
    printed = capsys.readouterr().out
    assert "neither: " in printed
    assert "WRONG" in printed
    # The adapters are not trained again.
    assert "steps, loss" not in printed
    assert before == {path: path.read_bytes() for path in before}


def test_what_is_kept_is_found(bench, monkeypatch):
    kept, rates = [], iter(range(10**6))
    monkeypatch.setattr(bench, "times", lambda *_: kept.append(0))
    monkeypatch.setattr(bench, "resident", lambda: next(rates) * bench.MIB)
    text, level = bench.leak(None, [], 100)
    assert not level
    assert "NOT LEVEL" in text
