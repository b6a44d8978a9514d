"""The folder of --out: whole or not there, whatever goes wrong, and nobody else's files are touched."""

import os
import stat

import pytest
from safetensors import SafetensorError

from dynrank.errors import ConfigurationError
from dynrank.output.output_folder import check_free, whole_or_nothing


def write(out):
    with whole_or_nothing(out) as folder:
        (folder / "file").write_text("whole")


@pytest.mark.parametrize("out", ["out", "empty", "new/deep"])
def test_folder_appears_as_readable_as_any_other(out, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    umask = os.umask(0o022)
    try:
        with whole_or_nothing(tmp_path / out) as folder:
            # safetensors makes its files with this mode.
            os.close(os.open(folder / "file", os.O_CREAT, 0o600))
            assert not (tmp_path / out / "file").exists()
    finally:
        os.umask(umask)
    made = tmp_path / out
    assert [stat.S_IMODE(path.stat().st_mode) for path in (made, made / "file")] == [0o755, 0o644]
    assert not list(made.parent.glob("*.part"))
    # The user still stands in the same folder.
    assert os.listdir() == (["file"] if out == "empty" else [])


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), SafetensorError("no space"), KeyboardInterrupt()]
)
def test_an_error_leaves_nothing(error, tmp_path):
    def fail():
        with whole_or_nothing(tmp_path / "out") as folder:
            (folder / "file").write_text("half")
            raise error

    with pytest.raises((ConfigurationError, KeyboardInterrupt)) as caught:
        fail()
    assert isinstance(error, KeyboardInterrupt) or f"cannot write to out '{tmp_path / 'out'}': " in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("out", ["file/below", "loop", "loop/below"])
def test_a_folder_that_cannot_be_made_is_one_line(out, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "loop").symlink_to("loop")
    check_free(tmp_path / "free", tmp_path / "loop")
    with pytest.raises(ConfigurationError, match="cannot write to out .*(Not a directory|Too many levels)"):
        write(tmp_path / out)
    assert {path.name for path in tmp_path.iterdir()} == {"file", "loop"}


def test_check_free_names_a_folder_that_is_taken(tmp_path):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "mine").write_text("mine")
    for out in (tmp_path / "used", tmp_path / "used" / "mine"):
        with pytest.raises(ConfigurationError, match="out must be a new or empty folder"):
            check_free(out)
    with pytest.raises(ConfigurationError, match="out must be another folder"):
        check_free(tmp_path / "new" / ".." / "used", tmp_path / "used")
    check_free(tmp_path / "new", tmp_path / "used")


def test_of_two_writers_the_second_to_end_is_refused(tmp_path):
    def second():
        with whole_or_nothing(tmp_path / "out") as folder:
            (folder / "file").write_text("second")
            write(tmp_path / "out")

    with pytest.raises(ConfigurationError, match=r"out must be a new or empty folder, got .*out'$"):
        second()
    assert [(file.name, file.read_text()) for file in (tmp_path / "out").iterdir()] == [("file", "whole")]
