"""Ranks driven in a plain PyTorch loop, without any trainer."""

import pytest
import torch
from torch import nn

import dynrank
from dynrank.driver.driver import RankDriver
from dynrank.driver.training import Training
from dynrank.errors import ConfigurationError
from dynrank.schedules import How, Stage, after_convergence
from dynrank.targets import Rank
from dynrank.triggers import At, Plateau, Run

STEPS = 24
torch.manual_seed(1)
X = torch.randn(80, 12)
Y = X @ torch.randn(12, 6)


def evaluate(model):
    with torch.no_grad():
        return {"val/loss": nn.functional.mse_loss(model(X), Y).item()}


class Loop(Training):
    """A run that can validate at any moment, as a schedule with ``max_regression`` asks for."""

    def validate(self):
        return evaluate(self.model)


def train(driver, folder, resume_from=None, kind=Loop):
    """Train with a checkpoint after each step, from step ``resume_from`` on if it is given."""
    torch.manual_seed(0)
    model = dynrank.add_lora(nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 6)), rank=6)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    loop = kind(model, [optimizer])
    if resume_from is not None:
        saved = torch.load(folder / f"{resume_from}.pt")
        model.load_state_dict(saved["model"])  # dynrank's layers take the ranks of what they load
        optimizer.load_state_dict(saved["optimizer"])
        driver.load_state_dict(saved["driver"])
        loop.step = resume_from
    driver.start(loop, Run(total_steps=STEPS))
    while loop.step < STEPS:
        driver.advance(loop)  # ranks change here
        batch = torch.randint(80, (8,), generator=torch.Generator().manual_seed(loop.step))
        nn.functional.mse_loss(model(X[batch]), Y[batch]).backward()
        optimizer.step()
        loop.step += 1
        driver.end_step(loop)  # before the gradients go
        optimizer.zero_grad()
        if loop.step % 4 == 0:
            driver.validated(loop, evaluate(model))
        if resume_from is None:
            state = {"model": model, "optimizer": optimizer, "driver": driver}
            torch.save({name: part.state_dict() for name, part in state.items()}, folder / f"{loop.step}.pt")
    driver.finish(loop)
    return model


def plateau():
    """Fires at the third validation; the change costs too much and is made half as far, over three steps of ramp."""
    how = How(metric="gates", window=3, rewarmup_steps=3, max_regression=0.02)
    return RankDriver(after_convergence(1, Plateau(patience=2, min_delta=0.9)), how)


def test_plateau_changes_ranks_as_far_as_the_check_allows(tmp_path):
    driver = plateau()
    model = train(driver, tmp_path)
    *undone, made = driver.history
    assert [event.undone for event in driver.history] == [True] * len(undone) + [False]
    assert undone
    assert made.step == 12 + 3  # decided by the third validation, then measured
    assert [layer.rank for _, layer in dynrank.lora_layers(model)] == [layer.rank_after for layer in made.layers]
    assert driver.finished


def test_loop_goes_on_from_any_checkpoint_to_the_same_bits(tmp_path):
    whole = plateau()
    expected = train(whole, tmp_path).state_dict()
    assert len(whole.history) > 1
    for step in range(1, STEPS):
        again = plateau()
        model = train(again, tmp_path, resume_from=step)
        assert again.history == whole.history, step
        assert str(again.state_dict()) == str(whole.state_dict()), step
        for name, value in model.state_dict().items():
            assert torch.equal(value, expected[name]), (step, name)


def test_loop_without_a_class_of_its_own_is_driven_by_time(tmp_path):
    driver = RankDriver(Stage(At(fraction=1.0), Rank(2)))
    model = train(driver, tmp_path, kind=Training)
    assert [layer.rank for _, layer in dynrank.lora_layers(model)] == [2, 2]


def test_check_in_a_loop_that_cannot_validate_says_what_to_define():
    model = dynrank.add_lora(nn.Sequential(nn.Linear(4, 4)), rank=2)
    driver = RankDriver([Stage(At(step=0), Rank(1))], How(max_regression=0.1))
    with pytest.raises(ConfigurationError, match=r"max_regression=0.1 .*define validate\(\)"):
        driver.start(Training(model, []), Run(total_steps=9))
