"""The page ends with commands that run."""

import shlex

import pytest

import dynrank
from dynrank.runs.report.page import next_commands
from dynrank.runs.report.record import read_run


def trained(run):
    """{reason: arguments} of the commands that train."""
    commands = {why: shlex.split(command) for why, command in next_commands(run)}
    return {why: arguments for why, (name, *arguments) in commands.items() if name == "dynrank-train"}


def test_commands_compose(smoke_run):
    run = read_run(smoke_run[0])
    commands = trained(run)
    assert len(commands) >= 5
    for arguments in commands.values():
        config = dynrank.compose([a.replace("1,2,3", "1") for a in arguments if a != "--multirun"])
        # debug=smoke, which the run was given, makes 12 steps.
        assert config.trainer.max_steps == 12
    used = [shlex.split(command) for _, command in next_commands(run)]
    assert ["dynrank", "predict", str(smoke_run[0] / "adapter"), "a text"] in used


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ({"schedule": {"how": {"max_regression": 0.1}}}, "measure what a change costs"),
        ({"lora": {"dropout": 0.1}}, "regularise"),
    ],
)
def test_what_the_run_has_already_is_not_proposed(smoke_run, setting, reason):
    run = read_run(smoke_run[0])
    assert any(why.startswith(reason) for why in trained(run))
    run.config.update(setting)
    assert not any(why.startswith(reason) for why in trained(run))
