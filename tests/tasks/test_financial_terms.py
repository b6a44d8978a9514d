"""The task on random GPT-2 and BLOOM models of two layers, with tied heads and fused qkv."""

from importlib.util import find_spec

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import BloomConfig, BloomForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from dynrank.errors import ConfigurationError
from dynrank.tasks.financial_terms import LineItemsData, SectionWriter

pytestmark = pytest.mark.skipif(find_spec("edgar") is None, reason="needs edgartools (pip install --no-deps)")

DATA = {"batch_size": 4, "max_length": 48, "seed": 0, "val_items": 20, "limit": 32}
OPTIMIZER = {"name": "AdamW", "lr": 1e-2, "head_lr": 1e-3, "weight_decay": 0.0, "warmup_steps": 1, "decay": "linear"}
OPTIMIZER |= {"decay_share": 0.0, "options": {}}
# every linear layer and the head, whatever the architecture
LAYERS = ".*(c_attn|c_proj|c_fc|query_key_value|dense|dense_h_to_4h|dense_4h_to_h|lm_head)"
LORA = {"rank": 8, "alpha": 16, "target_modules": LAYERS}


def gpt2():
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, **dropout, **TOKENS))


def bloom():
    return BloomForCausalLM(BloomConfig(hidden_size=32, n_layer=2, n_head=2, **TOKENS))


TOKENS = {"vocab_size": 400, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "initializer_range": 0.2}


@pytest.fixture(scope="module", params=[gpt2, bloom])
def folder(request, tmp_path_factory):
    made = tmp_path_factory.mktemp(request.param.__name__)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["Line item: non current assets\nSection: Current Liabilities", "Section:"], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>").save_pretrained(made)
    torch.manual_seed(0)
    request.param().save_pretrained(made)
    return str(made)


@pytest.fixture(scope="module")
def data(folder):
    made = LineItemsData(folder, **DATA)
    made.setup("fit")
    return made


def test_batch_learns_the_section_and_its_end_and_not_the_item(data):
    batch = next(iter(data.train_dataloader()))
    sections = {item.text: item.section for item in data.splits.train}
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        learned = labels != -100
        item, section = data.tokenizer.decode(ids[: int(learned.nonzero()[-1]) + 1]).split("\n")
        assert f"{sections[item.removeprefix('Line item: ')]}<|end|>" == section.removeprefix("Section: ")
        assert data.tokenizer.decode(ids[learned]) == section.removeprefix("Section:")


def test_evaluation_takes_each_item_once(data):
    assert sum(len(batch["labels"]) for batch in data.val_dataloader()) == DATA["val_items"]
    counts = [sum(len(batch["labels"]) for batch in loader) for loader in data.test_dataloader()]
    assert counts == [DATA["limit"], DATA["val_items"], DATA["val_items"]]


def test_accuracy_is_the_share_that_greedy_decoding_writes_exactly(folder, data, regression):
    torch.manual_seed(0)
    module = SectionWriter(folder, LORA, {**OPTIMIZER, "lr": 7e-3})
    whole = LineItemsData(folder, **{**DATA, "limit": 12})
    regression[2](max_steps=100, limit_val_batches=0).fit(module, whole)
    whole.examples["test"] = whole.examples["train"]  # learned by heart in part
    metrics, val, train = regression[2]().test(module, whole, verbose=False)
    module.eval()
    right = 0
    for example in whole.examples["train"]:
        prompt = torch.tensor([example.prompt])
        length = len(example.answer)
        made = module.model.generate(prompt, max_new_tokens=length, do_sample=False, eos_token_id=0, pad_token_id=0)
        right += made[0, len(example.prompt) :].tolist() == example.answer
    assert 0 < right < 12
    assert metrics["test/accuracy"] == pytest.approx(right / 12)


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"batch_size": None}, "task.batch_size"),
        ({"max_length": 0}, "task.max_length"),
        ({"val_items": "all"}, "task.val_items"),
        ({"limit": 0}, "task.limit"),
    ],
)
def test_data_refuses_unusable_values(values, key):
    with pytest.raises(ConfigurationError, match=key):
        LineItemsData("model", **{**DATA, **values})


def test_items_that_do_not_fit_are_left_out_and_none_is_refused(folder):
    made = LineItemsData(folder, **{**DATA, "max_length": 5})
    with pytest.raises(ConfigurationError, match=r"line items of .*task\.max_length"):
        made.setup("fit")
