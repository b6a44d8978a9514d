"""LightningCLI builds schedules, stages and rank maps from YAML."""

import sys

import pytest

from dynrank.callbacks import RankScheduler
from dynrank.rank_map import RankBounds
from dynrank.schedules import How, Stage, anneal
from dynrank.targets import Rank
from dynrank.triggers import Plateau

pytest.importorskip("jsonargparse", reason="needs jsonargparse: pip install 'jsonargparse[signatures]'")

OWN = """
        - {when: {class_path: dynrank.triggers.Plateau, init_args: {monitor: val/los}}, deadline: 0.5,
           to: {class_path: dynrank.targets.Rank, init_args: {rank: 2}}, how: {lr_factor: sqrt}}
"""
PRESET = " {class_path: dynrank.schedules.anneal, init_args: {final_rank: 4, steps: 3}}"
RUN = r"""
trainer:
  logger: false
  callbacks:
    class_path: dynrank.callbacks.RankScheduler
    init_args:
      rank_map: {q_proj: {pinned: true}, 'layers\.[0-3]\..*': {highest: 8, lowest: 2}}
      schedule:"""


# Lightning 2.6 calls jsonargparse by names that are on their way out.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("schedule", "stages"),
    [
        (OWN, [Stage(Plateau("val/los"), Rank(2), deadline=0.5, how=How(lr_factor="sqrt"))]),
        (PRESET, anneal(4, steps=3)),
    ],
)
def test_schedule_and_rank_map_stand_in_the_file_of_lightning_cli(regression, tmp_path, monkeypatch, schedule, stages):
    from lightning.pytorch.cli import LightningCLI

    file = tmp_path / "run.yaml"
    file.write_text(RUN + schedule)
    monkeypatch.setattr(sys, "argv", ["fit.py", "--config", str(file)])
    cli = LightningCLI(regression[0], run=False, save_config_callback=None, seed_everything_default=1)
    (driver,) = (found.driver for found in cli.trainer.callbacks if isinstance(found, RankScheduler))
    assert driver.stages == stages
    # The order of the rules counts.
    pinned, bound = driver.rules.items()
    assert pinned == ("q_proj", RankBounds(pinned=True))
    assert bound == (r"layers\.[0-3]\..*", RankBounds(highest=8, lowest=2))
