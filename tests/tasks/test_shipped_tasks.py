"""The experiments on code and on financial terms in miniature: their runs, and what these leave."""

import csv
import json
import math
from importlib.util import find_spec

import forked
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BloomConfig, GPT2Config

import dynrank
from dynrank.models.pretrained import load_tokenizer
from dynrank.run.report.record import read_metrics
from dynrank.tasks.language_modeling import LanguageModel

MODULES = "[base64,csv,gzip,heapq,pprint,queue,random,shutil,statistics,textwrap]"
CODE = {"code_32_to_16": ({("32", "16")}, 16), "code_fixed_32": (set(), 32), "code_fixed_16": (set(), 16)}
LAYERED = {"layered_head": (16, 8), "layered_uniform_8": (8, 8), "layered_uniform_16": (16, 16)}  # of head and rest
FUSED = {"transformer.h.0.attn.c_attn", "transformer.h.0.self_attention.query_key_value"}
TOKENS = {"vocab_size": 600, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "initializer_range": 0.2}


def sweep(names, folder, *options):
    """Folders by name of runs made by one command."""
    options = ["debug=smoke", "plots=false", f"hydra.sweep.dir={folder}", *options]
    code, said = forked.run(forked.TRAIN, "--multirun", f"experiment={','.join(names)}", *options, cwd=folder)
    assert code == 0, said
    return {name: folder / str(number) for number, name in enumerate(names)}


def assert_adapter_is_the_trained_one(folder, base):
    """In PEFT, here, and merged."""
    plain, ids = AutoModelForCausalLM.from_pretrained, torch.arange(27).view(3, 9) * 22
    ours = dynrank.load_adapter(plain(base), folder / "adapter")
    adapted = [
        LanguageModel.load_from_checkpoint(folder / "checkpoints" / "last.ckpt").model,
        PeftModel.from_pretrained(plain(base), folder / "adapter"),
        ours,
    ]
    with torch.no_grad():
        trained, *others = [model.eval()(input_ids=ids).logits for model in adapted]
        others.append(dynrank.merge(ours)(input_ids=ids).logits)
        assert not torch.allclose(plain(base).eval()(input_ids=ids).logits, trained, atol=1e-4, rtol=0)
    for other in others:  # merged sums are rounded in another order, of logits up to 7
        torch.testing.assert_close(other, trained, atol=3e-5, rtol=0)


@pytest.fixture(scope="module")
def code_runs(tiny_llama, tmp_path_factory):
    task = ["task=code_completion", f"task.model={tiny_llama}", f"data.modules={MODULES}", "task.val_generate=3"]
    sizes = ["task.generate=4", "task.max_new_tokens=48", "task.limit=8", "task.batch_size=2"]
    return sweep(CODE, tmp_path_factory.mktemp("code"), *task, *sizes)


@pytest.mark.parametrize("name", CODE)
def test_code_experiment_drops_and_its_comparisons_do_not(name, code_runs):
    with (code_runs[name] / "rank_history.csv").open(newline="") as file:
        drops = {(row["rank_before"], row["rank_after"]) for row in csv.DictReader(file)}
    summary = json.loads((code_runs[name] / "summary.json").read_text())
    (final,) = set(summary["final_ranks"].values())
    assert (drops, final) == CODE[name]
    assert set(summary["test"]) == {f"test/{m}" for m in ("loss", "perplexity", "bleu", "exact_match", "parses")}
    assert all(math.isfinite(value) for value in summary["test"].values())


def test_code_experiment_measures_right_before_and_right_after_the_drop_and_at_the_end(code_runs):
    """The drop by deadline, at a step where no validation is due."""
    with (code_runs["code_32_to_16"] / "rank_history.csv").open(newline="") as file:
        (drop,) = {int(row["step"]) for row in csv.DictReader(file)}
    for name in ("val/bleu", "val/exact_match", "val/parses", "val/loss"):
        steps, values = read_metrics(code_runs["code_32_to_16"] / "metrics.csv")[name]
        assert steps == [3, 7, drop, drop, 11]  # those after a batch have its index
        assert all(math.isfinite(value) for value in values)
    assert values[2] != values[3]
    assert read_metrics(code_runs["code_fixed_16"] / "metrics.csv")["val/bleu"][0] == [3, 7, 11]


def test_adapter_of_the_code_experiment_is_the_trained_one_everywhere(code_runs, tiny_llama):
    assert_adapter_is_the_trained_one(code_runs["code_32_to_16"], tiny_llama)


TIED = {
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **TOKENS),
    "bloom": BloomConfig(hidden_size=32, n_layer=2, n_head=2, **TOKENS),
}


@pytest.fixture(scope="module", params=TIED)
def tied(request, tiny_llama, tmp_path_factory):
    """The folder of a random model of two layers with a tied head and fused query, key and value."""
    folder = tmp_path_factory.mktemp(request.param)
    load_tokenizer(str(tiny_llama)).save_pretrained(folder)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(TIED[request.param]).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def layered_runs(tied, tmp_path_factory):
    if find_spec("edgar") is None:
        pytest.skip("needs edgartools (pip install --no-deps)")
    task = ["task=financial_terms", f"task.model={tied}", "task.limit=16", "task.batch_size=4", "trainer.max_steps=8"]
    return sweep(LAYERED, tmp_path_factory.mktemp("layered"), *task)


@pytest.mark.parametrize("name", LAYERED)
def test_layered_runs_have_the_ranks_of_head_and_rest_at_one_scaling(name, layered_runs, tied):
    summary = json.loads((layered_runs[name] / "summary.json").read_text())
    ranks = summary["final_ranks"]
    head, rest = LAYERED[name]
    assert ranks.pop("lm_head") == head
    assert set(ranks.values()) == {rest}
    assert FUSED & set(ranks)
    assert set(summary["test"]) == {"test/loss", "test/accuracy"}
    adapted = dynrank.load_adapter(AutoModelForCausalLM.from_pretrained(tied), layered_runs[name] / "adapter")
    assert {layer.scaling for _, layer in dynrank.lora_layers(adapted)} == {2.0}


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")  # PEFT of adapted tied heads
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to (True|False):UserWarning")  # PEFT of Conv1D
def test_adapter_on_the_tied_head_is_the_trained_one_everywhere_and_leaves_the_embedding(layered_runs, tied):
    place = layered_runs["layered_head"]
    assert_adapter_is_the_trained_one(place, tied)
    base = AutoModelForCausalLM.from_pretrained(tied)
    embedding = base.get_input_embeddings().weight
    assert base.lm_head.weight is embedding
    trained = LanguageModel.load_from_checkpoint(place / "checkpoints" / "last.ckpt").model
    assert trained.lm_head.weight is trained.get_input_embeddings().weight
    merged = dynrank.merge(dynrank.load_adapter(AutoModelForCausalLM.from_pretrained(tied), place / "adapter"))
    for model in (trained, merged):
        assert torch.equal(model.get_input_embeddings().weight, embedding)
