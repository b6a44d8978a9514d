"""The bench of swaps in miniature: it swaps, measures all that it says, and finds a leak."""

import re

import pytest


@pytest.fixture(scope="module")
def bench(script):
    return script("bench_swap")


def test_every_row_is_measured_and_nothing_is_kept(bench, tiny_bert, capsys):
    # So few samples of memory may be too noisy for a verdict, so the exit code does not count.
    bench.main(["--swaps", "4", "--model", str(tiny_bert)])
    printed = capsys.readouterr().out
    rows = re.findall(r"^(memory|disk) +(\d+\.\d\d) \(", printed, re.MULTILINE)
    assert [source for source, _ in rows] == ["memory", "disk"]
    assert all(float(median) > 0 for _, median in rows)
    assert "adapters of 13 and 8 layers" in printed
    before, after = re.search(r"file handles (\d+) -> (\d+)", printed).groups()
    assert before == after


def test_what_is_kept_is_found(bench, monkeypatch):
    kept = []
    rates = iter(range(10**6))
    monkeypatch.setattr(bench, "times", lambda *_: kept.append(0))
    monkeypatch.setattr(bench, "resident", lambda: next(rates) * bench.MIB)
    text, level = bench.leak(None, [], 100)
    assert not level
    assert "NOT LEVEL" in text
