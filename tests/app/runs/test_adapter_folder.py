"""The adapter's folder can be used: by PEFT, by transformers once it is merged, and by ``dynrank predict``."""

import json
import os
import re
import shutil
import sys

import pytest
from markdown_it import MarkdownIt
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

import dynrank
from dynrank.app.commands import cli
from dynrank.app.models.merging import merge_adapter
from dynrank.app.runs.job import run
from dynrank.app.runs.report.page import template
from dynrank.app.runs.summary import read_summary

SMALL = ["debug=smoke", "lora.rank=4", "plots=false", "trainer.max_steps=4", "trainer.enable_progress_bar=false"]
SMALL += ["schedule=after_convergence", "schedule.shared=false"]
ROWS = ["text,label", *(f"{word} number {i},{label}" for i in range(30) for word, label in [("a", "bad"), ("b", "ok")])]
ROWS += [f"c number {i},so-so" for i in range(30)]
PAIRS = [("a number", "bad"), ("b number", "ok")]
TEXT = "a number 3"


def made(folder, *overrides):
    run(dynrank.compose([*SMALL, *overrides]), folder)
    return folder / "adapter"


@pytest.fixture(scope="module")
def classifier(tmp_path_factory, tiny_bert):
    """An adapter of three labels on a base whose own head has two."""
    folder = tmp_path_factory.mktemp("classifier")
    (folder / "rows.csv").write_text("\n".join(ROWS))
    return made(folder / "run", "task=classification", f"task.model={tiny_bert}", f"data.train={folder / 'rows.csv'}")


def probabilities(line):
    return {cell.rpartition(" ")[0]: float(cell.rpartition(" ")[2]) for cell in line.split("\t")}


def card(folder):
    """What the Python of the model card leaves behind, run in its folder."""
    (block,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)
    here = os.getcwd()
    names = {}
    os.chdir(folder)
    try:
        exec(block, names)
    finally:
        os.chdir(here)
    return names


def test_folder_of_a_classifier_is_complete(classifier, tiny_bert):
    names = {"README.md", "base.json", "inputs.json", "labels.json", "tokenizer.json", "tokenizer_config.json"}
    names |= {"adapter_config.json", "adapter_model.safetensors"}
    assert {file.name for file in classifier.iterdir()} == names
    config = json.loads((classifier / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny_bert)
    assert json.loads((classifier / "labels.json").read_text())["labels"] == ["bad", "ok", "so-so"]
    page = (classifier / "README.md").read_text()
    # A folder is no name on the hub, which would refuse the card.
    assert "base_model:" not in page
    said = ("4 steps", "`bad`, `ok`, `so-so`", "| test/accuracy |", "| attention.self.query | 2 | 2 |", "hf upload")
    assert all(text in page for text in said), page


def test_probabilities_are_those_of_the_task_whatever_the_base_was_trained_for(tiny_bert, launch, tmp_path):
    """By the command, PEFT and transformers."""
    base = tmp_path / "base"
    shutil.copytree(tiny_bert, base)
    # A model with one output.
    of_base = {"problem_type": "regression", "id2label": {"0": "score"}, "label2id": {"score": 0}}
    config = json.loads((base / "config.json").read_text()) | of_base
    (base / "config.json").write_text(json.dumps(config))
    rows = [{"text": f"{word} {i}", "label": label} for i in range(20) for word, label in PAIRS]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    own = ["task=classification", f"task.model={base}", f"data.train={tmp_path / 'rows.jsonl'}"]
    folder = made(tmp_path / "run", *own, "optimizer.head_lr=0.1")
    trained = PeftModel.from_pretrained(
        AutoModelForSequenceClassification.from_pretrained(base, num_labels=2, ignore_mismatched_sizes=True), folder
    ).eval()
    inputs = AutoTokenizer.from_pretrained(folder)(TEXT, return_tensors="pt", return_token_type_ids=False)
    logits = trained(**inputs).logits[0].detach().double()
    expected = dict(zip(["bad", "ok"], logits.softmax(-1).tolist(), strict=True))
    code, printed, said = launch(cli.main, "predict", folder, TEXT)
    assert code == 0, said
    assert probabilities(printed.splitlines()[-1]) == pytest.approx(expected, abs=1e-4)
    merge_adapter(folder, None, tmp_path / "merged")
    for model in (card(folder)["model"], str(tmp_path / "merged")):
        answers = pipeline("text-classification", model=model, tokenizer=str(folder))(TEXT, top_k=None)
        assert {cell["label"]: cell["score"] for cell in answers} == pytest.approx(expected, abs=1e-4)


def test_card_of_a_chat_asks_in_the_format_of_chats(tiny_llama, launch, tmp_path, capsys):
    base = shutil.copytree(tiny_llama, tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(base)
    turns = [{"role": "system", "content": 'Be "kind".'}, {"role": "user", "content": "a question"}]
    lines = ({"messages": [*turns, {"role": "assistant", "content": f"answer {i}"}]} for i in range(60))
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    folder = made(tmp_path / "run", "task=chat", f"task.model={base}", f"data.train={tmp_path / 'rows.jsonl'}")
    assert launch(cli.main, "merge", folder, "--out", folder / "merged")[0] == 0
    capsys.readouterr()
    assert card(folder)["chat"] == turns
    assert "'role': 'assistant'" in capsys.readouterr().out


def test_adapter_of_a_packaged_model_names_the_hub_and_is_found_without_it(smoke_run, launch):
    folder = smoke_run[0] / "adapter"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "sentence-transformers/all-MiniLM-L6-v2"
    texts = [file.read_text() for file in folder.iterdir() if file.suffix in (".json", ".md")]
    assert not [text for text in texts if sys.prefix in text]
    page = (folder / "README.md").read_text()
    assert "base_model: sentence-transformers/all-MiniLM-L6-v2\n" in page
    assert "$ dynrank-train debug=smoke" in page
    code, printed, said = launch(cli.main, "predict", folder, "type 2 diabetes")
    assert code == 0, said
    assert set(probabilities(printed.strip())) < set(json.loads((folder / "labels.json").read_text())["labels"])


def test_labels_that_are_not_those_of_the_head_are_refused(classifier, launch, tmp_path):
    folder = shutil.copytree(classifier, tmp_path / "adapter")
    for labels, message in (('{"labels": ["one"]}', "must name 3 labels, got 1"), ("[", "labels.json' cannot be read")):
        (folder / "labels.json").write_text(labels)
        code, _, said = launch(cli.main, "predict", folder, "a")
        assert (code, said.count("error"), message in said) == (2, 1, True), said


LABELS = ["<img src=x>", "[link](http://x)\nsecond line", "\x1b[31mred `code`"]


def test_names_of_labels_are_no_markup_on_the_card(classifier):
    card = template("card.md.jinja").render(
        base="b", on_hub=False, kind="XForSequenceClassification", labels=LABELS, ranks={}, command=None,
        summary=read_summary(classifier.parent), version="",
    )  # fmt: skip
    shown = MarkdownIt().render(card)
    assert "<img" not in shown
    assert "<a href" not in shown
    assert r"[link](http://x)\nsecond line" in shown
