"""The wheel holds what the repository runs: built, installed into a new environment, launched from somewhere else."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import dynrank

ROOT = Path(__file__).resolve().parents[1]
SHORT = ["debug=smoke", "task.limit=16", "plots=false", "trainer.max_steps=4", "trainer.val_check_interval=2"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    # The build reads a copy, because a wheel also takes what an earlier build left in build/.
    source = folder / "source"
    ignored = shutil.ignore_patterns(".*", "build", "*.egg-info", "outputs", "multirun", "__pycache__")
    shutil.copytree(ROOT, source, symlinks=True, ignore=ignored)
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(source)],
        check=True, capture_output=True,
    )  # fmt: skip
    (file,) = folder.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    """A venv with the wheel; the heavy dependencies are lent from this one by a .pth file, after its own packages."""
    folder = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--no-index", "--no-compile", str(wheel)], check=True, capture_output=True)
    (own,) = folder.glob("lib/python*/site-packages")
    (lent,) = {p for p in map(Path, sys.path) if p.name == "site-packages" and (p / "torch").is_dir()}
    (own / "lent.pth").write_text(f"{lent}\n")
    return folder


def launch(environment, *arguments, cwd):
    ours = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [environment / "bin" / arguments[0], *arguments[1:]], cwd=cwd, capture_output=True, text=True,
        env={**ours, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}, check=False,
    )  # fmt: skip


def test_wheel_holds_the_configuration_and_kernels_as_files(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for path in [
        *ROOT.glob("conf/**/*.yaml"),
        *ROOT.glob("kernels/*.py"),
        ROOT / "kernels/measured.csv",
        *ROOT.glob("dynrank/**/*.py"),
        *ROOT.glob("dynrank/app/models/*.json"),
        *ROOT.glob("dynrank/**/*.jinja"),
    ]:
        relative = path.relative_to(ROOT).as_posix()
        assert (relative if relative.startswith("dynrank/") else f"dynrank/{relative}") in names
    assert not [name for name in names if name.startswith(("conf/", "kernels/", "tests/"))]


def test_wheel_runs_a_whole_job_from_elsewhere(environment, tiny_bert, tmp_path):
    imported = launch(environment, "python", "-c", "import dynrank; print(dynrank.__file__)", cwd=tmp_path)
    assert str(environment) in imported.stdout
    assert launch(environment, "dynrank", "--version", cwd=tmp_path).stdout == f"dynrank {dynrank.__version__}\n"
    small = [*SHORT, f"task.model={tiny_bert}", "hydra.run.dir=run"]
    done = launch(environment, "dynrank-train", *small, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "adapter" / "README.md").is_file()


def test_the_citation_has_the_version():
    assert f"\nversion: {dynrank.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_a_program_needs_no_triton_and_imports_no_library_that_takes_long():
    code = """
import sys
sys.modules["triton"] = None
import dynrank
assert not {"torch", "matplotlib", "pandas", "pydantic"} & {*sys.modules}
import torch
from dynrank.kernels import triton_launch
assert triton_launch.unsupported(torch.ones(2, 3).half(), 8) == "Triton is not installed"
net = dynrank.add_lora(torch.nn.Sequential(torch.nn.Linear(4, 4)), rank=2)
# These take long to import.
slow = {"transformers", "lightning", "datasets", "hydra", "peft", "sympy", "torch.distributed.tensor"}
assert not slow & {*sys.modules}
dynrank.resize(net, 1, optimizers=())
assert "rank" in str(dynrank.ranks(net))
assert not {"peft", "matplotlib", "pandas"} & {*sys.modules}
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
