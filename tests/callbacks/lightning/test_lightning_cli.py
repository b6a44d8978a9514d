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
from dynrank.schedules import How, Stage
from dynrank.targets import Rank
from dynrank.triggers import Plateau

jsonargparse = pytest.importorskip("jsonargparse", reason="needs jsonargparse: pip install 'jsonargparse[signatures]'")

SCHEDULES = Path(dynrank.__file__).parent / "conf" / "schedule"
NAMES = [f"schedule={file.stem}" for file in SCHEDULES.glob("*.yaml") if file.stem != "stages"]
RUN = r"""
trainer:
  logger: false
  callbacks:
    class_path: dynrank.callbacks.RankScheduler
    init_args:
      schedule:
        - {when: {class_path: dynrank.triggers.Plateau, init_args: {monitor: val/los}}, deadline: 0.5,
           to: {class_path: dynrank.targets.Rank, init_args: {rank: 2}}, how: {lr_factor: sqrt}}
      rank_map: {q_proj: {pinned: true}, 'layers\.[0-3]\..*': {highest: 8, lowest: 2}}
"""
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

    file = tmp_path / "run.yaml"
    file.write_text(RUN)
    monkeypatch.setattr(sys, "argv", ["fit.py", "--config", str(file)])
    cli = LightningCLI(regression[0], run=False, save_config_callback=None, seed_everything_default=1)
    (driver,) = (found.driver for found in cli.trainer.callbacks if isinstance(found, RankScheduler))
    assert driver.stages == [Stage(Plateau("val/los"), Rank(2), deadline=0.5, how=How(lr_factor="sqrt"))]
    # The order of the rules counts.
    pinned, bound = driver.rules.items()
    assert pinned == ("q_proj", RankBounds(pinned=True))
    assert bound == (r"layers\.[0-3]\..*", RankBounds(highest=8, lowest=2))
