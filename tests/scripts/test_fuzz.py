"""The fuzz for one case: what it prints repeats it."""

import pytest


def test_fuzz_repeats_a_case_by_its_seed(main, capsys):
    with pytest.raises(SystemExit, match="0"):
        main("fuzz", "--seed", 3)
    printed = capsys.readouterr().out
    assert "1 cases before seed 4" in printed
    assert "1 compared whole" in printed
