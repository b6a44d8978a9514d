"""LightningCLI builds every schedule and trigger from YAML, equal to what Hydra makes of conf/."""

import sys
from pathlib import Path

import pytest
import yaml

import dynrank
from dynrank.app.runs.config import plain
from dynrank.app.runs.job import make_scheduler
from dynrank.callbacks import RankScheduler
from dynrank.rank_map import RankBounds

jsonargparse = pytest.importorskip("jsonargparse", reason="needs jsonargparse: pip install 'jsonargparse[signatures]'")

SCHEDULES = Path(dynrank.__file__).parent / "conf" / "schedule"
NAMES = [f"schedule={file.stem}" for file in SCHEDULES.glob("*.yaml") if file.stem != "stages"]
PARTS = [f"schedule/trigger={file.stem}" for file in (SCHEDULES / "trigger").glob("*.yaml")]


def as_class(node):
    """A node of Hydra's as jsonargparse writes it."""
    if isinstance(node, dict) and "_target_" in node:
        arguments = {key: as_class(value) for key, value in node.items() if key != "_target_"}
        return {"class_path": node["_target_"], **({"init_args": arguments} if arguments else {})}
    return node


@pytest.fixture(scope="module")
def parser():
    made = jsonargparse.ArgumentParser(exit_on_error=False)
    made.add_class_arguments(RankScheduler, "ranks")
    return made


@pytest.mark.parametrize("override", [*NAMES, *PARTS])
def test_schedule_is_built_as_hydra_builds_it(override, parser):
    node = dynrank.compose([override] if override in NAMES else ["schedule=after_convergence", override]).schedule
    found = parser.parse_string(yaml.safe_dump({"ranks": {"schedule": as_class(plain(node))}}))
    assert parser.instantiate(found).ranks.driver.stages == make_scheduler(node).driver.stages


# Lightning 2.6 calls jsonargparse by names that are on their way out.
@pytest.mark.filterwarnings("ignore")
def test_stages_of_ones_own_and_a_rank_map_stand_in_the_file_of_a_lightning_cli(regression, tmp_path, monkeypatch):
    from lightning.pytorch.cli import LightningCLI

    module_class, _, _ = regression
    stage = {"when": {"class_path": "dynrank.triggers.Plateau"}, "to": {"class_path": "dynrank.targets.Rank"}}
    stage["when"]["init_args"] = {"monitor": "val/loss"}
    stage["to"]["init_args"] = {"rank": 2}
    callback = {"class_path": "dynrank.callbacks.RankScheduler"}
    rank_map = {"q_proj": {"pinned": True}, r"layers\.[0-3]\..*": {"highest": 8, "lowest": 2}}
    callback["init_args"] = {
        "schedule": [{**stage, "deadline": 0.5, "how": {"lr_factor": "sqrt"}}],
        "rank_map": rank_map,
    }
    file = tmp_path / "run.yaml"
    # The order of the rules counts.
    file.write_text(yaml.safe_dump({"trainer": {"logger": False, "callbacks": [callback]}}, sort_keys=False))
    monkeypatch.setattr(sys, "argv", ["fit.py", "--config", str(file)])
    cli = LightningCLI(module_class, run=False, save_config_callback=None, seed_everything_default=1)
    (scheduler,) = (found for found in cli.trainer.callbacks if isinstance(found, RankScheduler))
    assert scheduler.driver.stages[0].deadline == 0.5
    assert scheduler.driver.stages[0].to.rank == 2
    assert scheduler.driver.stages[0].how.lr_factor == "sqrt"
    pinned, bound = scheduler.driver.rules.items()
    assert pinned == ("q_proj", RankBounds(pinned=True))
    assert bound == (r"layers\.[0-3]\..*", RankBounds(highest=8, lowest=2))
