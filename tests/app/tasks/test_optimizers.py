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


# The classes of this and of another package are known by name.
@pytest.mark.parametrize("name", ["AdamW", "bitsandbytes.AdamW8bit"])
def test_head_rate_keeps_its_proportion(name):
    assert all(head == pytest.approx(3 * adapter) for adapter, head in rates(decay="cosine", name=name))


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"name": "Adamw"}, "optimizer.name"),
        ({"name": "bitsandbytes.AdamW9bit"}, "optimizer.name"),
        ({"options": {"momentum": 0.9}}, "momentum"),
        ({"lr": -1.0}, "learning rate"),
        ({"name": "Muon"}, "only supports 2D"),
    ],
)
def test_unusable_value_is_refused(values, key):
    with pytest.raises(ConfigurationError, match=key):
        rates(**values)


def test_missing_package_is_an_error_that_says_what_to_install(monkeypatch):
    name = "bitsandbytes.AdamW8bit"
    # Python refuses to import a module that is None here.
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ConfigurationError, match=rf"optimizer.name={name} .*pip install bitsandbytes"):
        rates(name=name)
