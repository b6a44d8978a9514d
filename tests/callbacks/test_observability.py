"""What a run tells: to any logger, to TensorBoard, in the summary of the model, in the progress bar, by phase."""

import csv
import json
import logging

import pytest
import torch
from lightning.pytorch.callbacks import ModelSummary, RichProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dynrank.callbacks import RankMonitor, RankProgressBar, RankScheduler, RunMeter
from dynrank.callbacks.run_meter import forget_peak_memory, peak_memory_bytes
from dynrank.schedules import Stage
from dynrank.targets import Rank
from dynrank.triggers import At


def fit(regression, callbacks, **options):
    module_class, data, trainer = regression
    scheduler = RankScheduler([Stage(At(step=4), Rank(3))])
    module = module_class()
    fitted = trainer(callbacks=[scheduler, *callbacks], max_steps=8, num_sanity_val_steps=0, **options)
    fitted.fit(module, *data())
    return module, scheduler, fitted


def test_every_logger_gets_rank_energy_and_effective_rank_of_each_layer(regression, tmp_path):
    logger = CSVLogger(tmp_path, name="", version="")
    _, scheduler, _ = fit(regression, [RankMonitor(model_name="net")], logger=logger, log_every_n_steps=1)
    logger.save()
    with (tmp_path / "metrics.csv").open(newline="") as opened:
        rows = list(csv.DictReader(opened))

    def column(name):
        return [(int(row["step"]), float(row[name])) for row in rows if row.get(name)]

    for layer in scheduler.history[0].layers:
        name = layer.layer.removeprefix("net.")
        assert column(f"rank/layer/{name}") == [(0, 6.0), (4, 3.0)]
        values = torch.tensor(layer.singular_values, dtype=torch.float64)
        kept = float(values[:3].square().sum() / values.square().sum())
        ((step, logged),) = column(f"energy_kept/{name}")
        assert (step, logged) == (4, pytest.approx(kept))
        share = values / values.sum()
        entropy = float(-(share * share.clamp_min(1e-300).log()).sum())
        ((_, logged),) = column(f"effective_rank/{name}")
        assert logged == pytest.approx(float(torch.tensor(entropy).exp()), rel=1e-5)


def test_tensorboard_gets_histograms_and_a_picture_of_the_spectra(regression, tmp_path):
    logger = TensorBoardLogger(tmp_path, name="", version="")
    fit(regression, [RankMonitor(model_name="net")], logger=logger, log_every_n_steps=1)
    logger.finalize("success")
    events = EventAccumulator(str(tmp_path), size_guidance={"histograms": 0, "images": 0}).Reload()
    assert set(events.Tags()["histograms"]) == {"spectrum/0", "spectrum/2"}
    (histogram,) = events.Histograms("spectrum/0")
    assert (histogram.step, histogram.histogram_value.num) == (4, 6)
    assert [event.step for event in events.Images("spectra")] == [4]
    assert "rank/layer/0" in events.Tags()["scalars"]


def test_summary_of_the_model_comes_again_after_a_change(regression, caplog):
    with caplog.at_level(logging.INFO, "lightning.pytorch.callbacks.model_summary"):
        module, _, _ = fit(regression, [RankMonitor(), ModelSummary()])
    trainable = [line for line in caplog.text.splitlines() if "Trainable params" in line]
    after = sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert [int(line.split()[0]) for line in trainable] == [2 * after, after]  # half the rank


def test_progress_bar_shows_the_ranks_and_no_total_of_epochs_that_there_is_not(regression):
    seen = []

    class Bar(RankProgressBar):
        def on_train_batch_end(self, trainer, pl_module, *rest):
            super().on_train_batch_end(trainer, pl_module, *rest)
            seen.append((self.get_metrics(trainer, pl_module)["rank"], self.train_progress_bar.description.strip()))

    fit(regression, [RankMonitor(), Bar()], enable_progress_bar=True)
    assert seen == [("6", "Epoch 0")] * 4 + [("3", "Epoch 0")] * 4


@pytest.mark.parametrize("bar", [TQDMProgressBar, RichProgressBar])
def test_other_progress_bars_show_the_mean_rank(regression, bar):
    seen = []

    class Bar(bar):
        def get_metrics(self, trainer, pl_module):
            metrics = super().get_metrics(trainer, pl_module)
            seen.append(metrics.get("rank"))
            return metrics

    fit(regression, [RankMonitor(), Bar()], enable_progress_bar=True)
    assert (seen[0], seen[-1]) == (6.0, 3.0)


def test_phases_divide_the_run_at_each_change(regression, tmp_path):
    module_class, data, trainer = regression

    class Tokens(RunMeter):
        """Of batches without a mask: one token a row."""

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            batch = {"attention_mask": torch.ones(len(batch[0]))}
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    meter, logger = Tokens(), CSVLogger(tmp_path, name="", version="")
    fit(regression, [meter], logger=logger, log_every_n_steps=1)
    assert [(p.first_step, p.mean_rank, p.tokens) for p in meter.phases] == [(0, 6.0, 32), (4, 3.0, 32)]
    assert all(phase.peak_memory_bytes > 0 and phase.tokens_per_second > 0 for phase in meter.phases)
    assert meter.tokens_per_second == pytest.approx(64 / sum(phase.train_seconds for phase in meter.phases))
    logger.save()
    with (tmp_path / "metrics.csv").open(newline="") as opened:
        rows = [row for row in csv.DictReader(opened) if row.get("phase/mean_rank")]
    assert [(row["step"], float(row["phase/mean_rank"])) for row in rows] == [("4", 6.0), ("8", 3.0)]


def test_peak_memory_is_that_since_it_was_forgotten():
    block = torch.ones(2**26)  # 256 MiB
    high = peak_memory_bytes()
    assert high > block.numel() * 4
    del block
    forget_peak_memory()
    assert peak_memory_bytes() < high - 2**27


def test_summary_of_a_run_has_its_phases(smoke_run):
    folder, _ = smoke_run
    summary = json.loads((folder / "summary.json").read_text())
    steps = [0, *(change["step"] for change in summary["changes"] if not change["undone"])]
    assert [phase["first_step"] for phase in summary["phases"]] == steps
    assert summary["peak_memory_bytes"] >= max(phase["peak_memory_bytes"] for phase in summary["phases"])
    assert all(phase["tokens_per_second"] > 0 for phase in summary["phases"])
