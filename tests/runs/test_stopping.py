"""A run that Ctrl-C ends: after the step, or at once."""

import os
import signal

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from dynrank.callbacks import AdapterCheckpoint
from dynrank.runs.command import override
from dynrank.runs.trainer import STOP_SIGNALS, stoppable


class Saver(AdapterCheckpoint):
    stop_signals = STOP_SIGNALS


def fit_and_test(trainer, module, train, val):
    with stoppable(trainer, None):
        trainer.fit(module, train)
        trainer.test(module, val)


@pytest.mark.filterwarnings("ignore")
def test_a_second_ctrl_c_does_not_wait_for_the_end_of_the_step(regression, tmp_path, capsys):
    make, data, trainer = regression
    saver = Saver(tmp_path, save_last=True, every_n_train_steps=1)
    module = make()
    pressed = []
    step = module.training_step

    def twice_in_the_second_step(batch, batch_idx):
        if batch_idx == 1:
            for press in range(2):
                os.kill(os.getpid(), signal.SIGINT)
                pressed.append(press)
        return step(batch, batch_idx)

    module.training_step = twice_in_the_second_step
    with pytest.raises(KeyboardInterrupt):
        fit_and_test(trainer(max_steps=4, callbacks=[saver], enable_checkpointing=True), module, *data())
    # The first Ctrl-C let the step go on, and the second did not return.
    assert pressed == [0]
    assert "Ctrl-C: stopped after step 1; go on with" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")
def test_ctrl_c_in_the_test_says_how_to_go_on(regression, tmp_path, capsys):
    make, data, trainer = regression
    saver = Saver(tmp_path, save_last=True, every_n_train_steps=1)
    module = make()

    def interrupted(*_):
        os.kill(os.getpid(), signal.SIGINT)

    module.test_step = interrupted
    with pytest.raises(KeyboardInterrupt):
        fit_and_test(trainer(max_steps=2, callbacks=[saver], enable_checkpointing=True), module, *data())
    assert "Ctrl-C: stopped after step 2; go on with ckpt_path=" in capsys.readouterr().err


@pytest.mark.parametrize("folder", ["plain/2026-11-28_run.1", "josé/run", "two words", "o'clock"])
def test_override_is_what_hydra_reads(folder):
    (parsed,) = OverridesParser.create().parse_overrides([override("hydra.run.dir", folder)])
    assert parsed.value() == folder
