"""Every block of the README that a user may copy is run as printed, in order, in one empty folder."""

import os
import re
import subprocess
import sys
from pathlib import Path

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(sh|python|yaml)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def run(command, folder):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_every_block_runs_as_printed(tmp_path):
    assert [language for language, _ in BLOCKS] == [
        "sh",
        "python",
        "python",
        "python",
        "yaml",
        "sh",
        "python",
        "sh",
        "sh",
    ]
    printed = {}
    for index, (language, text) in enumerate(BLOCKS):
        if language == "yaml":
            (tmp_path / "ranks.yaml").write_text(text)  # the README says: save this as ranks.yaml
        elif language == "python":
            printed[index] = run([sys.executable, "-W", "ignore", "-c", text], tmp_path)
        else:
            printed[index] = run(["bash", "-euc", text], tmp_path)
    assert "24 → 8" in printed[0]
    assert "[(8, 4), (8, 4)]" in printed[1]
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert printed[2].split()[-1] == "2"
    assert "[(16, 4), (16, 4)]" in printed[3]
    assert (tmp_path / "hf_adapter" / "adapter_model.safetensors").is_file()
    assert "37 layers" in printed[5]
    assert printed[6].split() == ["loss"]
    assert (tmp_path / "spectra.png").is_file()
    assert "4,194,304" in printed[7]
    assert (tmp_path / "plan.png").is_file()
    assert "parameters" in printed[8]


def test_files_and_keys_named_in_the_readme_exist():
    root = Path(__file__).resolve().parents[1]
    table = README.split("## Files")[1].split("\n## ")[0]
    for name in re.findall(r"`((?:dynrank|kernels|conf|scripts)/[\w./]*)`", table):
        assert (root / name).exists(), name
