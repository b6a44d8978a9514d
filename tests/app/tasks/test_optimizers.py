import sys

import pytest
import torch
from torch import nn

from dynrank.app.tasks.optimizers import make_optimizer
from dynrank.errors import ConfigurationError

VALUES = {"lr": 0.1, "head_lr": 0.3, "warmup_steps": 10, "decay_share": 0.25}


def rates(**values):
    made = make_optimizer([nn.Parameter(torch.ones(1))], [nn.Parameter(torch.ones(1))], 100, **{**VALUES, **values})
    optimizer = made["optimizer"]
    scheduler = made["lr_scheduler"]["scheduler"]
    history = []
    for _ in range(100):
        history.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return history


def test_stable_decay_warms_up_stays_and_falls():
    adapter = [rate for rate, _ in rates()]
    assert adapter[:11] == pytest.approx([0.01 * i for i in range(11)])
    assert adapter[10:75] == pytest.approx([0.1] * 65)
    assert adapter[75:] == sorted(adapter[75:], reverse=True)
    assert adapter[-1] < 0.01


def test_head_rate_keeps_its_proportion():
    assert all(head == pytest.approx(3 * adapter) for adapter, head in rates(decay="cosine"))


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"name": "Adamw"}, "optimizer.name"),
        ({"name": "functional"}, "optimizer.name"),
        ({"name": "bitsandbytes.AdamW9bit"}, "optimizer.name"),
        ({"name": "lion.Lion"}, "optimizer.name"),
        ({"options": {"momentum": 0.9}}, "momentum"),
        ({"lr": -1.0}, "learning rate"),
        ({"name": "Muon"}, "only supports 2D"),
    ],
)
def test_unusable_value_is_refused(values, key):
    with pytest.raises(ConfigurationError, match=key):
        rates(**values)


@pytest.mark.parametrize("name", ["bitsandbytes.AdamW8bit", "Adafactor"])
def test_optimizers_of_this_and_other_packages_are_made_by_name(name):
    adapter, head = (nn.Parameter(torch.ones(2, 2)) for _ in range(2))
    made = make_optimizer([adapter], [head], 100, **{**VALUES, "name": name, "warmup_steps": 0})
    assert type(made["optimizer"]).__name__ == name.rpartition(".")[2]
    assert [group["lr"] for group in made["optimizer"].param_groups] == [0.1, 0.3]


def test_missing_package_is_an_error_that_says_what_to_install(monkeypatch):
    name = "bitsandbytes.AdamW8bit"
    # Python refuses to import a module that is None here.
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ConfigurationError, match=rf"optimizer.name={name} .*pip install bitsandbytes"):
        rates(name=name)
