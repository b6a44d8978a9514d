"""The task on random GPT-2 and BLOOM models of two layers, with tied heads and fused qkv."""

import json
from importlib.util import find_spec

import pytest
import torch
from peft import PeftModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

import dynrank
from dynrank.errors import ConfigurationError
from dynrank.run.config import rank_pattern
from dynrank.tasks.financial_terms import LineItemsData, SectionWriter

pytestmark = [
    pytest.mark.skipif(find_spec("edgar") is None, reason="needs edgartools (pip install --no-deps)"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),  # PEFT of adapted tied heads
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to (True|False):UserWarning"),  # PEFT of Conv1D
]

DATA = {"batch_size": 4, "max_length": 48, "seed": 0, "val_items": 20, "limit": 32}
OPTIMIZER = {"name": "AdamW", "lr": 1e-2, "head_lr": 1e-3, "weight_decay": 0.0, "warmup_steps": 1, "decay": "linear"}
OPTIMIZER |= {"decay_share": 0.0, "options": {}}
LORA = {"rank": 8, "alpha": 16, "target_modules": ["all-linear", "lm_head"]}
RANKS = {"layered_head": (16, 8), "layered_uniform_8": (8, 8), "layered_uniform_16": (16, 16)}  # of head and rest
FUSED = {"gpt2": "transformer.h.0.attn.c_attn", "bloom": "transformer.h.0.self_attention.query_key_value"}


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


@pytest.fixture(scope="module")
def runs(folder, run_command, tmp_path_factory):
    """The experiment and what it is compared with, in miniature, by one command; folders by name."""
    place = tmp_path_factory.mktemp("layered")
    options = ["task=financial_terms", f"task.model={folder}", "debug=smoke", "task.limit=16", "task.batch_size=4"]
    options += ["trainer.max_steps=8", "plots=false", f"hydra.sweep.dir={place}"]
    done = run_command("dynrank-train", "--multirun", f"experiment={','.join(RANKS)}", *options, cwd=place)
    assert done.returncode == 0, done.stderr
    return {name: place / str(number) for number, name in enumerate(RANKS)}


@pytest.mark.parametrize("name", RANKS)
def test_runs_have_the_ranks_of_head_and_rest_at_one_scaling(name, runs, folder):
    summary = json.loads((runs[name] / "summary.json").read_text())
    ranks = summary["final_ranks"]
    head, rest = RANKS[name]
    assert ranks.pop("lm_head") == head
    assert set(ranks.values()) == {rest}
    assert {FUSED[kind] for kind in FUSED} & set(ranks)
    assert set(summary["test"]) == {"test/loss", "test/accuracy"}
    adapted = dynrank.load_adapter(AutoModelForCausalLM.from_pretrained(folder), runs[name] / "adapter")
    assert {layer.scaling for _, layer in dynrank.lora_layers(adapted)} == {2.0}


def test_adapter_on_the_tied_head_has_equal_logits_in_peft_and_merged_and_leaves_the_embedding(runs, folder):
    place, ids = runs["layered_head"], torch.randint(400, (3, 9), generator=torch.Generator().manual_seed(0))
    trained = SectionWriter.load_from_checkpoint(place / "checkpoints" / "last.ckpt").model.eval()
    base = AutoModelForCausalLM.from_pretrained(folder).eval()
    embedding = base.get_input_embeddings().weight
    assert base.lm_head.weight is embedding
    assert trained.lm_head.weight is trained.get_input_embeddings().weight
    assert torch.equal(trained.get_input_embeddings().weight, embedding)
    with torch.no_grad():
        expected, plain = trained(input_ids=ids).logits, base(input_ids=ids).logits
        merged = dynrank.merge(dynrank.load_adapter(AutoModelForCausalLM.from_pretrained(folder), place / "adapter"))
        assert torch.equal(merged.get_input_embeddings().weight, embedding)
        peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), place / "adapter").eval()
        assert not torch.allclose(plain, expected, atol=1e-4, rtol=0)
        assert torch.allclose(merged.eval()(input_ids=ids).logits, expected, atol=1e-5, rtol=0)
        assert torch.allclose(peft(input_ids=ids).logits, expected, atol=1e-5, rtol=0)


def test_ranks_of_the_experiment_are_told_without_training(folder, run_command, tmp_path):
    told = run_command("dynrank", "ranks", "experiment=layered_head", f"task.model={folder}", cwd=tmp_path)
    assert told.returncode == 0, told.stderr
    lines = [line for line in told.stdout.splitlines() if line.count("│") == 10 and " x " in line]
    rows = [[cell.strip() for cell in line.split("│")] for line in lines]
    layers = {row[1]: (int(row[3]), row[9]) for row in rows if row[3].isdigit()}
    assert layers.pop("lm_head") == (16, "lm_head")
    assert set(layers.values()) == {(8, "lora.rank")}
    assert {FUSED[kind] for kind in FUSED} & set(layers)


def test_override_file_is_the_same_as_the_rank_map_of_the_experiment(folder, tmp_path):
    file = tmp_path / "head.yaml"
    file.write_text("rank_pattern:\n  lm_head: {rank: 16, alpha: 32}\n")
    by_group = dynrank.compose(["experiment=layered_head"])
    by_file = dynrank.compose(["experiment=layered_uniform_8", f"rank_map.file={file}"])
    assert rank_pattern(by_file.rank_map) == rank_pattern(by_group.rank_map)
    assert by_file.lora == by_group.lora
