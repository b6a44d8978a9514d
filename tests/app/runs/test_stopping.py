"""A run that Ctrl-C ends: after the step, or at once."""

import os
import signal

import pytest

from dynrank.app.runs.trainer import STOP_SIGNALS, stoppable
from dynrank.callbacks import AdapterCheckpoint


class Saver(AdapterCheckpoint):
    stop_signals = STOP_SIGNALS


@pytest.fixture
def ended(regression, tmp_path, capsys):
    """Trains and tests with other methods of the module until Ctrl-C ends it; returns what that prints."""
    make, data, trainer = regression

    def run(steps, **methods):
        module = make()
        vars(module).update(methods)
        saver = Saver(tmp_path / "checkpoints", filename="last", every_n_train_steps=1)
        run = trainer(max_steps=steps, callbacks=[saver], enable_checkpointing=True)
        train, val = data()
        with stoppable(run, tmp_path):
            run.fit(module, train)
            run.test(module, val)

    def said(steps, **methods):
        with pytest.raises(KeyboardInterrupt):
            run(steps, **methods)
        return capsys.readouterr().err

    return said


@pytest.mark.filterwarnings("ignore")
def test_a_second_ctrl_c_does_not_wait_for_the_end_of_the_step(ended, regression):
    step = regression[0]().training_step
    pressed = []

    def twice_in_the_second_step(batch, batch_idx):
        if batch_idx == 1:
            for press in range(2):
                os.kill(os.getpid(), signal.SIGINT)
                pressed.append(press)
        return step(batch, batch_idx)

    said = ended(4, training_step=twice_in_the_second_step)
    # The first Ctrl-C let the step go on, and the second did not return.
    assert pressed == [0]
    assert "Ctrl-C: stopped after step 1; go on by" in said


@pytest.mark.filterwarnings("ignore")
def test_ctrl_c_in_the_test_says_how_to_go_on(ended, tmp_path):
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    said = ended(2, test_step=lambda *_: os.kill(os.getpid(), signal.SIGINT))
    advice = f"go on by the same command with ckpt_path=last hydra.run.dir={tmp_path}"
    assert f"Ctrl-C: stopped after step 2; {advice}\n" in said
    # Lightning ignores Ctrl-C from then on, in a notebook for good.
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before
