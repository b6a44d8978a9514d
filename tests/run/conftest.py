"""Entry points run in this process, which is much faster than a process each."""

import sys

import pytest


@pytest.fixture
def launch(monkeypatch, tmp_path, capsys):
    """Runs an entry point in an empty folder; returns its exit code, and what it printed to stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def call(main, *arguments):
        monkeypatch.setattr(sys, "argv", [main.__module__, *map(str, arguments)])
        monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # main() sets it; undone with the fixture
        code = 0
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        assert code != 2 or "error" in printed.err.lower()
        return code, printed.out, printed.err

    return call
