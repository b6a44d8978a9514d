"""A warning that is attributed to our code fails a test (filterwarnings in pyproject.toml); a library's does not."""

import pytest
import torch
from torch import nn

from dynrank import add_lora
from dynrank.callbacks import RankScheduler
from dynrank.schedules import Stage
from dynrank.targets import Rank
from dynrank.triggers import Plateau


def warn_within(module):
    exec("import warnings; warnings.warn('said', FutureWarning)", {"__name__": module})


@pytest.mark.parametrize("module", ["dynrank", "dynrank.kernels.backends", __name__])
def test_what_is_said_to_our_code_is_an_error(module):
    with pytest.raises(FutureWarning, match="said"):
        warn_within(module)


@pytest.mark.parametrize("module", ["torch._dynamo.guards", "dynrank_extras.tests"])
def test_what_a_library_says_of_itself_is_none(module):
    warn_within(module)


def test_what_we_say_under_lightning_is_an_error(regression):
    """Lightning's own function warns here, in Lightning's loop."""
    module_class, data, trainer = regression
    scheduler = RankScheduler(Stage(Plateau(patience=99), Rank(2)))
    with pytest.raises(UserWarning, match="training ended before stage 1"):
        trainer(max_steps=2, callbacks=[scheduler]).fit(module_class(), *data())


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.router, self.stacked = nn.Linear(4, 2), nn.Parameter(torch.zeros(2, 4, 4))


def test_what_we_say_of_a_model_is_an_error():
    with pytest.raises(UserWarning, match="of the model stays frozen"):
        add_lora(Experts(), rank=2)
