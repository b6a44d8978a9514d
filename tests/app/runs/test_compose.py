"""Every option of every group composes, and unknown or ill-typed values are refused by name."""

import inspect
import io
import re
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from hydra.utils import get_object
from omegaconf import MISSING, OmegaConf
from torch import nn

import dynrank
from dynrank.app import train
from dynrank.app.keys import arguments_of
from dynrank.app.runs.config import LoraKeys, make, rank_pattern
from dynrank.app.runs.job import lora_arguments, make_scheduler
from dynrank.driver.checks import check_model
from dynrank.errors import ConfigurationError
from dynrank.schedules import early_budget
from dynrank.triggers import Run

CONF = Path(dynrank.__file__).parent / "conf"
OPTIONS = sorted(f"{path.parent.name}={path.stem}" for path in CONF.glob("*/*.yaml"))


@pytest.mark.parametrize("option", OPTIONS)
def test_option_composes_without_a_missing_value(option, monkeypatch):
    config = dynrank.compose([option])
    # Only a running job knows these values.
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "1")
    OmegaConf.register_new_resolver("hydra", lambda key: f"<{key}>", replace=True)
    assert not OmegaConf.missing_keys(config)
    OmegaConf.to_container(config, resolve=True)


def test_a_folder_of_ones_own_may_have_any_name(tmp_path):
    folder = tmp_path / "it's [mine]"
    (folder / "task").mkdir(parents=True)
    (folder / "task" / "mine.yaml").write_text("defaults: [classification]\n")
    assert dynrank.compose(["task=mine"], folder=folder).task.model == "minilm"


def test_output_that_has_no_arrow_ends_no_run(monkeypatch):
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding="latin-1"))
    monkeypatch.setattr(sys, "argv", ["dynrank-train", "--version"])
    train.main()
    print("32 → 16", flush=True)
    assert printed.getvalue().endswith(b"32 ? 16\n")


@pytest.mark.parametrize(("rank", "final"), [(7, [3, 1]), (32, [16, 4])])
def test_scaling_stays_and_the_final_rank_follows_the_starting_rank(rank, final):
    for name, end in zip(("after_convergence", "early_budget", "anneal"), [final[0], *final], strict=True):
        config = dynrank.compose([f"lora.rank={rank}", f"schedule={name}"])
        assert config.schedule.final_rank == end
        model = dynrank.add_lora(nn.Sequential(nn.Linear(32, 32)), **lora_arguments(config, None))
        ((_, layer),) = dynrank.lora_layers(model)
        assert (layer.rank, layer.scaling) == (rank, 2)
        check_model(model, make_scheduler(config.schedule).driver.stages, Run(total_steps=None))


def test_default_is_early_budget_and_debug_wins_over_groups_and_a_key_over_what_follows_from_others():
    assert make_scheduler(dynrank.compose().schedule).driver.stages == early_budget(16)
    assert dynrank.compose(["debug=smoke"]).checkpoint_every == 4
    config = dynrank.compose(["lora.rank=4", "lora.alpha=3"])
    assert config.lora.alpha == 3
    # Values may be changed after compose, too.
    config.lora.rank = 8
    assert config.schedule.final_rank == 4


@pytest.mark.parametrize("key", ["optimizer.options.eps", "trainer.limit_val_batches", "rank_map.rank_pattern.q"])
def test_open_groups_take_new_keys_with_and_without_a_plus(key):
    for plus in ("", "+"):
        assert OmegaConf.select(dynrank.compose([f"{plus}{key}=4"]), key) == 4


def test_rules_of_the_configuration_come_before_those_of_a_file(tmp_path):
    file = tmp_path / "ranks.yaml"
    file.write_text("rank_pattern: {query: {rank: 8, pinned: true}, value: 3}\n")
    config = dynrank.compose(["rank_map=head_16", f"rank_map.file={file}", "rank_map.rank_pattern.value=2"])
    assert [*rank_pattern(config.rank_map).items()] == [
        ("lm_head", {"rank": 16, "alpha": 32, "pinned": False}),
        ("value", {"rank": 2, "pinned": False}),
        ("query", {"rank": 8, "pinned": True}),
    ]


def test_target_is_whatever_the_user_names(tmp_path, monkeypatch):
    (tmp_path / "my_pkg.py").write_text("class Task:\n    def __init__(self, size): self.inverse = 1 / size\n")
    monkeypatch.syspath_prepend(tmp_path)

    def made(**values):
        return make(OmegaConf.create({"task": values}).task, "task")

    assert made(_target_="my_pkg.Task", size=2).inverse == 0.5
    for target, named in [("my_pkg.Tsk", "Tsk"), ("nowhere.Task", "nowhere"), (None, "_target_"), ("", "_target_")]:
        with pytest.raises(ConfigurationError, match=named) as caught:
            made(_target_=target)
        assert "set task" in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigurationError, match="unexpected keyword argument 'width'"):
        made(_target_="my_pkg.Task", width=3)
    # A fault of the class keeps its own traceback.
    with pytest.raises(ZeroDivisionError):
        made(_target_="my_pkg.Task", size=0)


def test_arguments_are_read_from_files_as_the_objects_have_them():
    """Keys are checked by them before the objects are imported."""
    targets = {
        name for file in CONF.rglob("*.yaml") for name in re.findall(r"_target_: (dynrank[\w.]+)", file.read_text())
    }
    targets |= {f"dynrank.triggers.{name}" for name in ("At", "Gap", "Plateau")} | {"lightning.pytorch.Trainer"}
    for target in targets | {f"dynrank.targets.{name}" for name in ("Budget", "Energy", "Rank")}:
        assert {*arguments_of(target)} == {*inspect.signature(get_object(target)).parameters}, target


def test_keys_of_lora_are_the_arguments_of_add_lora_with_their_defaults():
    arguments = inspect.signature(dynrank.add_lora).parameters
    of_others = {"model", "rank_map", "modules_to_save", "dtype"}
    defaults = {name: argument.default for name, argument in arguments.items() if name not in of_others}
    expected = {name: MISSING if d is inspect.Parameter.empty else d for name, d in defaults.items()}
    assert asdict(LoraKeys()) == expected
