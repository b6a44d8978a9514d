"""Of how many terms a loss is the mean, and which examples a batch has: against gates by autograd in float64."""

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from real_gates import gated
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from trained import updated
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

import dynrank
from dynrank.change.gates import Gates

SIZES = {"vocab_size": 30, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
EVERY = torch.arange(5)


def adapted(net, targets):
    return updated(dynrank.add_lora(net.double(), rank=2, alpha=4, target_modules=targets, dtype=torch.float64), 0.3)


class Net(nn.Module):
    """A body with adapters, one layer of which is used twice, and two heads without."""

    def __init__(self, pool, reentrant):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.heads, self.pool, self.reentrant = nn.ModuleList([nn.Linear(6, 3), nn.Linear(6, 3)]), pool, reentrant

    def forward(self, x, head=0):
        x = torch.tanh(self.a(x))
        for _ in range(2):
            x = torch.tanh(checkpoint(self.b, x, use_reentrant=True) if self.reentrant else self.b(x))
        return self.heads[head](x.mean(self.pool))


@dataclass
class Case:
    """A net, and a function of net, batch and examples: the sum of their losses, in batches of 5."""

    net: nn.Module
    loss: Callable[[nn.Module, int, torch.Tensor], torch.Tensor]
    batches: int = 1
    terms: int = 5
    source: str = "the model's output"


def classified(net, logits, **options):
    """A case with one label an example."""
    return Case(net, lambda *given: F.cross_entropy(logits(*given), LABELS[given[-1]], reduction="sum"), **options)


def body(pool=1, reentrant=False):
    return adapted(Net(pool, reentrant), ["a", "b"])


def encoder_and_head():
    holder = nn.Module()
    holder.encoder, holder.head = body(), nn.Linear(3, 3).double()
    return holder


def bert():
    config = BertConfig(num_labels=3, hidden_dropout_prob=0, attention_probs_dropout_prob=0, **SIZES)
    return adapted(BertForSequenceClassification(config), ["query", "value"])


def bert_logits(net, batch, which):
    ids = torch.arange(1, 28).view(1, 27).repeat(5, 1)[:, :9] + torch.arange(5)[:, None]
    mask = (torch.arange(9) < torch.tensor([[4], [9], [7], [2], [9]])).long()
    return net(input_ids=ids[which], attention_mask=mask[which]).logits


class Fused(nn.Module):
    """Shows no logits, as a kernel that makes the loss from hidden states."""

    def __init__(self, inside):
        super().__init__()
        self.inside = inside

    def forward(self, **batch):
        return {"loss": self.inside(**batch).loss}


def llama(wrap=lambda model: model, **options):
    ids = torch.randint(1, 30, (5, 8))
    labels = torch.where(torch.rand(5, 8) < 0.5, -100, ids)
    # Each example has a token that is learned.
    labels[:, -1] = ids[:, -1]
    learned = labels[:, 1:] != -100
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(LlamaForCausalLM(LlamaConfig(**SIZES)).double(), config, autocast_adapter_dtype=False)

    def loss(net, batch, which):
        return net(input_ids=ids[which], labels=labels[which])["loss"] * learned[which].sum()

    return Case(wrap(updated(model, 0.3)), loss, terms=int(learned.sum()), **options)


LABELS = torch.tensor([2, 0, 1, 1, 0])
X = torch.randn(2, 5, 7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
CASES = {
    "mean pooling, no adapter on the head": lambda: classified(body(), lambda net, batch, i: net(X[batch][i])),
    "shared layer under reentrant checkpointing": lambda: classified(
        body(reentrant=True), lambda net, batch, i: net(X[batch][i])
    ),
    "sequence first": lambda: classified(body(pool=0), lambda net, batch, i: net(X[batch][i].transpose(0, 1))),
    "two heads, accumulation": lambda: classified(
        body(), lambda net, batch, i: net(X[batch][i], head=batch), batches=2
    ),
    "encoder and head of a module that is not called": lambda: classified(
        encoder_and_head(), lambda net, batch, i: net.head(net.encoder(X[batch][i]))
    ),
    "classifier": lambda: classified(bert(), bert_logits),
    "llama": llama,
    "llama whose logits nobody sees": lambda: llama(Fused, source="its labels"),
}


def by_autograd(case):
    """(batches * 5, gates) gradient of the step's mean loss by the gates of all layers, through each example."""
    twin, gates = gated(case.net)
    # `autograd.grad` does not go through a reentrant checkpoint.
    twin.reentrant = False
    rows = []
    for batch in range(case.batches):
        for example in EVERY.split(1):
            loss = case.loss(twin, batch, example) / case.terms / case.batches
            rows.append(torch.cat(torch.autograd.grad(loss, [*gates.values()])))
    return torch.stack(rows)


def watched(case, **options):
    torch.manual_seed(1)
    layers = dict(dynrank.lora_layers(case.net))
    with closing(Gates(case.net, layers, 1, **options)) as gates:
        for batch in range(case.batches):
            (case.loss(case.net, batch, EVERY) / case.terms / case.batches).backward()
        gates.end_step()
    return gates


@pytest.mark.parametrize("name", CASES)
def test_terms_and_examples_are_those_of_the_loss(name):
    torch.manual_seed(0)
    case = CASES[name]()
    gates, expected = watched(case), by_autograd(case)
    assert (gates.examples, gates.terms, gates.source) == (5 * case.batches, case.terms * case.batches, case.source)
    gradients, roots = (torch.cat([*part.values()], dim=-1) for part in gates._gradients())
    assert_close(gradients, expected.sum(0), rtol=1e-9, atol=1e-14)
    assert_close(roots.mT @ roots, gates.terms * expected.mT @ expected, rtol=1e-9, atol=1e-14)


EXPERTS = ["gate_up_proj", "down_proj"]


def own(model):
    return dynrank.add_lora(model, rank=3, target_modules=[*EXPERTS, "q_proj"], dtype=torch.float64)


def pefts(model, parameters=EXPERTS):
    config = LoraConfig(r=3, target_modules="all-linear", target_parameters=parameters)
    return get_peft_model(model, config, autocast_adapter_dtype=False)


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")
@pytest.mark.parametrize(
    ("kind", "adapted"),
    [("Mixtral", lambda model: pefts(model, None)), ("GptOss", pefts), ("Qwen3Moe", own), ("GptOss", own)],
)
def test_gates_of_experts_are_those_of_real_gates_in_every_pass(kind, adapted, tiny_moe):
    """The router and attention show examples beside them."""
    torch.manual_seed(0)
    base = tiny_moe(kind).double()
    # torch's grouped product takes no float64.
    base.set_experts_implementation("eager")
    net = updated(adapted(base), 0.3)
    ids, (twin, gates) = torch.randint(1, 10, (3, 4, 6)), gated(net)
    with closing(Gates(net, dict(dynrank.lora_layers(net)), 1)) as watched:
        for batch in ids:
            (net(input_ids=batch, labels=batch).loss / 3).backward()
        watched.end_step()
    rows = [torch.autograd.grad(twin(input_ids=batch, labels=batch).loss / 3, [*gates.values()]) for batch in ids]
    gradients, roots = watched._gradients()
    assert (watched.examples, watched.passes, watched.terms) == (12, 3, 60)
    assert {name for name in gates if "experts" in name} <= watched.by_pass
    for name, own in zip(gates, map(torch.stack, zip(*rows, strict=True)), strict=True):
        assert_close(gradients[name], own.sum(0), rtol=1e-9, atol=1e-14)
        if name in watched.by_pass:
            assert_close(roots[name].mT @ roots[name], 60 * own.mT @ own, rtol=1e-9, atol=1e-14)
