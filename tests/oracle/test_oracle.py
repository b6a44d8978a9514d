"""A hundred whole runs at random against the naive reference, and faults planted into dynrank, which it has to find."""

import gc
import sys
from dataclasses import replace
from functools import partial

import pytest
from cases import Case, Stage, make_case
from judge import judged
from runs import adapted, layers

import dynrank

CUT = Stage("budget", 3, planned=5, rate="sqrt")
# A cut at step 5, a resume before it, and after it five steps at a raised rate.
PLANTED = Case(7, "plain", total=10, resume=4, rank=5, alpha=5.0, stages=[CUT])


@pytest.fixture(autouse=True, scope="module")
def cheap_garbage_collection():
    """accelerate collects garbage at each start, and would go through every imported library."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize("seed", range(100))
def test_run_equals_the_reference_step_by_step(seed):
    fault, _ = judged(make_case(seed))
    assert not fault, f"{fault}; scripts/bench/fuzz.py --seed {seed}"


def replaced(monkeypatch, name, fault):
    """In all of dynrank the function or class of this name becomes ``fault(original, *arguments)``."""
    holders = [module for key, module in [*sys.modules.items()] if key.startswith("dynrank.") and name in vars(module)]
    assert holders, f"dynrank has no {name} any more: plant the fault elsewhere"
    for module in holders:
        monkeypatch.setattr(module, name, partial(fault, vars(module)[name]))


def smallest_directions(original, b, a, directions, keep):
    return original(b, a, directions, len(a) - 1 - keep.flip(0))


def momentum_of_another_sign(original, *arguments):
    states = original(*arguments)
    return states | {"exp_avg": -states["exp_avg"]}


def variance_by_the_map_itself(original, *arguments):
    states = original(*arguments)
    return states | {"exp_avg_sq": states["exp_avg_sq"] * 1.1}


FAULTS = {
    "truncation": ("keep_directions", smallest_directions),
    "first moment": ("moved_state", momentum_of_another_sign),
    "second moment": ("moved_state", variance_by_the_map_itself),
    "rate": ("factor_of_change", lambda original, *arguments: original(*arguments) ** 2),
    "importance": ("score", lambda original, importance, error: original(1.0, error)),
}


@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_is_found(name, monkeypatch):
    replaced(monkeypatch, *FAULTS[name])
    assert judged(PLANTED)[0]


def test_scaling_that_moves_with_the_rank_is_found(monkeypatch):
    (layer, *_) = layers(adapted(PLANTED)).values()
    original = type(layer).set_factors

    def keeping_alpha(self, lora_A, lora_B):
        alpha = self.alpha
        original(self, lora_A, lora_B)
        self.scaling = alpha / self.rank

    monkeypatch.setattr(type(layer), "set_factors", keeping_alpha)
    assert judged(PLANTED)[0]


@pytest.mark.parametrize(("step", "lost"), [(8, {"lr_factor": 1.0}), (4, {"importance": None})])
def test_resume_that_forgets_is_found(step, lost, monkeypatch):
    original = dynrank.RankDriver.load_state_dict
    forgets = lambda self, state: original(self, {**state, **lost})  # noqa: E731
    monkeypatch.setattr(dynrank.RankDriver, "load_state_dict", forgets)
    assert judged(replace(PLANTED, resume=step))[0]


def test_run_without_a_planted_fault_is_compared_whole():
    assert judged(PLANTED) == ("", "")
