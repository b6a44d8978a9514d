"""A run that Ctrl-C ends: after the step, or at once."""

import os
import signal

import pytest

from dynrank.app.runs.trainer import STOP_SIGNALS, stoppable
from dynrank.callbacks import AdapterCheckpoint


class Saver(AdapterCheckpoint):
    stop_signals = STOP_SIGNALS


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("where", "returned", "step"), [("training_step", [0], 1), ("test_step", [], 2)])
def test_ctrl_c_says_how_to_go_on_and_only_the_first_in_a_step_waits_for_its_end(
    where, returned, step, regression, tmp_path, capsys
):
    make, data, trainer = regression
    module = make()
    train, val = data()
    of_module = module.training_step
    pressed = []

    def twice(batch, batch_idx):
        # The first step leaves a checkpoint.
        if where == "test_step" or batch_idx == 1:
            for press in range(2):
                os.kill(os.getpid(), signal.SIGINT)
                pressed.append(press)
        return of_module(batch, batch_idx)

    vars(module)[where] = twice
    saver = Saver(tmp_path / "checkpoints", filename="last", every_n_train_steps=1)
    run = trainer(max_steps=2, callbacks=[saver], enable_checkpointing=True)
    before = [signal.getsignal(number) for number in STOP_SIGNALS]

    def whole():
        with stoppable(run, tmp_path):
            run.fit(module, train)
            run.test(module, val)

    with pytest.raises(KeyboardInterrupt):
        whole()
    assert pressed == returned
    advice = f"go on by the same command with ckpt_path=last hydra.run.dir={tmp_path}"
    assert f"Ctrl-C: stopped after step {step}; {advice}\n" in capsys.readouterr().err
    # Lightning ignores Ctrl-C from then on, in a notebook for good.
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before
