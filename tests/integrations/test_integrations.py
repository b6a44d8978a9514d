"""The plugin of axolotl and the program for LLaMA-Factory, with fakes of the few names that they take from these.

The real axolotl 0.19 and LLaMA-Factory 0.9.5 want other versions of transformers, PEFT and datasets than this suite.
"""

import sys
from types import ModuleType, SimpleNamespace

import pytest

from dynrank.callbacks import RankTrainerCallback
from dynrank.errors import ConfigurationError
from dynrank.integrations import callback_of
from dynrank.rank_map import RankBounds, read_rank_map
from dynrank.schedules import anneal, early_budget

PINNED = {"o_proj": {"pinned": True}}


def fake(monkeypatch, name, **names):
    """A module of these names, and packages around it."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:end]), ModuleType(parts[end - 1]))
    vars(sys.modules[name]).update(names)


@pytest.fixture
def axolotl(monkeypatch):
    fake(monkeypatch, "axolotl.integrations.base", BasePlugin=object)
    monkeypatch.delitem(sys.modules, "dynrank.integrations.axolotl", raising=False)
    from dynrank.integrations import axolotl

    return axolotl


@pytest.fixture
def llama_factory(monkeypatch):
    """The module, and the calls of run_exp."""
    calls = []
    fake(monkeypatch, "llamafactory.hparams", read_args=lambda args: args)
    fake(monkeypatch, "llamafactory.train.tuner", run_exp=lambda args, callbacks: calls.append((args, callbacks)))
    monkeypatch.delitem(sys.modules, "dynrank.integrations.llama_factory", raising=False)
    from dynrank.integrations import llama_factory

    return llama_factory, calls


@pytest.mark.parametrize(
    ("settings", "stages"),
    [
        ({}, early_budget(8)),
        ({"share": 0.25, "at": 0.5}, early_budget(share=0.25, at=0.5)),
        ({"schedule": "anneal", "final_rank": 2, "steps": 4}, anneal(2, steps=4)),
        ({"schedule": "fixed"}, []),
    ],
)
def test_the_key_dynrank_is_a_schedule_with_its_arguments(settings, stages):
    assert callback_of(settings, 16).driver.stages == stages


def test_the_key_takes_a_rank_map_beside_the_schedule():
    rank_map = {"o_proj": {"pinned": True}, "mlp": {"highest": 8}}
    for settings in ({"rank_map": rank_map}, {"schedule": "anneal", "final_rank": 2, "rank_map": rank_map}):
        assert callback_of(settings, 16).driver.rules == read_rank_map(rank_map, RankBounds)
    assert callback_of({"rank_map": rank_map}, 16).driver.stages == early_budget(8)
    assert callback_of({}, 16).driver.rules == {}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("anneal", "mapping of schedule and its arguments, got 'anneal'"),
        ({"schedule": "shrink"}, "one of early_budget, .*, got 'shrink'"),
        ({"final_rnk": 3}, "final_rnk is unknown; nearest: final_rank"),
        ({"schedule": "anneal", "final_rank": 0}, "final_rank must be .* got 0"),
        ({"rank_map": {"o_proj": 4}}, "'o_proj': an int is the starting rank"),
    ],
)
def test_what_is_no_schedule_is_refused_by_value(settings, message):
    with pytest.raises(ConfigurationError, match=message):
        callback_of(settings, 16)


def test_axolotls_plugin_gives_the_callback_and_names_its_key(axolotl):
    plugin = axolotl.RankPlugin()
    module, _, name = plugin.get_input_args().rpartition(".")
    assert getattr(sys.modules[module], name)(dynrank={"rank_map": PINNED}).dynrank == {"rank_map": PINNED}
    (callback,) = plugin.add_callbacks_pre_trainer(SimpleNamespace(adapter="qlora", lora_r=32, dynrank=None), None)
    assert isinstance(callback, RankTrainerCallback)
    assert callback.driver.stages == early_budget(16)
    settings = {"final_rank": 4, "rank_map": PINNED}
    (callback,) = plugin.add_callbacks_pre_trainer(SimpleNamespace(adapter="lora", lora_r=8, dynrank=settings), None)
    assert callback.driver.rules == {"o_proj": RankBounds(pinned=True)}
    with pytest.raises(ConfigurationError, match="got adapter: None"):
        plugin.add_callbacks_pre_trainer(SimpleNamespace(adapter=None, lora_r=32, dynrank=None), None)


def test_llama_factory_gets_its_own_keys_and_the_callback(llama_factory):
    module, calls = llama_factory
    given = {"lora_rank": 32, "model_name_or_path": "tiny", "dynrank": {"share": 0.5, "rank_map": PINNED}}
    module.train(given)
    module.train({"finetuning_type": "lora"})
    (args, (callback,)), (others, (default,)) = calls
    assert (args, others) == ({"lora_rank": 32, "model_name_or_path": "tiny"}, {"finetuning_type": "lora"})
    assert callback.driver.stages == early_budget(share=0.5)
    assert callback.driver.rules == {"o_proj": RankBounds(pinned=True)}
    assert default.driver.stages == early_budget(4)
    assert "dynrank" in given
    for args, message in (
        ({"finetuning_type": "full"}, "finetuning_type: lora, got full"),
        (["--stage", "sft"], "YAML or JSON file"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            module.train(args)
    assert len(calls) == 2
