"""Factors that keep their shapes: they train, and are saved, as the smaller factors whose place they take."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.optim import SGD, Adam, AdamW, NAdam, RAdam, RMSprop
from torch.testing import assert_close
from transformers import LlamaForCausalLM

import dynrank
from dynrank.distributed.zero_checks import BY_NUMBER
from dynrank.errors import ConfigurationError
from dynrank.layers.padded import LiveLayer, keep_shapes, live, live_copy, live_rank, live_values, padded

OPTIMIZERS = {
    "torch.AdamW": [lambda p: AdamW(p, lr=0.1, weight_decay=0.1)],
    "torch.Adam": [lambda p: Adam(p, lr=0.1, weight_decay=0.1, amsgrad=True)],
    "torch.SGD": [lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1), lambda p: SGD(p, lr=0.1)],
    "torch.RMSprop": [lambda p: RMSprop(p, lr=0.1, momentum=0.9, weight_decay=0.1)],
    "torch.NAdam": [lambda p: NAdam(p, lr=0.1, weight_decay=0.1)],
    "torch.RAdam": [lambda p: RAdam(p, lr=0.1, weight_decay=0.1)],
}


@given(st.integers(1, 3), st.integers(1, 4), st.integers(0, 3), st.sampled_from([0, 1]))
def test_what_is_padded_comes_back(count, rank, more, dim):
    shape = (count * rank, 5) if dim == 0 else (5, rank * count)
    matrix = torch.randn(shape)
    whole = torch.Size((count * (rank + more), 5) if dim == 0 else (5, (rank + more) * count))
    full = padded(matrix, rank + more, count, dim, whole)
    assert full.shape == whole
    assert torch.equal(live(full, rank, count, dim), matrix)
    assert full.count_nonzero() == matrix.count_nonzero()


@given(st.integers(1, 3), st.integers(1, 6), st.integers(0, 5), st.integers(0, 5))
def test_live_directions_end_with_the_last_one_that_is_not_zero_in_both_factors(count, rank, in_A, in_B):
    lora_A = torch.zeros(count, rank, 4)
    lora_B = torch.zeros(count, rank, 4)
    lora_A[-1, :in_A] = 1
    lora_B[0, :in_B] = 1
    factors = lora_A.reshape(-1, 4), lora_B.permute(2, 1, 0).reshape(4, -1)
    assert live_rank(*factors, count) == max(1, min(rank, max(in_A, in_B)))


def run(rank, room, make):
    """lora_A, lora_B after steps of a layer of ``rank`` in factors with ``room``, in float64."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 8, 5, generator=generator, dtype=torch.float64)
    y = torch.randn(6, 8, 4, generator=generator, dtype=torch.float64)
    lora_A = torch.randn(rank, 5, generator=generator, dtype=torch.float64)
    lora_B = torch.randn(4, rank, generator=generator, dtype=torch.float64)
    pair = [padded(f, room, 1, dim, (room, 5) if dim == 0 else (4, room)) for dim, f in enumerate((lora_A, lora_B))]
    factors = [nn.Parameter(factor) for factor in pair]
    optimizer = make(factors)
    for inputs, wanted in zip(x, y, strict=True):
        (inputs @ factors[0].T @ factors[1].T - wanted).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [factor.detach() for factor in factors]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_of_the_list_train_padded_factors_as_small_ones(name):
    for make in OPTIMIZERS[name]:
        small = run(2, 2, make)
        large = run(2, 4, make)
        for dim, (one, other) in enumerate(zip(small, large, strict=True)):
            assert_close(live(other, 2, 1, dim), one, rtol=1e-9, atol=1e-9)
            assert not other.narrow(dim, 2, 2).any()


def test_every_optimizer_of_torch_in_the_list_is_tried():
    assert OPTIMIZERS.keys() == {name for name in BY_NUMBER if name.startswith("torch.")}


def test_adafactor_which_is_not_in_the_list_trains_them_otherwise():
    small, large = (run(2, room, lambda p: torch.optim.Adafactor(p, lr=0.1))[0] for room in (2, 4))
    assert (large[:2] - small).norm() > 1e-3 * small.norm()


def base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 4))


def cut_in_place(model):
    """The factors of a cut to rank 2, with zeros behind them; and the output."""
    torch.manual_seed(1)
    with torch.no_grad():
        for _, layer in dynrank.lora_layers(model):
            for dim, factor in enumerate((layer.lora_A, layer.lora_B)):
                factor.copy_(torch.randn_like(factor)).narrow(dim, 2, factor.shape[dim] - 2).zero_()
        return model(torch.ones(3, 6))


@pytest.mark.parametrize("kind", ["own", "PEFT"])
def test_adapter_is_saved_without_the_zeros(kind, tmp_path):
    if kind == "own":
        model = dynrank.add_lora(base(), rank=4)
    else:
        model = get_peft_model(base(), LoraConfig(r=4, target_modules=["0", "1"]))
    keep_shapes(model)
    output = cut_in_place(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    if kind == "PEFT":
        # Its config has the ranks, as the Trainer's run sets it.
        dynrank.layers.peft_layers.record_ranks(model, {name: 2 for name, _ in dynrank.lora_layers(model)})
    dynrank.save_adapter(model, tmp_path)
    assert {layer.stored_rank for layer in dynrank.read_adapter(tmp_path).layers.values()} == {2}
    assert_close(PeftModel.from_pretrained(base(), tmp_path)(torch.ones(3, 6)), output)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_embeddings_with_added_tokens_are_saved_as_they_were_put_together(zoo, tmp_path):
    """Under ZeRO-3 a frozen parameter is empty in each process, as trained ones are."""
    zoo.plain("llama").save_pretrained(tmp_path / "base")
    bases = []
    for _ in range(2):
        bases.append(LlamaForCausalLM.from_pretrained(tmp_path / "base"))
        bases[-1].resize_token_embeddings(23, mean_resizing=False)
    model = zoo.adapted("llama", base=bases[0])
    keep_shapes(model)
    output = zoo.outputs(model)
    whole = {name: value.clone() for name, value in model.state_dict().items()}
    for parameter in model.parameters():
        parameter.data = torch.empty(0)
    with live_values(model, whole):
        dynrank.save_adapter(model, tmp_path / "adapter")
    assert not any(parameter.numel() for parameter in model.parameters())
    assert_close(zoo.outputs(dynrank.load_adapter(bases[1], tmp_path / "adapter")), output)


def test_what_no_process_has_whole_is_refused(tmp_path):
    model = dynrank.add_lora(base(), rank=4)
    keep_shapes(model)
    model[0].lora_A.data = torch.empty(0)
    with pytest.raises(ConfigurationError, match=r"ZeRO-3; save them by trainer\.save_model"):
        dynrank.save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_copy_has_the_names_and_ranks_of_the_layers_and_values_only_when_given():
    model = dynrank.add_lora(base(), rank=4)
    cut_in_place(model)
    copied = dict(dynrank.lora_layers(live_copy(model, torch.device("cpu"))))
    layers = dict(dynrank.lora_layers(model))
    assert copied.keys() == layers.keys()
    for name, layer in copied.items():
        assert isinstance(layer, LiveLayer)
        assert (layer.rank, layer.max_rank, layer.d_in, layer.d_out) == (4, 4, layers[name].d_in, layers[name].d_out)
        layer.take(layers[name].lora_A.detach(), layers[name].lora_B.detach())
        assert layer.rank == 2
        assert_close(layer.lora_B @ layer.lora_A, layers[name].lora_B @ layers[name].lora_A)
        layer.empty(layer.rank)
        assert layer.lora_A.shape == (2, layer.d_in)
        assert layer.lora_A.untyped_storage().nbytes() == 4
