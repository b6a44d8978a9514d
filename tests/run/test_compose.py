"""Every option of every group composes, and unknown or ill-typed values are refused by name."""

from pathlib import Path

import pytest
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

import dynrank
from dynrank.errors import ConfigurationError
from dynrank.run.config import rank_pattern
from dynrank.run.job import make_scheduler
from dynrank.schedules import check_schedule
from dynrank.triggers import Run

CONF = Path(dynrank.__file__).parent / "conf"
DROPS = ["after_convergence", "squeeze_at_end", "squeeze_then_tune"]
OPTIONS = sorted(f"{path.parent.name}={path.stem}" for path in CONF.glob("*/*.yaml"))
GROUPS = {"task", "data", "lora", "schedule", "rank_map", "optimizer", "trainer", "logger"}
GROUPS |= {"experiment", "sweep", "debug"}


def test_groups_are_those_of_the_contract():
    assert {option.split("=")[0] for option in OPTIONS} == GROUPS


@pytest.mark.parametrize("option", OPTIONS)
def test_option_composes_without_a_missing_value(option):
    config = dynrank.compose([option])
    # what only a running job knows
    OmegaConf.register_new_resolver("hydra", lambda key: f"<{key}>", replace=True)
    assert not OmegaConf.missing_keys(config)
    OmegaConf.to_container(config, resolve=True)


def test_default_composition_is_that_of_the_contract():
    config = dynrank.compose()
    assert (config.lora.rank, config.schedule.final_rank) == (32, 16)
    assert config.task._target_.endswith("Classification")
    assert config.data._target_.endswith("icd10_terms")
    assert config.rank_map.file is None


@pytest.mark.parametrize(("rank", "final"), [(1, [1, 1, 1]), (7, [3, 1, 1]), (8, [4, 2, 1]), (32, [16, 8, 4])])
def test_the_final_rank_follows_the_starting_rank(rank, final):
    for names, end in zip((DROPS, ["halving_on_plateau"], ["anneal"]), final, strict=True):
        for name in names:
            config = dynrank.compose([f"lora.rank={rank}", f"schedule={name}"])
            assert config.schedule.final_rank == end
            stages = make_scheduler(config.schedule).driver.stages
            check_schedule(stages, highest=rank, run=Run(total_steps=None))


def test_slurm_takes_the_size_of_the_job_from_its_variables(monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "4")
    monkeypatch.setenv("SLURM_NNODES", "2")
    trainer = dynrank.compose(["trainer=slurm"]).trainer
    assert (trainer.devices, trainer.num_nodes, trainer.strategy) == (4, 2, "ddp")


def test_debug_wins_over_the_groups_it_changes():
    assert dynrank.compose(["debug=smoke"]).checkpoint_every == 4


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("schedule.endd=1", "endd"),
        ("lora.rnak=8", "rnak"),
        ("lora.rank=many", "lora.rank"),
        ("optimizer.lr=fast", "optimizer.lr"),
        ("schedule=never", "never"),
        ("nonsense=1", "nonsense"),
    ],
)
def test_compose_names_the_wrong_key_or_value(override, named):
    with pytest.raises((HydraException, OmegaConfBaseException)) as caught:
        dynrank.compose([override])
    chain = f"{caught.value} {caught.value.__cause__}"
    assert named in chain


def test_rank_pattern_joins_file_rules_and_what_a_file_would_hold(tmp_path):
    file = tmp_path / "ranks.yaml"
    file.write_text("rank_pattern: {query: {rank: 8, pinned: true}}\n")
    config = dynrank.compose(["rank_map=head_16", f"rank_map.file={file}", "rank_map.rules=['value=4']"])
    assert rank_pattern(config.rank_map) == {
        "query": {"rank": 8, "pinned": True},
        "value": {"rank": 4, "pinned": False},
        "lm_head": {"rank": 16, "alpha": 32, "pinned": False},
    }


@pytest.mark.parametrize("overrides", [["rank_map.rules=['query=4']"], ["+rank_map.rank_pattern.query=4"]])
def test_rank_pattern_refuses_a_key_in_two_places(overrides, tmp_path):
    file = tmp_path / "ranks.yaml"
    file.write_text("rank_pattern: {query: 8}\n")
    with pytest.raises(ConfigurationError, match=r"\['query'\] stand in rank_map.file and in"):
        rank_pattern(dynrank.compose([f"rank_map.file={file}", *overrides]).rank_map)


def test_rank_pattern_names_the_place_of_a_faulty_rule():
    with pytest.raises(ConfigurationError, match=r"rank_map\.rank_pattern .*\n.*'query': rank must be"):
        rank_pattern(dynrank.compose(["+rank_map.rank_pattern.query=0"]).rank_map)
