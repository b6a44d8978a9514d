"""A run from Python is the run of the command, and its record can be read again."""

import pytest
from omegaconf import OmegaConf

import dynrank
from dynrank.errors import ConfigurationError

pytestmark = [
    pytest.mark.filterwarnings("ignore:Experiment logs directory"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_bert):
    """(configuration, its text before the run, folder, record)."""
    folder = tmp_path_factory.mktemp("python")
    rows = [
        "text,label",
        *(f"{word} number {i},{label}" for i in range(30) for word, label in (("a", "bad"), ("b", "ok"))),
    ]
    (folder / "rows.csv").write_text("\n".join(rows))
    overrides = ["debug=smoke", "task=classification", f"task.model={tiny_bert}", f"data.train={folder / 'rows.csv'}"]
    config = dynrank.compose([*overrides, "schedule=early_budget", "trainer.enable_progress_bar=false", "plots=false"])
    # Values may be changed after compose.
    config.lora.rank = 4
    config.trainer.max_steps = 6
    before = str(config)
    return config, before, folder / "run", dynrank.run(config, str(folder / "run"))


def test_the_record_has_configuration_summary_history_and_metrics(finished):
    config, before, folder, run = finished
    assert str(config) == before
    assert run.config["lora"]["rank"] == 4
    assert OmegaConf.create(run.config).schedule.final_rank == 2
    assert {ranks[0] for ranks in run.ranks().values()} == {4}
    assert {name: ranks[-1] for name, ranks in run.ranks().items()} == run.summary.final_ranks
    assert [change.step for change in run.history] == [2]
    assert len(run.metrics["train/loss"][1]) == 6
    assert run.summary.test["test/loss"] > 0
    again = dynrank.read_run(folder)
    assert (again.metrics, again.summary, repr(again)) == (run.metrics, run.summary, repr(run))
    assert {layer.layer: layer.rank for layer in dynrank.inspect(folder)} == run.summary.final_ranks


def test_a_folder_with_a_run_is_refused(finished):
    config, _, folder, _ = finished
    with pytest.raises(ConfigurationError, match="holds a run already"):
        dynrank.run(config, folder)
