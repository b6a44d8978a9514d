"""The bench of swaps in miniature: it swaps, measures all that it says, and finds a leak."""

import re
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(SCRIPTS))
    import bench_swap

    sys.path.remove(str(SCRIPTS))
    return bench_swap


def test_every_row_is_measured_and_nothing_is_kept(bench, tiny_bert, capsys):
    bench.main(["--swaps", "4", "--model", str(tiny_bert)])  # so few samples of memory may be too noisy for a verdict
    printed = capsys.readouterr().out
    rows = re.findall(r"^(memory|disk) +(quiet|in use) +(\d+\.\d\d) \(", printed, re.MULTILINE)
    assert [row[:2] for row in rows] == [(a, b) for a in ("memory", "disk") for b in ("quiet", "in use")]
    assert all(float(row[2]) > 0 for row in rows)
    assert "adapters of 13 and 8 layers" in printed
    before, after = re.search(r"file handles (\d+) -> (\d+)", printed).groups()
    assert before == after


def test_adapters_differ_in_layers_and_ranks(bench, tiny_bert, tmp_path):
    first, second = bench.write_adapters(str(tiny_bert), tmp_path)
    ranks = [{len(pair["A"]) for pair in bench.read_adapter(path).factors.values()} for path in (first, second)]
    assert ranks == [{32}, {4, 16}]
    assert bench.factor_bytes(first) == 4 * 32 * (2 * (4 * 64 + 2 * 96) + 64)


def test_what_is_kept_is_found(bench, monkeypatch):
    kept, rates = [], iter(range(10**6))
    monkeypatch.setattr(bench, "times", lambda *_: kept.append(0))
    monkeypatch.setattr(bench, "resident", lambda: next(rates) * bench.MIB)
    text, level = bench.leak(None, [], 100)
    assert not level
    assert "NOT LEVEL" in text
