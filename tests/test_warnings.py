"""Our own warnings fail a test (filterwarnings in pyproject.toml), wherever they are attributed to."""

import pytest
import torch
from torch import nn

from dynrank import add_lora
from dynrank.callbacks import RankScheduler
from dynrank.schedules import Stage
from dynrank.targets import Rank
from dynrank.triggers import Plateau


def test_what_we_say_under_lightning_is_an_error(regression):
    """Lightning's own function warns here, in Lightning's loop."""
    module_class, data, trainer = regression
    scheduler = RankScheduler(Stage(Plateau(patience=99), Rank(2)))
    with pytest.raises(UserWarning, match="training ended before stage 1"):
        trainer(max_steps=2, callbacks=[scheduler]).fit(module_class(), *data())


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.router = nn.Linear(4, 2)
        self.stacked = nn.Parameter(torch.zeros(2, 4, 4))


def test_what_we_say_of_a_model_is_an_error():
    with pytest.raises(UserWarning, match="of the model stays frozen"):
        add_lora(Experts(), rank=2)
