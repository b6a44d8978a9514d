"""The core installation, ``pip install .``: a Python that has the packages that it brings, and no others."""

import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import dynrank

ROOT = Path(__file__).resolve().parents[1]
LOOP = (ROOT / "docs/own_loop.md").read_text(encoding="utf-8")
# What a folder or module is about, and needs beyond the core.
FOREIGN = {
    "callbacks": "lightning|transformers",
    "integrations": "transformers",
    "layers.peft_op": "peft",
    "kernels.triton_kernels": "triton",
    "plot": "matplotlib",
}


def add_requirement(requirement, found):
    """Add the distributions that a requirement brings to ``found``, each by its name."""
    wanted = Requirement(requirement)
    extras = wanted.extras or {""}
    if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
        return
    try:
        installed = distribution(wanted.name)
    # A package of another platform, which a marker of another form excludes.
    except PackageNotFoundError:
        return
    if installed.name in found:
        return
    found[installed.name] = installed
    for line in installed.requires or ():
        needed = Requirement(line)
        if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras):
            add_requirement(f"{needed.name}[{','.join(needed.extras)}]" if needed.extras else needed.name, found)


@pytest.fixture(scope="module")
def core(tmp_path_factory):
    """Runs a program in an environment with dynrank and the core's dependencies alone; returns what it prints."""
    place = tmp_path_factory.mktemp("core")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", place / "venv"], check=True)
    (packages,) = place.glob("venv/lib/python*/site-packages")
    found = {}
    for line in tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]:
        add_requirement(line, found)
    for installed in found.values():
        for top in {file.parts[0] for file in installed.files} - {"..", "__pycache__"}:
            link = packages / top
            if not link.exists():
                link.symlink_to(installed.locate_file(top))
    (packages / "dynrank").symlink_to(Path(dynrank.__file__).parent)

    def run(program, folder):
        command = [place / "venv/bin/python", "-I", "-W", "error::DeprecationWarning:dynrank", "-c", program]
        threads = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=folder, env=threads, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


EVERY_MODULE = """
import importlib, pathlib
import dynrank
root = pathlib.Path(dynrank.__file__).parent
files = [*root.rglob("*.py"), *(root / "kernels").glob("*.py")]
for file in sorted({file.relative_to(root) for file in files}):
    name = ".".join(("dynrank", *file.with_suffix("").parts)).removesuffix(".__init__")
    if not name.startswith(("dynrank.app", "dynrank.conf", "dynrank.train")):
        try:
            importlib.import_module(name)
        except Exception as error:
            print(name.removeprefix("dynrank."), error)
"""


def test_every_module_of_the_library_is_imported_or_is_about_a_package_that_it_names(core, tmp_path):
    for line in core(EVERY_MODULE, tmp_path).splitlines():
        name, _, said = line.partition(" ")
        (packages,) = [packages for place, packages in FOREIGN.items() if name.startswith(place)] or [""]
        assert packages, line
        assert re.search(packages, said), line


REST = """
print(dynrank.ranks(model))
print(*driver.history)
print(repr(driver.history[0].table()))
dynrank.resize(model, 3, optimizers=[optimizer])
dynrank.save_adapter(model, "adapter")
plain = torch.nn.Sequential(torch.nn.Linear(64, 64))
loaded = dynrank.load_adapter(plain, "adapter")
assert [layer.rank for _, layer in dynrank.lora_layers(loaded)] == [3]
print(dynrank.squeeze("adapter", "small", rank=2))
print(dynrank.inspect("small"))
dynrank.swap_adapter(loaded, "small")
dynrank.export_adapter("small", "padded", to="padded", multiple=8)
dynrank.export_adapter("small", "served", to="vllm")
merged = dynrank.merge(loaded)
assert type(merged[0]) is torch.nn.Linear
open("ranks.yaml", "w").write("rank_pattern: {'0': {rank: 8, pinned: true}}")
steered = dynrank.add_lora(torch.nn.Sequential(torch.nn.Linear(64, 64)), rank=16, rank_map="ranks.yaml")
assert [layer.rank for _, layer in dynrank.lora_layers(steered)] == [8]
"""


def test_the_plain_loop_trains_cuts_saves_loads_squeezes_inspects_merges_and_prints(core, tmp_path):
    (loop,) = re.findall(r"^```python\n(import torch\nfrom dynrank import RankDriver.*?)^```$", LOOP, re.M | re.S)
    printed = core(f"{loop}\nimport dynrank\n{REST}", tmp_path)
    assert re.search(r"rank change at step \d+: .*rank 16 → rank 4", printed)
    assert "LoRA layers" in printed


NEEDED = {
    "import dynrank; dynrank.compose": "dynrank.compose needs the package hydra",
    "from dynrank.app import train": "dynrank-train needs the package hydra",
    "from dynrank.callbacks import RankScheduler": "RankScheduler needs the package lightning",
    "from dynrank.callbacks import RankTrainerCallback": "RankTrainerCallback needs the package transformers",
}


@pytest.mark.parametrize("program", NEEDED)
def test_what_needs_more_says_so_in_one_sentence(core, program, tmp_path):
    said = core(f"try:\n    {program}\nexcept ValueError as error:\n    print(error)", tmp_path)
    assert said == f"{NEEDED[program]}: pip install 'dynrank[train]'\n"


@pytest.mark.parametrize(("name", "package"), [("dynrank", "typer"), ("dynrank-train", "hydra")])
def test_command_without_train_says_so_in_one_line(core, name, package, tmp_path):
    function = name.replace("-", "_")
    program = f"import sys; from dynrank.app.commands.start import {function} as main; sys.stderr = sys.stdout\n"
    program += "try:\n    main()\nexcept SystemExit as end:\n    print(end.code)"
    said = core(program, tmp_path)
    assert said == f"error: {name} needs the package {package}: pip install 'dynrank[train]'\n2\n"
