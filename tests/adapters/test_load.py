"""Adapters put into a plain model, or in the place of another: what trains then, and what does not fit."""

import copy
import gc
import itertools
import weakref

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import Qwen2Config, Qwen2ForCausalLM

import dynrank
from dynrank.adapters.base import base_of
from dynrank.adapters.sidecar_files import write_sidecar_files
from dynrank.errors import ConfigurationError
from dynrank.layers.lora_layer import LoRALayer

WEIGHTS = "adapter_model.safetensors"


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "distilbert", "conv"])
def test_load_puts_what_peft_wrote_into_the_model_itself(kind, zoo, tmp_path):
    expected = zoo.outputs(zoo.by_peft(kind, tmp_path))
    model = zoo.plain(kind)
    assert dynrank.load_adapter(model, tmp_path) is model
    assert (zoo.outputs(model) - expected).abs().max() <= 1e-5
    assert {layer.scaling for _, layer in dynrank.lora_layers(model)} == {5 / 3}
    trained = ("lora_", *(f"{name}." for name in zoo.heads.get(kind, ())))
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == any(part in name for part in trained), name


def test_load_then_save_writes_the_same(zoo, tmp_path):
    zoo.by_peft("gpt2", tmp_path / "theirs", rank_pattern={"wte": 2})
    dynrank.save_adapter(dynrank.load_adapter(zoo.plain("gpt2"), tmp_path / "theirs"), tmp_path / "ours")
    theirs, ours = (load_file(tmp_path / name / WEIGHTS) for name in ("theirs", "ours"))
    # PEFT also saves the base weights of adapted embeddings.
    factors = {key for key in theirs if "lora_" in key}
    assert set(ours) == factors
    assert all(torch.equal(ours[key], theirs[key]) for key in factors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_is_that_of_the_factors(dtype, zoo, tmp_path):
    """PEFT has stored the weight of the embedding in float32, and it is rounded in the model."""
    zoo.by_peft("gpt2", tmp_path)
    model = dynrank.load_adapter(zoo.plain("gpt2").bfloat16(), tmp_path, dtype=dtype)
    assert {p.dtype for name, p in model.named_parameters() if "lora_" in name} == {dtype}


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.float8_e4m3fn, "float32"])
@pytest.mark.parametrize("put", [dynrank.load_adapter, dynrank.swap_adapter])
def test_a_dtype_that_factors_cannot_have_is_named_and_changes_nothing(put, dtype, zoo, tmp_path):
    zoo.by_peft("bert", tmp_path)
    model = zoo.plain("bert")
    with pytest.raises(
        ConfigurationError, match="dtype must be a floating-point dtype of at least 16 bits, got "
    ) as caught:
        put(model, tmp_path, dtype=dtype)
    assert repr(dtype) in str(caught.value)
    assert not [*dynrank.lora_layers(model)]
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_an_adapter_in_memory_stays_when_its_file_goes(zoo, tmp_path):
    expected = zoo.outputs(zoo.by_peft("bert", tmp_path))
    adapter = dynrank.read_adapter(tmp_path)
    file = tmp_path / WEIGHTS
    # A careless program might write in place.
    file.write_bytes(bytes(file.stat().st_size))
    assert (zoo.outputs(dynrank.load_adapter(zoo.plain("bert"), adapter)) - expected).abs().max() <= 1e-5


def renamed(tensors):
    for key in [key for key in tensors if "layers.1" in key]:
        tensors[key.replace("layers.1", "layers.7")] = tensors.pop(key)


Q = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
# Each has a model, what is changed in the tensors of its adapter, and what is said.
MISFITS = {
    "another width": ("llama", lambda t: t.update({Q: torch.ones(3, 9)}), "q_proj' is 8 x 8 in the model and 8 x 9 in"),
    "other layers": ("llama", renamed, r"no module 'model\.layers\.7.*\n.*no module 'model\.layers\.7"),
    "no number": ("bert", lambda t: t["base_model.model.classifier.weight"].fill_(torch.nan), "classifier.*NaN"),
    "another base": (
        "gpt2",
        lambda t: t["base_model.model.transformer.wte.base_layer.weight"].add_(1),
        "wte.*another base",
    ),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_load_refuses_what_does_not_fit_the_model(misfit, zoo, tmp_path):
    kind, change, message = MISFITS[misfit]
    zoo.by_peft(kind, tmp_path)
    zoo.edit_tensors(tmp_path, change)
    zoo.assert_refused(zoo.plain(kind), tmp_path, message)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_load_and_swap_compare_the_weights_of_the_base(kind, zoo, tmp_path):
    """Where the adapter's folder knows them: PEFT and other programs do not write them."""
    adapted = zoo.adapted(kind)
    dynrank.save_adapter(adapted, tmp_path)
    write_sidecar_files(tmp_path, adapted, None, None, base_of(adapted))
    dynrank.load_adapter(zoo.plain(kind).to(torch.bfloat16), tmp_path)
    dynrank.swap_adapter(zoo.adapted(kind), tmp_path)
    other = zoo.plain(kind)
    with torch.no_grad():
        next(iter(other.parameters())).mul_(1.1)
    zoo.assert_refused(other, tmp_path, r"another base.* has other values here \([12] of ")
    dynrank.add_lora(other, rank=2)
    with pytest.raises(ConfigurationError, match="another base"):
        dynrank.swap_adapter(other, tmp_path)
    (tmp_path / "base.json").unlink()
    dynrank.swap_adapter(other, tmp_path)


def test_load_refuses_a_copy_of_a_tied_weight_and_a_model_with_lora_layers(zoo, tmp_path):
    """PEFT trains such a copy apart from the weight it was tied to; one parameter cannot be both."""
    zoo.by_peft("gpt2", tmp_path, target_modules=["c_attn"], modules_to_save=["lm_head"])
    zoo.assert_refused(zoo.plain("gpt2"), tmp_path, "lm_head.weight' is tied")
    zoo.assert_refused(zoo.adapted("gpt2"), tmp_path, "LoRA layers already")


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_tied_weight_that_was_unfrozen_comes_back_under_both_names(dtype, zoo, tmp_path):
    """PEFT has two copies then, of the same values."""
    model = dynrank.add_lora(zoo.plain("gpt2"), rank=3, target_modules=["c_attn"])
    model.get_input_embeddings().requires_grad_(True)
    dynrank.save_adapter(zoo.trained(model), tmp_path, dtype=dtype)
    loaded = dynrank.load_adapter(zoo.plain("gpt2"), tmp_path)
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    assert_close(zoo.outputs(loaded), zoo.outputs(PeftModel.from_pretrained(zoo.plain("gpt2"), tmp_path).eval()))
    zoo.edit_tensors(tmp_path, lambda tensors: tensors["base_model.model.lm_head.weight"].add_(1.0))
    zoo.assert_refused(zoo.plain("gpt2"), tmp_path, "weight' is tied")


# --- tokens that were added to the base, whose rows each program draws anew

# GPT-2's embedding and head are tied, Llama's are two weights.
ADDED = {
    "llama": ("llama", {}),
    "trained with it": ("llama", {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "tied": ("gpt2", {"target_modules": ["c_attn"]}),
    "tied, with LoRA": ("gpt2", {"target_modules": ["wte", "c_attn"]}),
}


@pytest.fixture
def with_tokens(zoo, tmp_path):
    """A function: a base from its files, with three more tokens."""
    seeds = itertools.count(1)

    def make(kind):
        folder = tmp_path / "base"
        if not folder.exists():
            zoo.plain(kind).save_pretrained(folder)
        model = type(zoo.plain(kind)).from_pretrained(folder)
        torch.manual_seed(next(seeds))
        # Not the usual mean of all rows, which hardly changes from draw to draw.
        model.resize_token_embeddings(23, mean_resizing=False)
        return model.eval()

    return make


def outputs(model):
    with torch.no_grad():
        return model(input_ids=torch.tensor([[3, 22, 4, 20, 5]])).logits


@pytest.mark.parametrize("case", ADDED)
def test_added_tokens_come_with_the_adapter_as_in_peft(case, with_tokens, zoo, tmp_path):
    kind, options = ADDED[case]
    options = {"r": 3, "target_modules": zoo.targets[kind], "task_type": "CAUSAL_LM"} | copy.deepcopy(options)
    theirs = zoo.trained(get_peft_model(with_tokens(kind), LoraConfig(**options)))
    theirs.save_pretrained(tmp_path / "theirs")
    expected = outputs(theirs)
    model = dynrank.load_adapter(with_tokens(kind), tmp_path / "theirs")
    assert_close(outputs(model), expected)
    trained = ("lora_", *options.get("modules_to_save", ()))
    assert all(p.requires_grad == any(part in name for part in trained) for name, p in model.named_parameters())
    # Saved and squeezed again, PEFT still finds them.
    dynrank.save_adapter(model, tmp_path / "ours")
    dynrank.squeeze(tmp_path / "ours", tmp_path / "small", rank=3)
    for folder in ("ours", "small"):
        assert_close(outputs(PeftModel.from_pretrained(with_tokens(kind), tmp_path / folder).eval()), expected)


@pytest.mark.parametrize("tokens", [20, 23])
@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
def test_a_tied_weight_that_peft_has_trained_as_one_is_loaded_as_one(module, tokens, tmp_path):
    """Its ``ensure_weight_tying``: it stores both ends, and names one of them."""
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Qwen2Config(vocab_size=20, num_key_value_heads=2, tie_word_embeddings=True, **sizes)
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "base")

    def base():
        model = Qwen2ForCausalLM.from_pretrained(tmp_path / "base")
        model.resize_token_embeddings(tokens, mean_resizing=False)
        return model

    options = {"target_modules": ["q_proj"], "modules_to_save": [module], "ensure_weight_tying": True}
    theirs = get_peft_model(base(), LoraConfig(r=2, task_type="CAUSAL_LM", **options))
    ids = torch.tensor([[3, tokens - 1, 4]])
    optimizer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        theirs(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    theirs.save_pretrained(tmp_path / "adapter")
    dynrank.squeeze(tmp_path / "adapter", tmp_path / "rounded", rank=2, dtype=torch.bfloat16)
    with torch.no_grad():
        expected = theirs.eval()(input_ids=ids).logits
        assert_close(dynrank.load_adapter(base(), tmp_path / "adapter").eval()(input_ids=ids).logits, expected)
        rounded = dynrank.load_adapter(base(), tmp_path / "rounded").eval()(input_ids=ids).logits
        assert_close(rounded, expected, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize(("kind", "targets"), [("llama", ["q_proj"]), ("gpt2", ["c_attn"]), ("gpt2", ["wte"])])
def test_a_model_of_add_lora_is_saved_with_its_added_tokens(kind, targets, dtype, with_tokens, zoo, tmp_path):
    model = zoo.adapted(kind, base=with_tokens(kind), target_modules=targets)
    dynrank.save_adapter(model, tmp_path / "adapter", dtype=dtype)
    loaded = dynrank.load_adapter(with_tokens(kind), tmp_path / "adapter")
    rounded = {"rtol": 0.05, "atol": 0.02} if dtype else {}
    assert_close(outputs(loaded), outputs(model), **rounded)
    theirs = PeftModel.from_pretrained(with_tokens(kind), tmp_path / "adapter")
    # PEFT puts all rows into the base, so those that are the base's own may not be rounded.
    assert_close(outputs(theirs.eval()), outputs(loaded))


def test_added_tokens_of_another_base_or_without_their_places_are_refused(with_tokens, zoo, tmp_path):
    dynrank.save_adapter(zoo.adapted("llama", base=with_tokens("llama")), tmp_path / "adapter")
    zoo.assert_refused(zoo.plain("llama"), tmp_path / "adapter", r"is \[20, 8\] .* call resize_token_embeddings\(23\)")
    other = with_tokens("llama")
    other.lm_head.weight.data[3].add_(1)
    zoo.assert_refused(other, tmp_path / "adapter", r"'lm_head\.weight' .* was trained on another base")


# --- one adapter in the place of another, between two calls of the model

ADAPTERS = {
    # Unlike ranks, targets (one on the tied head) and scaling.
    "gpt2": [
        {"target_modules": ["c_attn"]},
        {"rank": 5, "target_modules": ["wte", "c_attn", "c_fc"], "rank_map": {"wte": 1}},
        {"rank": 2, "target_modules": ["c_proj", "lm_head"], "rslora": True},
    ],
    # Each with a trained classifier.
    "bert": [
        {"target_modules": ["query"]},
        {"rank": 2, "target_modules": ["query"]},
        {"target_modules": ["value"]},
    ],
}


@pytest.fixture
def saved(zoo, tmp_path):
    def folders(kind):
        return [zoo.saved(tmp_path / f"{kind}{i}", kind, i, **options) for i, options in enumerate(ADAPTERS[kind], 1)]

    return folders


@pytest.mark.parametrize("kind", ADAPTERS)
def test_swap_equals_a_fresh_load_and_draws_no_random_numbers(kind, saved, zoo):
    model = zoo.plain(kind)
    adapters = saved(kind)
    for turn, index in enumerate((0, 1, 2, 0, 2, 1, 0)):
        adapter = dynrank.read_adapter(adapters[index]) if turn % 2 else adapters[index]
        before = torch.get_rng_state()
        assert dynrank.swap_adapter(model, adapter) is model
        assert torch.equal(torch.get_rng_state(), before)
        fresh = dynrank.load_adapter(zoo.plain(kind), adapters[index])
        assert torch.equal(zoo.outputs(model), zoo.outputs(fresh))
        for found in ("rank", "scaling"):
            ours, theirs = ({n: getattr(x, found) for n, x in dynrank.lora_layers(m)} for m in (model, fresh))
            assert ours == theirs
        ours, theirs = ([n for n, p in m.named_parameters() if p.requires_grad] for m in (model, fresh))
        assert ours == theirs


def test_swap_refuses_what_cannot_be_swapped_and_changes_nothing(saved, zoo, tmp_path):
    first, second, _ = saved("bert")
    without_head = zoo.saved(tmp_path / "bare", "bert", target_modules=["value"], modules_to_save=())
    model = dynrank.load_adapter(zoo.plain("bert"), first)
    for adapter, message in {
        without_head: r"classifier\.weight' was trained whole .* plain model",
        saved("gpt2")[0]: "no module 'transformer",
        tmp_path / "absent": "absent",
    }.items():
        zoo.assert_refused(model, adapter, message, dynrank.swap_adapter)
    dynrank.swap_adapter(model, second)
    assert torch.equal(zoo.outputs(model), zoo.outputs(dynrank.load_adapter(zoo.plain("bert"), second)))


def test_many_swaps_leak_nothing(saved, zoo):
    adapters = saved("gpt2")
    model = zoo.plain("gpt2")

    def swaps(count):
        kept = [dynrank.read_adapter(folder) for folder in adapters]
        for index in range(count):
            dynrank.swap_adapter(model, kept[index % 3] if index % 2 else adapters[index % 3])
            zoo.outputs(model)
        dynrank.swap_adapter(model, adapters[0])

    def census():
        gc.collect()
        kinds = [type(o) for o in gc.get_objects()]
        tensors = sum(issubclass(kind, torch.Tensor) for kind in kinds)
        return tensors, sum(issubclass(kind, LoRALayer) for kind in kinds), len(list(model.parameters()))

    swaps(6)
    before = census()
    old = weakref.ref(next(dynrank.lora_layers(model))[1].lora_A)
    swaps(24)
    # Objects that other tests left may go.
    assert all(now <= then for now, then in zip(census(), before, strict=True))
    assert old() is None
