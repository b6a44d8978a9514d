"""Models that torch.compile has wrapped: their layers keep the names of the model itself, in PEFT's files too."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

import dynrank
from dynrank.callbacks import AdapterCheckpoint, RankScheduler, StepSeed
from dynrank.errors import ConfigurationError
from dynrank.schedules import Stage
from dynrank.targets import Rank
from dynrank.triggers import At

# what torch itself does while it compiles
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]
IDS = torch.tensor([[3, 1, 4, 1, 5]])
TARGETS = ["q_proj", "down_proj"]


@pytest.fixture(autouse=True)
def nothing_compiled_stays():
    yield
    torch._dynamo.reset()


def base():
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=20, **sizes)).eval()


def adapted(seed=1, rank=2, **options):
    model = dynrank.add_lora(base(), rank=rank, **{"target_modules": TARGETS, **options})
    torch.manual_seed(seed)
    for _, layer in dynrank.lora_layers(model):
        nn.init.normal_(layer.lora_B)
    return model


def whole(model):
    return torch.compile(model, backend="eager")


def blocks(model):
    """The other usual way: every block by itself."""
    for i, block in enumerate(model.model.layers):
        model.model.layers[i] = torch.compile(block, backend="eager")
    return model


def both(model):
    return whole(blocks(model))


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("wrap", [whole, blocks])
def test_layers_are_named_and_resized_as_in_the_model_itself(wrap):
    plain, model = adapted(), wrap(adapted())
    assert [name for name, _ in dynrank.lora_layers(model)] == [name for name, _ in dynrank.lora_layers(plain)]
    for one in (plain, model):
        dynrank.resize(one, {"model.layers.0.self_attn.q_proj": 1})
    assert_close(logits(model), logits(plain))


def test_what_is_saved_loads_in_peft(tmp_path):
    model = both(adapted(rank_map={"down_proj": {"rank": 3, "alpha": 5}}, modules_to_save=["lm_head"]))
    with torch.no_grad():
        next(parameter for name, parameter in model.named_parameters() if "lm_head" in name).mul_(2)
    dynrank.save_adapter(model, tmp_path)
    assert_close(logits(PeftModel.from_pretrained(base(), tmp_path).eval()), logits(model))
    assert_close(logits(dynrank.load_adapter(both(base()), tmp_path)), logits(model))
    assert "OptimizedModule" not in (tmp_path / "adapter_config.json").read_text()


def test_an_adapter_is_added_swapped_and_merged(tmp_path):
    other = adapted(seed=2, rank=3, target_modules=["q_proj", "k_proj"])
    dynrank.save_adapter(other, tmp_path)
    model = dynrank.add_lora(both(base()), rank=2, target_modules=TARGETS)
    assert_close(logits(model), logits(base()))
    dynrank.swap_adapter(model, tmp_path)
    assert_close(logits(model), logits(other))
    assert_close(logits(dynrank.merge(model)), logits(other), rtol=1e-4, atol=1e-5)


def test_layer_that_is_compiled_by_itself_is_refused(tmp_path):
    """Its wrapper calls what it was made of, whatever stands in the place of that."""
    dynrank.save_adapter(adapted(), tmp_path)
    model = base()
    model.model.layers[0].mlp.down_proj = torch.compile(model.model.layers[0].mlp.down_proj, backend="eager")
    with pytest.raises(ConfigurationError, match=r"down_proj.*compile the model afterwards"):
        dynrank.add_lora(model, rank=2, target_modules=TARGETS)
    with pytest.raises(ConfigurationError, match=r"down_proj.*compile the whole model"):
        dynrank.load_adapter(model, tmp_path)
    assert not list(dynrank.lora_layers(model))
    dynrank.add_lora(model, rank=2, target_modules=["q_proj"])
    model.model.layers[0].self_attn.q_proj = torch.compile(model.model.layers[0].self_attn.q_proj, backend="eager")
    before = logits(model)
    with pytest.raises(ConfigurationError, match=r"q_proj.*compile the whole model"):
        dynrank.swap_adapter(model, tmp_path)
    assert_close(logits(model), before)


def test_model_of_peft_keeps_its_config_in_step(tmp_path):
    model = get_peft_model(base(), LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False))
    compiled = whole(model)
    dynrank.resize(compiled, {name: 2 for name, _ in dynrank.lora_layers(model) if "q_proj" in name})
    model.save_pretrained(tmp_path)
    assert_close(logits(PeftModel.from_pretrained(base(), tmp_path).eval()), logits(compiled))


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_run_goes_on_from_a_checkpoint_without_the_base(regression, tmp_path):
    module_class, data, trainer = regression

    class Compiled(module_class):
        def __init__(self):
            super().__init__()
            self.net = torch.compile(self.net, backend="eager")

    def fit(folder, **options):
        module, saving = Compiled(), AdapterCheckpoint(folder, filename="{step}", every_n_train_steps=6, save_top_k=-1)
        callbacks = [StepSeed(1), RankScheduler([Stage(At(step=4), Rank(2))]), saving]
        trainer(max_steps=10, enable_checkpointing=True, callbacks=callbacks).fit(module, *data(), **options)
        return module

    expected, path = fit(tmp_path), tmp_path / "step=6.ckpt"
    assert not any(name.endswith("base.weight") for name in torch.load(path)["state_dict"])
    again = fit(tmp_path / "again", ckpt_path=path)
    for (name, value), (_, other) in zip(again.named_parameters(), expected.named_parameters(), strict=True):
        assert torch.equal(value, other), name
