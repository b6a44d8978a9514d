"""Gates against gradients by each example's own backward pass in float64, for every kind of layer and way to run it."""

import copy
import pickle
from contextlib import closing

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from real_gates import gated
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from trained import updated
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

import dynrank
from dynrank.change.gates import EXAMPLES, Gates
from dynrank.change.resize import resize
from dynrank.models.pretrained import enable_checkpointing
from dynrank.tasks.examples import positions

LAYERS = {
    "linear": (lambda: nn.Linear(10, 8), lambda g: torch.randn(5, 7, 10, generator=g)),
    "conv1d": (lambda: Conv1D(8, 10), lambda g: torch.randn(5, 7, 10, generator=g)),
    "embedding": (lambda: nn.Embedding(20, 8), lambda g: torch.randint(20, (5, 7), generator=g)),
    "conv2d": (lambda: nn.Conv2d(3, 8, (3, 2), stride=2, padding=1), lambda g: torch.randn(5, 3, 9, 8, generator=g)),
}


def own(net, *targets, **options):
    return dynrank.add_lora(net, rank=3, alpha=6, target_modules=targets, **options)


def pefts(net, *targets, dropout=0.0):
    return get_peft_model(net, LoraConfig(r=3, lora_alpha=6, target_modules=targets, lora_dropout=dropout))


BOTH = pytest.mark.parametrize("add", [own, pefts])


def adapted(kind, add=own, **options):
    """(net of one LoRA layer with an update, an input of five examples)."""
    make, draw = LAYERS[kind]
    torch.manual_seed(0)
    return updated(add(nn.Sequential(make()), "0", **options)), draw(torch.Generator().manual_seed(1))


def loss_of(y):
    """The mean over examples of a number of each."""
    return (y.sin() * y.exp().clamp(max=3)).flatten(1).mean(1).mean()


def watching(net, window=1, **options):
    return closing(Gates(net, dict(dynrank.lora_layers(net)), window, **options))


def watched(net, *steps, run=None, **options):
    """Gates that have seen an optimizer step on each of the inputs."""
    with watching(net, options.pop("window", len(steps)), **options) as gates:
        for x in steps:
            loss_of((run or net)(x)).backward()
            gates.end_step()
    return gates


def gate_gradients(net, x):
    """{layer: (examples, rank) gradient of the loss by the gates, through each example}, by autograd on real gates."""
    twin, gates = gated(net)
    examples = (x.double() if x.is_floating_point() else x).split(1)
    rows = [torch.autograd.grad(loss_of(twin(example)) / len(x), [*gates.values()]) for example in examples]
    return dict(zip(gates, map(torch.stack, zip(*rows, strict=True)), strict=True))


def assert_gradient_is(gates, expected):
    """``expected`` has (examples, rank) of each layer."""
    for name, rows in expected.items():
        assert_close(gates._gradients()[0][name], rows.sum(0), rtol=1e-10, atol=1e-14)


def assert_hessian_is(gates, expected):
    """Of all layers together."""
    whole, mine = (torch.cat([part[name] for name in expected], 1) for part in (expected, gates._gradients()[1]))
    assert_close(mine.mT @ mine, len(whole) * whole.mT @ whole, rtol=1e-10, atol=1e-14)


def assert_alike(one, other, rtol=1e-10, atol=1e-14):
    assert (one.steps, one.examples, one.terms) == (other.steps, other.examples, other.terms)
    assert_close(one._gradients(), other._gradients(), rtol=rtol, atol=atol)


@BOTH
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
def test_gradients_are_those_of_real_gates_in_each_example(kind, add):
    net, x = adapted(kind, add)
    gates, (expected,) = watched(net, x, loss_terms=5, caution=2.0), gate_gradients(net, x).values()
    (gradient,), (root,) = (part.values() for part in gates._gradients())
    assert expected.any()
    assert_close(gradient, expected.sum(0), rtol=1e-4, atol=1e-6)
    assert_close(root.mT @ root, 5 * expected.mT @ expected, rtol=1e-4, atol=1e-6)
    # These are the errors of a sum of independent examples.
    errors = expected.square().sum(0).sqrt()
    assert_close(torch.from_numpy(gates._estimate()._margin), 2 * errors, rtol=1e-4, atol=1e-6)


class Deep(nn.Module):
    """Three layers, one used twice; the last reads the mean of the positions."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x):
        return self.head(self.b(torch.tanh(self.b(torch.tanh(self.a(x))))).mean(1))


@pytest.fixture
def deep():
    """(net with LoRA on all layers, input of six examples)."""
    torch.manual_seed(0)
    net = own(Deep(), "a", "b", "head", dtype=torch.float64).double()
    return updated(net, std=0.3), torch.randn(6, 5, 6, dtype=torch.float64)


def test_layers_that_are_used_twice_and_read_pooled_inputs_share_their_examples(deep):
    gates, expected = watched(*deep), gate_gradients(*deep)
    # The head is nearest to the loss and has one position of each example.
    assert gates.terms == 6
    assert_gradient_is(gates, expected)
    assert_hessian_is(gates, expected)


def test_accumulated_passes_are_one_step_and_steps_are_averaged(deep):
    net, x = deep
    whole = watched(net, x[:4], x[2:])
    with watching(net, 2) as parts:
        for part in (x[:4], x[2:]):
            for micro in part.split(2):
                (loss_of(net(micro)) / 2).backward()
            parts.end_step()
    assert_alike(parts, whole)
    first, second = (gate_gradients(net, part) for part in (x[:4], x[2:]))
    assert_gradient_is(whole, {name: (rows + second[name]) / 2 for name, rows in first.items()})


def test_tokens_whose_log_probabilities_trl_s_models_give_out_are_the_terms():
    trl = pytest.importorskip("trl.trainer.utils", reason="needs TRL: pip install trl")
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**size, vocab_size=30))
    trl.add_fused_lm_head(model)
    updated(dynrank.add_lora(model, rank=2, target_modules=["q_proj", "down_proj"]))
    ids = torch.randint(30, (4, 7))
    labels = ids.where(torch.rand(4, 7) < 0.5, -100)
    count = (labels[:, 1:] != -100).sum()
    with watching(model) as plain:
        F.cross_entropy(model(input_ids=ids).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).backward()
        plain.end_step()
    with watching(model) as fused:
        (-model(input_ids=ids, labels=labels, fused_lm_head=True).log_probs.sum() / count).backward()
        fused.end_step()
    assert fused.terms == count
    assert_alike(fused, plain, rtol=1e-4, atol=1e-6)


def test_scaled_losses_are_taken_as_they_are(deep):
    net, x = deep
    with watching(net) as scaled:
        scaled.loss_scale = 1024.0
        (1024 * loss_of(net(x))).backward()
        scaled.end_step()
    assert_alike(scaled, watched(net, x), rtol=1e-12, atol=1e-15)


def test_examples_beyond_the_quota_are_left_out_and_the_rest_weighs_more(deep):
    net, x = deep
    gates = watched(net, x, window=EXAMPLES // 3 + 1)
    assert gates.examples == 3
    expected, (gradients, roots) = gate_gradients(net, x), gates._gradients()
    for name, rows in expected.items():
        assert_close(gradients[name], 2 * rows[::2].sum(0), rtol=1e-10, atol=1e-14)
        assert_close(roots[name].mT @ roots[name], 2 * 6 * rows[::2].mT @ rows[::2], rtol=1e-10, atol=1e-14)


def test_infinite_gradients_of_a_skipped_step_leave_no_trace(deep):
    net, x = deep
    with watching(net, 2) as gates:
        for size in (float("inf"), 1.0):
            (size * loss_of(net(x))).backward()
            gates.end_step()
    assert (gates.steps, gates.examples) == (2, 6)
    assert_gradient_is(gates, gate_gradients(net, x))


@BOTH
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_shows_the_same(reentrant, add):
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4))
    net = updated(add(inner, "0", "2", "4", dropout=0.5))
    x, found = torch.randn(5, 3, 6).requires_grad_(), []

    def in_parts(x):
        return checkpoint(inner[2:], checkpoint(inner[:2], x, use_reentrant=reentrant), use_reentrant=reentrant)

    for run in (net, in_parts):
        torch.manual_seed(3)
        found.append(watched(net, x, run=run))
        assert found[-1].examples == 5
    assert_alike(*found, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(("dropout", "autocast"), [(0.0, False), (0.5, True)])
def test_watched_passes_are_bit_equal_to_others(kind, dropout, autocast):
    net, x = adapted(kind, dropout=dropout)

    def passes():
        torch.manual_seed(4)
        net.zero_grad()
        given = x.clone().requires_grad_() if x.is_floating_point() else x
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = net(given)
        loss_of(y.float()).backward()
        grads = [net[0].lora_A.grad, net[0].lora_B.grad, given.grad if x.is_floating_point() else None]
        return [y.detach().clone(), *(grad.clone() for grad in grads if grad is not None)]

    before = passes()
    with watching(net) as gates:
        during = passes()
        gates.end_step()
    after = passes()
    assert gates.examples == 5
    assert all(map(torch.equal, before, during))
    assert all(map(torch.equal, before, after))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_copies_of_a_watched_layer_are_not_watched(copied):
    net, x = adapted("linear")
    with watching(net) as gates:
        loss_of(copied(net)(x)).backward()
        gates.end_step()
        assert gates.examples == 0
        with pytest.raises(RuntimeError, match="observed already"):
            watching(net)


def test_a_layer_that_no_pass_has_reached_is_named_and_loses_its_smallest_directions(deep):
    net, x = deep
    gates = watched(net, x, run=lambda x: net.head(net.a(x).mean(1)))
    assert gates.unreached == ["b"]
    assert gates.kept({"b": 1})["b"].tolist() == [0]


def test_steps_without_a_gradient_leave_no_trace(deep):
    """As where all answers of a prompt get the same reward; examples without a gradient do not count."""
    net, x = deep
    with watching(net, 3) as gates:
        for share in (0, 1, 0):
            (share * loss_of(net(x))).backward()
            gates.end_step()
        assert (gates.steps, gates.examples, gates.unreached) == (3, 6, [])
        assert_gradient_is(gates, gate_gradients(net, x))
    with watching(net) as gates:
        loss_of(net(x)[:2]).backward()
        gates.end_step()
    assert (gates.examples, gates.terms) == (2, 2)


@pytest.mark.parametrize("silent", [["b"], ["a", "b", "head"]], ids=["one", "all"])
def test_layers_that_show_no_examples_are_watched_by_passes(deep, silent, monkeypatch):
    """Their own curvature is that of a sample a pass, whatever the others show; first orders are all the same."""
    net, x = deep
    for name in silent:
        monkeypatch.setattr(net.get_submodule(name), "observe", lambda tap: lambda: None)
    with watching(net) as gates:
        for part in x.split(2):
            (loss_of(net(part)) / 3).backward()
        gates.end_step()
    expected, (gradients, roots) = gate_gradients(net, x), gates._gradients()
    assert gates.examples == (6 if len(silent) == 1 else 3)
    for name, rows in expected.items():
        assert_close(gradients[name], rows.sum(0), rtol=1e-10, atol=1e-14)
        samples = rows.view(3, 2, 3).sum(1) if name in silent else rows
        assert_close(roots[name].mT @ roots[name], 6 * samples.mT @ samples, rtol=1e-10, atol=1e-14)


def test_kernels_that_go_past_peft_s_layers_are_noticed():
    """As those of axolotl, Liger and unsloth, which take the place of a layer's forward."""
    torch.manual_seed(0)
    net = pefts(nn.Sequential(nn.Linear(6, 5)), "0")
    x, (plain, fused) = torch.randn(4, 6), (updated(copy.deepcopy(net)) for _ in range(2))
    fused.load_state_dict(plain.state_dict())
    layer = fused.base_model.model[0]
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    layer.forward = lambda x: layer.base_layer(x) + 2 * x @ down.mT @ up.mT
    (gradient, root), (seen, own) = (
        next(zip(*map(dict.values, watched(n, x)._gradients()), strict=True)) for n in (plain, fused)
    )
    assert_close(seen, gradient)
    assert len(own) == 1
    assert_close(own, 2 * root.sum(0, keepdim=True) / 2)


class Flat(nn.Module):
    """A layer that sees batch and positions in one, as OPT's do, behind or before one that does not."""

    def __init__(self, first):
        super().__init__()
        self.a, self.b, self.first = nn.Linear(6, 6), nn.Linear(6, 6), first

    def forward(self, x):
        flat, plain = (self.a, self.b) if self.first else (self.b, self.a)
        if self.first:
            x = flat(x.flatten(0, 1)).view(x.shape)
            return plain(torch.tanh(x))
        return flat(torch.tanh(plain(x)).flatten(0, 1)).view(len(x), -1, 6)


@pytest.mark.parametrize("first", [False, True])
def test_layers_that_see_batch_and_positions_in_one_are_told_apart(first):
    torch.manual_seed(0)
    net = dynrank.add_lora(Flat(first), rank=2, target_modules=["a", "b"], dtype=torch.float64).double()
    x = torch.randn(4, 3, 6, dtype=torch.float64)
    gates = watched(updated(net), x, loss_terms=4)
    assert_hessian_is(gates, gate_gradients(net, x))


class Expert(nn.Module):
    """A layer sees the positions that are sent to it, whatever their examples."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        sent = x[..., 0] > 0
        return torch.tanh(self.b(x)).masked_scatter(sent[..., None], self.a(x[sent]))


def test_positions_that_cannot_be_told_apart_by_example_are_taken_together():
    torch.manual_seed(0)
    net = updated(dynrank.add_lora(Expert(), rank=2, target_modules=["a", "b"], dtype=torch.float64).double())
    x = torch.randn(4, 3, 6, dtype=torch.float64)
    assert (x[..., 0] > 0).sum() % len(x)
    assert_gradient_is(watched(net, x), gate_gradients(net, x))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_examples_packed_into_rows_are_what_they_are_alone(checkpointing):
    """Two passes of packed rows, one with padding, against one pass with a row for each example."""
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**size, vocab_size=30)).double().train()
    updated(dynrank.add_lora(model, rank=2, target_modules="all-linear", dtype=torch.float64))
    if checkpointing:
        enable_checkpointing(model)
    examples = [torch.randint(1, 30, (length,)) for length in (4, 7, 3, 5, 2, 6)]
    learned = [torch.cat([torch.tensor([-100]), example[1:]]) for example in examples]

    def gates_of(batches):
        with watching(model) as gates:
            for rows, options in batches:
                ids, labels = (
                    pad_sequence([torch.cat([part[i] for i in row]) for row in rows], True, value)
                    for part, value in ((examples, 0), (learned, -100))
                )
                logits = model(input_ids=ids, use_cache=False, **options).logits[:, :-1]
                loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
                (loss / sum(len(example) - 1 for example in examples)).backward()
            gates.end_step()
        return gates

    def packed(*rows):
        places = [positions(len(examples[i]) for i in row) for row in rows]
        return rows, {"position_ids": pad_sequence(places, True, 0)}

    mask = pad_sequence([torch.ones_like(example) for example in examples], True, 0)
    alone = gates_of([([[i] for i in range(6)], {"attention_mask": mask})])
    together = gates_of([packed([0, 1], [2, 3]), packed([4, 5])])
    assert (together.examples, together.terms) == (6, 21)
    assert_alike(together, alone)


def test_gates_go_on_from_their_state(deep, tmp_path):
    net, x = deep
    whole, head = watched(net, x, x[1:], x[2:]), watched(net, x, x[1:], window=3)
    torch.save(head.state_dict(), tmp_path / "state")
    with watching(net, 3) as tail:
        tail.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
        loss_of(net(x[2:])).backward()
        tail.end_step()
    assert_alike(tail, whole, rtol=0, atol=0)


@pytest.mark.parametrize("rank", [1, 2])
def test_prediction_is_the_increase_of_a_loss_that_is_quadratic_in_the_gates(rank):
    """One position an example and a residual that the Fisher matrix is exact for: noise of variance 1 around y."""
    torch.manual_seed(0)
    net = nn.ModuleDict({"a": nn.Linear(5, 4, dtype=torch.float64), "b": nn.Linear(5, 4, dtype=torch.float64)})
    updated(dynrank.add_lora(net, rank=3, target_modules=["a", "b"], dtype=torch.float64))
    x = torch.randn(40, 5, dtype=torch.float64)
    noise = torch.cat([torch.eye(4), -torch.eye(4)]).double() * 2
    inputs, noise = x.repeat_interleave(8, 0), noise.repeat(40, 1)
    y = (net["a"](inputs) + net["b"](inputs)).detach() + noise

    def loss():
        return 0.5 * (net["a"](inputs) + net["b"](inputs) - y).square().sum(1).mean()

    with watching(net) as gates:
        loss().backward()
        gates.end_step()
    before = loss().item()
    predicted = resize(net, rank, gates=gates, dry_run=True)
    reports = resize(net, rank, gates=gates)
    assert [report.loss for report in reports] == [report.loss for report in predicted]
    assert sum(report.loss.total for report in reports) == pytest.approx(loss().item() - before, rel=1e-10)
    assert any(abs(report.loss.between_layers) > 1e-3 for report in reports)


def test_gates_keep_a_small_direction_that_the_loss_needs():
    """Not a prefix of the spectrum: what is kept is in the product, what is dropped is not."""
    net = dynrank.add_lora(nn.Sequential(nn.Linear(6, 6, bias=False)), rank=3, alpha=3, target_modules=["0"])
    with torch.no_grad():
        net[0].lora_A.copy_(torch.eye(3, 6))
        net[0].lora_B.copy_(torch.eye(6, 3) * torch.tensor([3.0, 2.0, 1.0]))
    x, noise = torch.randn(2, 50, 6, generator=torch.Generator().manual_seed(0))
    x = x * torch.tensor([1e-3, 1e-3, 1.0, 1, 1, 1])
    with watching(net) as gates:
        (net(x) - net(x).detach() + noise).square().mean().backward()
        gates.end_step()
    (report,) = resize(net, 1, gates=gates)
    assert_close(net[0].delta_weight(), torch.diag(torch.tensor([0.0, 0, 1, 0, 0, 0])), atol=1e-6, rtol=0)
    assert report.energy_kept == pytest.approx(1 / 14)
    assert report.predicted_error == pytest.approx(13**0.5)
