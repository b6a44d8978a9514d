"""Every private name of Lightning that is used is there, and gives what its wrapper says."""

import lightning
import pytest
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

from dynrank.callbacks.lightning import private


class Asking(lightning.Callback):
    def on_validation_batch_end(self, trainer, *_):
        self.logged = {result.meta.name: result.value for result in private.results(trainer).values()}

    def on_validation_end(self, trainer, *_):
        self.metrics = private.metrics_of_callbacks(trainer)

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 3:
            with private.nothing_logged(trainer):
                trainer._logger_connector._callback_metrics["val/loss"] = None
            with private.first_batch_kept(trainer):
                before, trainer._logger_connector._first_loop_iter = trainer._logger_connector._first_loop_iter, None
            self.kept = trainer._logger_connector._first_loop_iter is before
            self.place = private.loops_state(trainer)["fit_loop"]
            private.log_step(trainer)
            private.load_place_in_data(trainer)
            private.number_steps_for_loggers(trainer)


def test_names_of_a_run_are_there(regression, tmp_path):
    make, data, trainer = regression
    asking, checkpoint = Asking(), ModelCheckpoint(tmp_path, every_n_train_steps=2)
    made = trainer(callbacks=[asking, checkpoint], max_steps=4, val_check_interval=2, enable_checkpointing=True)
    made.fit(make(), *data())
    assert "val/loss" in asking.logged
    assert "val/loss" in asking.metrics
    assert asking.kept
    assert "epoch_loop.batch_progress" in asking.place
    assert made.callback_metrics["val/loss"] is not None
    assert private.last_saved(checkpoint).startswith(str(tmp_path))


def test_names_of_callbacks_and_strategies_are_there():
    assert private.average_model(EMAWeightAveraging()) is None
    assert "_average_model" in vars(EMAWeightAveraging())
    assert private.average_model(lightning.Callback()) is None
    assert private.start_method(DDPStrategy(start_method="popen")) == "popen"
    assert private.communication_state(DDPStrategy()) is None
    assert private.tensor_parallel_size(ModelParallelStrategy(tensor_parallel_size=1)) == 1
    for parts in (True, False):
        assert private.saves_in_parts(ModelParallelStrategy(save_distributed_checkpoint=parts)) is parts
    with pytest.raises(AttributeError):
        private.start_method(object())
