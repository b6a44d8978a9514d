"""The founding cases of code and of layered ranks: their ranks, and the one that drops in miniature."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from tables import rows
from transformers import AutoModelForCausalLM, BloomConfig, GPT2Config

import dynrank
from dynrank.app import train
from dynrank.app.models.pretrained import load_tokenizer
from dynrank.app.runs.job import build
from dynrank.app.runs.report.record import read_metrics
from dynrank.driver.checks import final_ranks

CONF = Path(__file__).resolve().parents[3] / "scripts" / "study" / "conf"
MODULES = "[base64,csv,gzip,heapq,pprint,queue,random,shutil,statistics,textwrap]"
TOKENS = {"vocab_size": 600, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "initializer_range": 0.2}
TIED = {
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **TOKENS),
    "bloom": BloomConfig(hidden_size=32, n_layer=2, n_head=2, **TOKENS),
}
FUSED = {"transformer.h.0.attn.c_attn", "transformer.h.0.self_attention.query_key_value"}


@pytest.fixture(scope="module", params=TIED)
def tied(request, tiny_llama, tmp_path_factory):
    """The folder of a random model of two layers with a tied head and fused query, key and value."""
    folder = tmp_path_factory.mktemp(request.param)
    load_tokenizer(str(tiny_llama)).save_pretrained(folder)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(TIED[request.param]).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    # `head` and `rest` are the ranks at the start and at the end.
    ("name", "head", "rest"),
    [
        ("code_32_to_16", None, (32, 16)),
        ("code_fixed_32", None, (32, 32)),
        ("code_fixed_16", None, (16, 16)),
        ("layered_head", (16, 16), (8, 8)),
        ("layered_uniform_8", (8, 8), (8, 8)),
        ("layered_uniform_16", (16, 16), (16, 16)),
    ],
)
def test_experiments_have_the_ranks_of_head_and_rest_at_one_scaling(name, head, rest, tied):
    # The experiments with layered ranks are the package's, and their task is the study's.
    task = ["task=financial_terms"] if name.startswith("layered") else []
    config = dynrank.compose([*task, f"experiment={name}", f"task.model={tied}"], folder=CONF)
    job = build(config, on_meta=True)
    layers = dict(dynrank.lora_layers(job.module.model))
    final = final_ranks(job.module.model, job.scheduler.driver.stages)
    ranks = {name: (layer.rank, final[name]) for name, layer in layers.items()}
    assert ranks.pop("lm_head", None) == head
    assert set(ranks.values()) == {rest}
    assert FUSED & set(ranks)
    assert {layer.scaling for layer in layers.values()} == {2.0}


# Libraries may warn, as on the command line.
@pytest.mark.filterwarnings("ignore")
def test_code_experiment_measures_before_and_after_the_drop_and_at_the_end(launch, tiny_llama, tmp_path):
    """The drop by deadline, at a step where no validation is due; its cost in the loss stands in the history."""
    task = ["task=code_completion", f"task.model={tiny_llama}", f"data.modules={MODULES}", "task.val_generate=3"]
    sizes = ["task.generate=4", "task.max_new_tokens=48", "task.limit=40", "task.batch_size=2"]
    options = ["experiment=code_32_to_16", "debug=smoke", "plots=false", "hydra.run.dir=run"]
    code, _, said = launch(train.main, "--config-dir", CONF, *task, *sizes, *options)
    assert code == 0, said
    history = rows(tmp_path / "run" / "rank_history.csv")
    ((drop, *ranks, reason),) = {(row["step"], row["rank_before"], row["rank_after"], row["reason"]) for row in history}
    assert ranks == ["32", "16"]
    assert re.search(r"val/loss [\d.]+ → [\d.]+ by the cut", reason)
    for name in ("val/bleu", "val/exact_match", "val/loss"):
        steps, values = read_metrics(tmp_path / "run" / "metrics.csv")[name]
        # A validation after n steps has the number n - 1.
        assert steps == [3, 7, 11]
        assert 8 < int(drop) < 12
        assert all(math.isfinite(value) for value in values)
    tested = json.loads((tmp_path / "run" / "summary.json").read_text())["test"]
    assert set(tested) == {f"test/{name}" for name in ("loss", "perplexity", "accuracy", "bleu", "exact_match")}
    assert all(math.isfinite(value) for value in tested.values())
