"""A run that ends at once: at SIGTERM outside of training, and at a second Ctrl-C in it."""

import os
import signal

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from lightning.pytorch.utilities.exceptions import SIGTERMException

import dynrank
from dynrank.callbacks import AdapterCheckpoint
from dynrank.run import job
from dynrank.run.command import override
from dynrank.run.stopping import CtrlC, stoppable


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


# Lightning gives advice about small data.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("hook", "said"), [("setup", "step 0; there is no"), ("on_test_start", "step 2; go on with")])
def test_sigterm_before_the_first_and_after_the_last_step_ends_it_too(hook, said, regression, tmp_path, capsys):
    make, data, trainer = regression
    saver, module = AdapterCheckpoint(tmp_path, save_last=True, every_n_train_steps=1), make()
    module.test_step = module.validation_step
    setattr(module, hook, told_to_end)
    with pytest.raises(SIGTERMException):
        fit_and_test(trainer(max_steps=2, callbacks=[saver], enable_checkpointing=True), module, *data())
    assert f"SIGTERM: stopped after {said}" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")
def test_a_second_ctrl_c_does_not_wait_for_the_end_of_the_step(regression, tmp_path, capsys):
    make, data, trainer = regression
    saver, module, pressed = AdapterCheckpoint(tmp_path, save_last=True, every_n_train_steps=1), make(), []
    step = module.training_step

    def twice_in_the_second_step(batch, batch_idx):
        if batch_idx == 1:
            for press in range(2):
                os.kill(os.getpid(), signal.SIGINT)
                pressed.append(press)
        return step(batch, batch_idx)

    module.training_step = twice_in_the_second_step
    with pytest.raises(KeyboardInterrupt):
        fit_and_test(trainer(max_steps=4, callbacks=[saver, CtrlC()], enable_checkpointing=True), module, *data())
    # The first Ctrl-C let the step go on, and the second did not return.
    assert pressed == [0]
    assert "Ctrl-C: stopped after step 1; go on with" in capsys.readouterr().err


@pytest.mark.parametrize("folder", ["plain/2026-11-28_run.1", "josé/run", "two words", "o'clock"])
def test_override_is_what_hydra_reads(folder):
    (parsed,) = OverridesParser.create().parse_overrides([override("hydra.run.dir", folder)])
    assert parsed.value() == folder
