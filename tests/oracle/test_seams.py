"""Some random cases of the seams to users' programs, and faults planted into dynrank that the oracles have to find."""

import gc
import importlib

import pytest

import dynrank
from dynrank.callbacks import BestWeights
from dynrank.callbacks.lightning.best import BestSoFar
from dynrank.callbacks.transformers import rank_trainer_callback
from dynrank.driver.learning_rates import LearningRates


def judged(name, seed):
    return importlib.import_module(f"seams.{name}").judged(seed)[1]


@pytest.fixture(autouse=True, scope="module")
def cheap_garbage_collection():
    """accelerate collects garbage at each start, and would go through every imported library."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize("first", range(0, 40, 10))
@pytest.mark.parametrize("name", ["rates", "best"])
def test_seam_is_as_its_oracle_says(name, first):
    for seed in range(first, first + 10):
        assert not judged(name, seed), f"scripts/bench/fuzz.py --of {name} --seed {seed}"


def nothing(*_, **__):
    pass


def whole_groups(self):
    """The rate of a group is multiplied for all that is in it."""
    self.used = {}
    self._outside = [(group, group["lr"], group["params"]) for group in self._optimizer.param_groups]
    for number, (group, rate, _) in enumerate(self._outside):
        self.used[number] = group["lr"] = rate * self.factor


load = dynrank.RankDriver.load_state_dict


def forgetting(self, state):
    load(self, {**state, "lr_factor": 1.0})


# {fault: (the seed of a case that shows it, its oracle, where it is planted, the name there, what it becomes)}; after a
# change of the random cases, scripts/bench/fuzz.py finds other seeds.
FAULTS = {
    "rates are not multiplied": (0, "rates", LearningRates, "_multiply", nothing),
    "rates stay multiplied after a step": (5, "rates", LearningRates, "_end", nothing),
    "a closure finds multiplied rates": (1, "rates", LearningRates, "_as_outside", lambda self, closure: closure),
    "a head's rate is multiplied": (0, "rates", LearningRates, "_multiply", whole_groups),
    "a resumed run forgets the factor": (0, "rates", dynrank.RankDriver, "load_state_dict", forgetting),
    "the Trainer's best is of before a cut": (3, "best", rank_trainer_callback, "forget_best", nothing),
    "Lightning's best is of before a cut": (70, "best", BestSoFar, "load", nothing),
    "the best weights have other ranks": (23, "best", BestWeights, "on_rank_change", nothing),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_found(fault, monkeypatch):
    seed, name, holder, attribute, planted = FAULTS[fault]
    assert not judged(name, seed)
    monkeypatch.setattr(holder, attribute, planted)
    assert judged(name, seed)
