"""Our own warnings fail a test (filterwarnings in pyproject.toml), wherever they are attributed to."""

import pytest

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
