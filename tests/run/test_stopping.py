"""SIGTERM outside of training: there is nothing to finish, so a run ends at once."""

import os
import signal

import pytest
from lightning.pytorch.utilities.exceptions import SIGTERMException

import dynrank
from dynrank.callbacks import AdapterCheckpoint
from dynrank.run import job
from dynrank.run.stopping import stoppable


def told_to_end(*_, **__):
    os.kill(os.getpid(), signal.SIGTERM)
    pytest.fail("the run goes on")


def test_sigterm_while_a_run_is_built_ends_it_with_exit_code_0_and_a_line(tmp_path, monkeypatch, capsys):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(job, "build", told_to_end)
    with pytest.raises(SystemExit) as caught:
        job.run(dynrank.compose([]), tmp_path / "run")
    assert not caught.value.code
    assert "SIGTERM: stopped before training; there is no checkpoint yet" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before
    assert not (tmp_path / "run").exists()


def fit_and_test(trainer, module, train, val):
    with stoppable(trainer, None):
        trainer.fit(module, train)
        trainer.test(module, val)


@pytest.mark.filterwarnings("ignore")  # Lightning's advice about small data
@pytest.mark.parametrize(("hook", "said"), [("setup", "step 0; there is no"), ("on_test_start", "step 2; go on with")])
def test_sigterm_before_the_first_and_after_the_last_step_ends_it_too(hook, said, regression, tmp_path, capsys):
    make, data, trainer = regression
    saver, module = AdapterCheckpoint(tmp_path, save_last=True, every_n_train_steps=1), make()
    module.test_step = module.validation_step
    setattr(module, hook, told_to_end)
    with pytest.raises(SIGTERMException):
        fit_and_test(trainer(max_steps=2, callbacks=[saver], enable_checkpointing=True), module, *data())
    assert f"SIGTERM: stopped after {said}" in capsys.readouterr().err
