"""A run that Ctrl-C ends: after the step, or at once."""

import errno
import os
import re
import signal

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from lightning.fabric.loggers import csv_logs

from dynrank.app import train
from dynrank.app.runs.command import override
from dynrank.app.runs.trainer import STOP_SIGNALS, _advice, stoppable
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
        saver = Saver(tmp_path, save_last=True, every_n_train_steps=1)
        run = trainer(max_steps=steps, callbacks=[saver], enable_checkpointing=True)
        train, val = data()
        with stoppable(run, None, tmp_path):
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
    assert "Ctrl-C: stopped after step 1; go on with" in said


@pytest.mark.filterwarnings("ignore")
def test_ctrl_c_in_the_test_says_how_to_go_on(ended):
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    said = ended(2, test_step=lambda *_: os.kill(os.getpid(), signal.SIGINT))
    assert "Ctrl-C: stopped after step 2; go on with ckpt_path=" in said
    # Lightning ignores Ctrl-C from then on, in a notebook for good.
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


@pytest.mark.filterwarnings("ignore")
def test_ctrl_c_while_the_page_is_written_names_the_command_that_writes_it(ended, tmp_path):
    def end(*_):
        (tmp_path / "summary.json").touch()
        os.kill(os.getpid(), signal.SIGINT)

    assert f"the run has ended; its page: dynrank report {tmp_path}" in ended(1, test_step=end)


def test_a_folder_behind_a_link_goes_on_in_itself(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "run")
    assert _advice(str(tmp_path / "run/checkpoints/last.ckpt"), tmp_path / "link") == "go on with ckpt_path=last"


@pytest.mark.parametrize("folder", ["plain/2026-11-28_run.1", "josé/run", "two words", "o'clock"])
def test_override_is_what_hydra_reads(folder):
    (parsed,) = OverridesParser.create().parse_overrides([override("hydra.run.dir", folder)])
    assert parsed.value() == folder


def test_a_full_disk_is_one_line_that_says_how_to_go_on(launch, tmp_path, tiny_bert, monkeypatch):
    saves = []
    save = csv_logs._ExperimentWriter.save

    def full(self):
        saves.append(self)
        if len(saves) > 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(self)

    monkeypatch.setattr(csv_logs._ExperimentWriter, "save", full)
    (tmp_path / "rows.csv").write_text("text,label\n" + "\n".join(f"text {i},{'ab'[i % 2]}" for i in range(60)))
    own = ["task=classification", f"task.model={tiny_bert}", "data.train=rows.csv", "plots=false"]
    options = ["debug=smoke", "trainer.enable_progress_bar=false", "checkpoint_every=1", "hydra.run.dir=run"]
    code, _, said = launch(train.main, *own, *options)
    assert code == 1
    assert "Traceback" not in said
    (line,) = [line for line in said.splitlines() if line.startswith("error:")]
    assert re.match(
        r"error: the run in '.*run' cannot write .* after step \d+: No space left on device; free space; go", line
    )
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert launch(train.main, *own, *options, "ckpt_path=last")[0] == 0
