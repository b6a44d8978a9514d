"""``dynrank ranks``, ``predict`` and ``squeeze --gates`` on a mixture of experts: as PEFT computes with the files."""

import json
import re

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from torch.testing import assert_close
from trained import updated
from transformers import AutoModelForCausalLM, AutoTokenizer

import dynrank
from dynrank.commands import cli
from dynrank.commands.cli import print_ranks
from dynrank.output import console
from dynrank.output.console import one_line

TEXTS = ["def test(", "import json", "assert_close(ours"]


@pytest.fixture(scope="module")
def base(tiny_moe, tiny_llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("moe")
    tiny_moe("Qwen3Moe", vocab_size=600, eos_token_id=0, bos_token_id=None).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    """The folder of an adapter of all linear layers, experts and routers that changes the base's answers."""
    targets = ["all-linear", "gate.weight"]
    model = dynrank.add_lora(AutoModelForCausalLM.from_pretrained(base), rank=4, target_modules=targets)
    folder = tmp_path_factory.mktemp("adapter")
    dynrank.save_adapter(updated(model, std=0.1), folder)
    return folder


def by_peft(base, adapter):
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()


def test_ranks_counts_the_parameters_of_all_experts(base, monkeypatch, capsys):
    monkeypatch.setattr(console, "table_console", lambda: Console(width=250))
    print_ranks(dynrank.compose(["task=text", f"task.model={base}", "lora.rank=4", "schedule=fixed"]))
    rows = [line.strip("│").split("│") for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    cells = {row[0].strip(): [cell.strip() for cell in row] for row in rows}
    model = dynrank.add_lora(AutoModelForCausalLM.from_pretrained(base), rank=4)
    for name, layer in dynrank.lora_layers(model):
        assert cells[name][2:4] == ["4", "4"]
        assert cells[name][6] == f"{layer.lora_A.numel() + layer.lora_B.numel():,}"
    assert cells["model.layers.0.mlp.experts.gate_up_proj"][1] == "4 x 24 x 16"


def test_predict_writes_what_peft_writes(base, adapter, launch):
    options = ["--model", base, "--max-new-tokens", 8]
    code, printed, said = launch(cli.main, "predict", adapter, *TEXTS, *options)
    assert code == 0, said
    theirs = by_peft(base, adapter)
    tokenizer = AutoTokenizer.from_pretrained(base)
    for text, line in zip(TEXTS, printed.splitlines(), strict=True):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        made = theirs.generate(input_ids=ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
        assert line == one_line(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True).strip())


def test_squeeze_by_gates_says_the_losses_that_peft_finds(base, adapter, launch, tmp_path):
    rows = [{"text": f"one line of text with {'abcdef'[i % 6]}"} for i in range(40)]
    (tmp_path / "text.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = ["--budget", "50%", "--gates", "--data", "text.jsonl", "--model", base, "--out", "small"]
    code, printed, said = launch(cli.main, "squeeze", adapter, *options)
    assert code == 0, said
    losses = map(float, re.search(r"loss +([\d.]+) → ([\d.]+), on the 40 examples that chose", printed).groups())
    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = torch.tensor([[*tokenizer(row["text"])["input_ids"], tokenizer.eos_token_id] for row in rows])
    for loss, folder in zip(losses, (adapter, tmp_path / "small"), strict=True):
        with torch.no_grad():
            assert_close(loss, float(by_peft(base, folder)(input_ids=ids, labels=ids).loss), rtol=0, atol=2e-4)
    before, after = (
        sum(layer.parameters for layer in dynrank.read_adapter(folder).layers.values())
        for folder in (adapter, tmp_path / "small")
    )
    assert 0.45 * before < after <= 0.5 * before
