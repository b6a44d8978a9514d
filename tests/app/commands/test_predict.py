"""``dynrank predict`` on files: it answers each row as PEFT answers it alone, in order, and goes on after a stop."""

import json
import os
import re
import shutil

import pandas as pd
import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from tokenizers.processors import TemplateProcessing
from trained import updated
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BartConfig,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
)

import dynrank
from dynrank.adapters.base import base_of
from dynrank.adapters.load import start_from
from dynrank.adapters.sidecar_files import Inputs, with_labels, write_sidecar_files
from dynrank.app.commands import cli
from dynrank.app.commands.keep import kept_cells
from dynrank.app.console import one_line
from dynrank.app.models.predicting import Answerer, Prompts
from dynrank.app.tasks.classification import Classification
from dynrank.app.tasks.data.source import Source
from dynrank.app.tasks.examples import make_examples
from dynrank.app.tasks.language_modeling import LanguageModeling

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
LABELS = ["billing", "login", "other"]
SUBJECTS = ["" if i % 5 == 0 else f"Ticket {i}" for i in range(90)]
BODIES = [f'first line {i * i}\nsecond, "{i}" ' * (i % 4 + 1) for i in range(90)]
ROWS = [{"id": str(i), "Subject": SUBJECTS[i], "Body": BODIES[i]} for i in range(90)]
TEXTS = ["\n".join(filter(None, (row["Subject"], row["Body"]))) for row in ROWS]


def adapter(folder, model, base, inputs, **options):
    updated(dynrank.add_lora(model, rank=2, alpha=8, **options))
    model.config.name_or_path = str(base)
    dynrank.save_adapter(model, folder)
    write_sidecar_files(folder, model, AutoTokenizer.from_pretrained(base), inputs)
    return folder


@pytest.fixture(scope="module")
def classifier(tiny_bert, tmp_path_factory):
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=3, ignore_mismatched_sizes=True)
    model.config.id2label = dict(enumerate(LABELS))
    model.classifier.weight.data *= 30
    inputs = Inputs("classification", {"text": ["Subject", "Body"], "label": "queue"}, None, max_length=20)
    folder = tmp_path_factory.mktemp("run") / "adapter"
    return adapter(folder, model, tiny_bert, inputs, modules_to_save=["classifier"])


@pytest.fixture(scope="module")
def by_peft(classifier, tiny_bert):
    """The label and probability of each text by PEFT, alone, cut as in training."""
    base = AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=3, ignore_mismatched_sizes=True)
    model = PeftModel.from_pretrained(base, classifier).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    found = []
    for text in TEXTS:
        inputs = tokenizer(text, truncation=True, max_length=20, return_tensors="pt", return_token_type_ids=False)
        with torch.no_grad():
            value, index = model(**inputs).logits[0].softmax(-1).max(0)
        found.append((LABELS[index], float(value)))
    return found


@pytest.fixture(scope="module")
def chatty(tiny_llama, tmp_path_factory):
    base = tmp_path_factory.mktemp("chatty") / "base"
    shutil.copytree(tiny_llama, base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = TEMPLATE
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(base)
    torch.manual_seed(0)
    # A turn may end otherwise than a text, as in Gemma's chats.
    GenerationConfig(eos_token_id=[0, *range(1, 600, 16)]).save_pretrained(base)
    inputs = Inputs("chat", {"messages": "talk"}, "Be kind.")
    return adapter(base.parent / "adapter", AutoModelForCausalLM.from_pretrained(base), base, inputs)


def write(path, rows):
    table = pd.DataFrame(rows)
    if path.suffix == ".parquet":
        table.to_parquet(path)
    elif path.suffix == ".csv":
        table.to_csv(path, index=False)
    else:
        table.to_json(path, orient="records", lines=True)
    return path


def read(path):
    if path.suffix == ".parquet":
        return pd.read_parquet(path).to_dict("records")
    if path.suffix == ".csv":
        return pd.read_csv(path).to_dict("records")
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(("kind", "out"), [("csv", "csv"), ("jsonl", "parquet"), ("parquet", "jsonl")])
def test_rows_of_a_file_are_answered_in_order_as_by_peft_alone(kind, out, classifier, by_peft, launch, tmp_path):
    file = write(tmp_path / f"rows.{kind}", ROWS)
    code, printed, said = launch(cli.main, "predict", classifier, file, "--out", f"out.{out}", "--batch-size", 4)
    assert code == 0, said
    assert "text <- Subject + Body" in said
    answers = read(tmp_path / f"out.{out}")
    # The heading of a csv file is row 1.
    assert [row["row"] for row in answers] == [*range(2 if kind == "csv" else 1, 92 if kind == "csv" else 91)]
    assert [row["label"] for row in answers] == [label for label, _ in by_peft]
    assert len({row["label"] for row in answers}) > 1
    assert [row["probability"] for row in answers] == pytest.approx([value for _, value in by_peft], abs=1e-4)
    assert {file.name for file in tmp_path.iterdir()} == {f"rows.{kind}", f"out.{out}"}


@pytest.mark.parametrize(("kind", "out"), [("csv", "csv"), ("jsonl", "parquet"), ("parquet", "jsonl")])
def test_columns_that_are_kept_stand_beside_the_answers_of_their_rows(kind, out, classifier, launch, tmp_path):
    """With an unusable row in between, zeros in front, numbers as numbers, and what a row lacks."""
    rows = [{"id": f"00{row['id']}", "queue": i % 3, **row, "note": [None, "x"][i % 2]} for i, row in enumerate(ROWS)]
    rows = [{**row, "score": 1.5e-12 * i} for i, row in enumerate(rows)]
    rows = [{**row, "id": f"00{i}"} for i, row in enumerate(rows[:20])]
    rows[7] |= {"Subject": "", "Body": ""}
    file = write(tmp_path / f"rows.{kind}", rows)
    options = ["--skip-unusable", "--keep", "id", "--keep", "truth=queue", "--keep", "note", "--keep", "score"]
    code, _, said = launch(cli.main, "predict", classifier, file, "--out", f"out.{out}", *options)
    assert code == 0, said
    plain, *_ = launch(cli.main, "predict", classifier, file, "--out", f"plain.{out}", "--skip-unusable")
    assert plain == 0
    answers = pd.DataFrame(read(tmp_path / f"out.{out}") if out != "csv" else pd.read_csv("out.csv", dtype=str))
    assert [*answers] == ["row", "id", "truth", "note", "score", "label", "probability"]
    assert answers["id"].tolist() == [row["id"] for i, row in enumerate(rows) if i != 7]
    assert answers["truth"].astype(int).tolist() == [i % 3 for i in range(20) if i != 7]
    # pandas, which writes this test's rows.jsonl, rounds such numbers.
    if kind != "jsonl":
        assert answers["score"].astype(float).tolist() == [1.5e-12 * i for i in range(20) if i != 7]
    filled = [value if isinstance(value, str) and value else None for value in answers["note"]]
    assert filled == [row["note"] for i, row in enumerate(rows) if i != 7]
    without = pd.DataFrame(read(tmp_path / f"plain.{out}"))
    assert answers["label"].tolist() == without["label"].tolist()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rows.csv", "--out", "out.csv", "--keep", "ticket"], r"no column 'ticket'; it has \['id', 'Subject', 'Body'"),
        (["rows.csv", "--out", "out.csv", "--keep", "new=ticket"], "no column 'ticket'"),
        (["rows.csv", "--keep", "id"], "--keep must go with --out"),
        (["a text", "--out", "out.csv", "--keep", "id"], "--keep must go with a file of columns"),
        (["rows.csv", "--out", "out.csv", "--keep", "label"], "have a column 'label' of their own.*--keep NAME=label"),
        (["rows.jsonl", "--out", "out.csv", "--keep", "id"], "several types in the column 'id'"),
    ],
)
def test_a_column_that_cannot_come_along_is_refused_before_an_answer(
    arguments, message, classifier, launch, tmp_path, monkeypatch
):
    def never(*_, **__):
        raise AssertionError("the model was asked")

    monkeypatch.setattr(Answerer, "labels", never)
    # A missing column is known before the model is loaded.
    if "no column" in message:
        monkeypatch.setattr("dynrank.app.commands.predict.Answerer", never)
    write(tmp_path / "rows.csv", [{**row, "label": "x"} for row in ROWS[:3]])
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({**ROWS[0], "id": i}) + "\n" for i in (1, "two")))
    code, _, said = launch(cli.main, "predict", classifier, *arguments)
    assert code == 2
    assert re.search(message, said), said
    assert not (tmp_path / "out.csv").exists()


def test_lists_and_mappings_that_are_kept_are_json_in_csv(classifier, launch, tmp_path):
    cells = [{"tags": ["ä", 'b"'], "meta": {"n": [1]}}, {"tags": [], "meta": {"n": []}}, {"tags": None, "meta": None}]
    lines = (json.dumps({**row, **cell}) for row, cell in zip(ROWS, cells, strict=False))
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    options = ["--keep", "tags", "--keep", "meta", "--out", "out.csv"]
    code, _, said = launch(cli.main, "predict", classifier, "rows.jsonl", *options)
    assert code == 0, said
    found = pd.read_csv("out.csv", dtype=str, keep_default_na=False)
    back = [{name: json.loads(row[name] or "null") for name in ("tags", "meta")} for row in found.to_dict("records")]
    assert back == cells
    assert "ä" in found["tags"][0]


def test_ids_without_a_sign_come_along(tmp_path):
    """As hashes are; pyarrow alone takes no int from 2**63 on."""
    ids = [2**63 + 5, 2**64 - 1, 7]
    file = write(tmp_path / "rows.parquet", {"text": list("abc"), "id": pd.Series(ids, dtype="uint64")})
    assert kept_cells(Source(str(file), "FILE", "test"), {"id": "id"}, [1, 2, 3], [])["id"] == ids


def test_text_files_of_one_name_and_time_are_read_each(classifier, launch, tmp_path, monkeypatch):
    """As archives may hold them, in folders of their own."""
    printed = []
    for name, text in (("one", "a b c"), ("two", "invoice refund")):
        file = tmp_path / name / "ask.txt"
        file.parent.mkdir()
        file.write_text(text)
        os.utime(file, (1e9, 1e9))
        monkeypatch.chdir(file.parent)
        printed += [launch(cli.main, "predict", classifier, given)[1] for given in ("ask.txt", text)]
    assert printed[0] == printed[1] != printed[3] == printed[2]


def test_labels_called_as_transformers_calls_them_keep_their_places(tiny_bert, tmp_path):
    """Sorted as texts, LABEL_10 comes before LABEL_2."""
    labels = ["LABEL_0", "LABEL_10", "LABEL_2"]
    options = {"num_labels": 3, "ignore_mismatched_sizes": True}
    model = AutoModelForSequenceClassification.from_pretrained(tiny_bert, **options)
    model.config.id2label = dict(enumerate(labels))
    model.config.problem_type = "multi_label_classification"
    write_sidecar_files(tmp_path, model, None)
    config = with_labels(AutoModelForSequenceClassification.from_pretrained(tiny_bert, **options), tmp_path).config
    assert [*config.id2label.values()] == labels
    assert config.problem_type == "multi_label_classification"
    # As a user writes it, who gives names to the classes of an adapter of another program.
    (tmp_path / "labels.json").write_text(json.dumps({"labels": labels}))
    assert with_labels(model, tmp_path).config.problem_type == "multi_label_classification"


@pytest.mark.parametrize(("labels", "kind"), [(1, None), (3, "regression")])
def test_a_model_whose_outputs_are_numbers_does_not_classify(labels, kind, tiny_bert, launch, tmp_path):
    """As a reward model, and a regression of several scores."""
    base = tmp_path / "base"
    model = AutoModelForSequenceClassification.from_pretrained(
        tiny_bert, num_labels=labels, problem_type=kind, ignore_mismatched_sizes=True
    )
    model.save_pretrained(base)
    AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(base)
    model.config.name_or_path = str(base)
    dynrank.save_adapter(dynrank.add_lora(model, rank=2, modules_to_save=["classifier"]), tmp_path / "adapter")
    code, _, said = launch(cli.main, "predict", tmp_path / "adapter", "a text")
    assert code == 2
    assert f"got a BertForSequenceClassification with {labels} outputs of numbers" in said


@pytest.mark.parametrize("command", ["predict", "merge"])
def test_a_base_with_other_weights_is_refused(command, classifier, tiny_bert, launch, tmp_path):
    """Of the same shapes, as an instruct model beside its base."""
    shutil.copytree(classifier, tmp_path / "adapter")
    options = {"num_labels": 3, "ignore_mismatched_sizes": True}
    plain = AutoModelForSequenceClassification.from_pretrained(tiny_bert, **options)
    adapted = dynrank.load_adapter(plain, classifier)
    write_sidecar_files(tmp_path / "adapter", adapted, None, None, base_of(adapted))
    AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(tmp_path / "other")
    other = AutoModelForSequenceClassification.from_pretrained(tiny_bert)
    other.bert.encoder.layer[1].output.dense.weight.data *= 1.1
    other.save_pretrained(tmp_path / "other")
    last = ["a text"] if command == "predict" else ["--out", "merged"]
    code, _, said = launch(cli.main, command, "adapter", "--model", tiny_bert, *last)
    assert code == 0, said
    shutil.rmtree(tmp_path / "merged", ignore_errors=True)
    code, _, said = launch(cli.main, command, "adapter", "--model", "other", *last)
    assert (code, "trained on another base" in said, "(1 of " in said) == (2, True, True), said
    (tmp_path / "adapter" / "base.json").unlink()
    assert launch(cli.main, command, "adapter", "--model", "other", *last)[0] == 0


@pytest.mark.parametrize("trained_in", [torch.float16, torch.float32])
def test_a_base_is_the_same_in_float16(trained_in, classifier, tiny_bert, launch, tmp_path):
    """As where its files have float32, and its config says float16; and where one of two copies is of each."""
    shutil.copytree(classifier, tmp_path / "adapter")
    other = {torch.float16: torch.float32, torch.float32: torch.float16}[trained_in]
    options = {"num_labels": 3, "ignore_mismatched_sizes": True}
    plain = AutoModelForSequenceClassification.from_pretrained(tiny_bert, dtype=trained_in, **options)
    adapted = dynrank.load_adapter(plain, classifier)
    write_sidecar_files(tmp_path / "adapter", adapted, None, None, base_of(adapted))
    AutoModelForSequenceClassification.from_pretrained(tiny_bert, dtype=other).save_pretrained(tmp_path / "other")
    code, _, said = launch(cli.main, "merge", "adapter", "--model", "other", "--out", "merged")
    assert code == 0, said


def test_an_interrupted_command_goes_on_and_writes_the_same(classifier, launch, tmp_path, monkeypatch):
    file = write(tmp_path / "rows.csv", ROWS)
    folder = shutil.copytree(classifier, tmp_path / "adapter")
    command = ["predict", folder, file, "--batch-size", 4, "--out"]
    assert launch(cli.main, *command, "whole.parquet")[0] == 0
    asked = []
    labels = Answerer.labels

    def stopping(self, rows):
        asked.extend(row["place"] for row in rows)
        # 32 rows are kept together.
        if len(asked) == 60:
            raise KeyboardInterrupt
        return labels(self, rows)

    with monkeypatch.context() as patch:
        patch.setattr(Answerer, "labels", stopping)
        assert launch(cli.main, *command, "out.parquet")[0] == 130
        asked.clear()
        # With another option the answers may differ, so it does not go on.
        changed = launch(cli.main, *command, "out.parquet", "--columns", "text=Body")
        assert (changed[0], min(asked)) == (130, 2)
        asked.clear()
        # Neither with other names of the labels.
        labels_file = folder / "labels.json"
        before = labels_file.stat()
        names = labels_file.read_text()
        labels_file.write_text(names.replace("login", "log in"))
        changed = launch(cli.main, *command, "out.parquet")
        assert (changed[0], min(asked)) == (130, 2)
        labels_file.write_text(names)
        os.utime(labels_file, ns=(before.st_atime_ns, before.st_mtime_ns))
        asked.clear()
        code, _, said = launch(cli.main, *command, "out.parquet")
    assert code == 0, said
    assert sorted(asked) == [*range(34, 92)]
    assert (tmp_path / "out.parquet").read_bytes() == (tmp_path / "whole.parquet").read_bytes()


def written(adapter, prompt, cls=AutoModelForCausalLM):
    base = adapter.parent / "base"
    model = PeftModel.from_pretrained(cls.from_pretrained(base), adapter).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
    made = model.generate(input_ids=ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
    start = 0 if model.config.is_encoder_decoder else ids.shape[1]
    return tokenizer.decode(made[0, start:], skip_special_tokens=True)


def test_chats_are_answered_with_the_system_prompt_that_was_learned(chatty, launch, tmp_path):
    asked = [{"role": "user", "content": "who\nare you"}]
    answered = [*asked, {"role": "assistant", "content": "no one"}]
    with_system = [{"role": "system", "content": "Be brief."}, *asked]
    write(tmp_path / "rows.jsonl", [{"talk": talk} for talk in (asked, answered, with_system)])
    prompt = "<|system|>{}<|end|><|user|>who\nare you<|end|><|assistant|>"
    learned, brief, given = (written(chatty, prompt.format(text)) for text in ("Be kind.", "Be brief.", "Be rude."))
    assert len({learned, brief, given}) == 3
    options = ["--max-new-tokens", 12, "--batch-size", 2]
    for extra, expected in (((), learned), (("--system", "Be rude."), given)):
        out = tmp_path / f"{len(extra)}.jsonl"
        code, _, said = launch(cli.main, "predict", chatty, "rows.jsonl", *options, *extra, "--out", out)
        assert code == 0, said
        assert [row["answer"] for row in read(out)] == [expected, expected, brief]
    # Texts are first turns of a chat, without --chat.
    code, printed, _ = launch(cli.main, "predict", chatty, "who\nare you", *options)
    assert printed.rstrip("\n") == "".join(c if c.isprintable() else repr(c)[1:-1] for c in learned)


def greedy(model, tokenizer, prompt, count=12):
    """The most probable token again and again."""
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
    start = ids.shape[1]
    with torch.no_grad():
        for _ in range(count):
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
    return ids[0, start:].tolist()


def test_a_chat_ends_where_its_template_ends_a_turn(tiny_llama, launch, tmp_path):
    """As ChatML's <|im_end|> in base models whose files name <|endoftext|>: in commands, tests of a run, a merge."""
    base = tmp_path / "base"
    shutil.copytree(tiny_llama, base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    folder = adapter(tmp_path / "adapter", AutoModelForCausalLM.from_pretrained(base), base, Inputs("chat"))
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
    prompt = "<|user|>who are you|<|assistant|>"
    tokens = greedy(model, tokenizer, prompt)
    # One of the tokens that it writes becomes the end of a turn.
    texts = tokenizer.convert_ids_to_tokens(tokens)
    place, end = next(
        (i, t) for i, t in enumerate(texts) if i and t.isalpha() and t not in prompt and t not in texts[:i]
    )
    tokenizer.add_special_tokens({"additional_special_tokens": [end]})
    tokenizer.chat_template = TEMPLATE.replace("<|end|>", f"{{{{ '{end}' if m.role == 'assistant' else '|' }}}}")
    for at in (base, folder):
        tokenizer.save_pretrained(at)
    expected = tokenizer.decode(tokens[:place])
    command = ["predict", folder, "who are you", "--max-new-tokens", 12]
    by_run = launch(cli.main, *command)
    # Adapters of other programs say nothing of their training.
    (folder / "inputs.json").rename(tmp_path / "inputs.json")
    by_user = launch(cli.main, *command, "--chat")
    (tmp_path / "inputs.json").rename(folder / "inputs.json")
    for code, printed, said in (by_run, by_user):
        assert (code, printed.removesuffix("\n")) == (0, one_line(expected)), said
    talk = [{"role": "user", "content": "hm"}, {"role": "assistant", "content": "ok"}]
    data = dict.fromkeys(["train", "val", "test"], [{"messages": talk}] * 8)
    module = LanguageModeling(str(base), data, form="chat", max_new_tokens=12).module({"rank": 2, "alpha": 8}, {})
    start_from(module.model.eval(), dynrank.read_adapter(folder))
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
    assert module.continuations(ids, torch.ones_like(ids)) == [expected]
    code, _, said = launch(cli.main, "merge", folder, "--out", "merged")
    assert code == 0, said
    merged = AutoModelForCausalLM.from_pretrained("merged").eval()
    made = merged.generate(input_ids=ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert made.tolist() == tokens[: place + 1]


@pytest.mark.parametrize("settings", [{"repetition_penalty": 4.0}, {"no_repeat_ngram_size": 1}, {"num_beams": 3}])
def test_answers_are_greedy_whatever_the_base_says_of_generation(settings, tiny_llama, launch, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny_llama, base)
    GenerationConfig(eos_token_id=0, **settings).save_pretrained(base)
    folder = adapter(tmp_path / "adapter", AutoModelForCausalLM.from_pretrained(base), base, Inputs("completion"))
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
    tokens = greedy(model, tokenizer, "def first", count=24)
    ids = tokenizer("def first", return_tensors="pt")
    own = model.generate(**ids, max_new_tokens=24, do_sample=False)[0, ids["input_ids"].shape[1] :].tolist()
    assert own != tokens
    expected = tokenizer.decode(tokens[: tokens.index(0)] if 0 in tokens else tokens)
    code, printed, said = launch(cli.main, "predict", folder, "def first", "--max-new-tokens", 24)
    assert (code, printed.removesuffix("\n")) == (0, one_line(expected)), said
    assert launch(cli.main, "merge", folder, "--out", "merged")[0] == 0
    kept = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    assert settings.items() <= kept.items()


def test_answers_keep_the_blanks_around_them(tiny_llama, launch, tmp_path):
    """A prompt and its answer together are what was learned, such as indented code."""
    base = shutil.copytree(tiny_llama, tmp_path / "base")
    folder = adapter(tmp_path / "adapter", AutoModelForCausalLM.from_pretrained(base), base, Inputs("completion"))
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
    prompts = [f"def f{i}" for i in range(60)]
    expected = {prompt: tokenizer.decode(greedy(model, tokenizer, prompt, 1)) for prompt in prompts}
    assert any(text != text.strip() for text in expected.values())
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    code, _, said = launch(cli.main, "predict", folder, "prompts.txt", "--max-new-tokens", 1, "--out", "out.jsonl")
    assert code == 0, said
    assert [json.loads(line)["answer"] for line in (tmp_path / "out.jsonl").read_text().splitlines()] == [
        *expected.values()
    ]


SIZES = {"vocab_size": 600, "d_model": 16, "decoder_start_token_id": 0, "pad_token_id": 0}
T5 = T5Config(**SIZES, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
# Its positions are absolute. No token is forced to end an answer.
BART = BartConfig(
    **SIZES,
    **{f"{part}_{name}": 2 for part in ("encoder", "decoder") for name in ("layers", "attention_heads")},
    **{f"{part}_ffn_dim": 24 for part in ("encoder", "decoder")},
    init_std=0.3,
    tie_word_embeddings=False,
    forced_eos_token_id=None,
)


@pytest.mark.parametrize("config", [T5, BART], ids=lambda config: config.model_type)
def test_an_encoder_decoder_answers_each_of_a_batch_as_peft_alone(config, tiny_llama, launch, tmp_path):
    cls = AutoModelForSeq2SeqLM
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "base")
    torch.manual_seed(1)
    cls.from_config(config).save_pretrained(tmp_path / "base")
    model = cls.from_pretrained(tmp_path / "base")
    dynrank.save_adapter(updated(dynrank.add_lora(model, rank=2, alpha=8)), tmp_path / "adapter")
    # No file can have so long a name.
    prompts = ["who are you " * 30, "remove a tree", "copy the file"]
    expected = [one_line(written(tmp_path / "adapter", prompt, cls)) for prompt in prompts]
    assert len({*expected}) == 3
    code, printed, said = launch(cli.main, "predict", "adapter", *prompts, "--max-new-tokens", 12)
    assert (code, printed.splitlines()) == (0, expected), said


@pytest.mark.parametrize("decoder", [True, False])
def test_an_end_that_a_tokenizer_puts_behind_texts_is_not_asked_after(decoder, tiny_llama, tmp_path):
    """As ``add_eos_token=True`` of Llama's and Mistral's; an encoder reads it."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    plain = tokenizer(["remove a tree", "copy"])["input_ids"]
    tokenizer.pad_token = tokenizer.eos_token
    end = tokenizer.eos_token_id
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single=f"$A {tokenizer.eos_token}", special_tokens=[(tokenizer.eos_token, end)]
    )
    model = AutoModelForCausalLM.from_pretrained(tiny_llama) if decoder else AutoModelForSeq2SeqLM.from_config(T5)
    model.save_pretrained(tmp_path / "base")
    dynrank.save_adapter(dynrank.add_lora(model, rank=2), tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    prompts = Prompts(dynrank.read_adapter(tmp_path / "adapter"), str(tmp_path / "base"), None)
    rows = [{"prompt": "remove a tree"}, {"prompt": "copy"}]
    asked = [[*ids, *([] if decoder else [end])] for ids in plain]
    assert prompts.tokens(rows)["input_ids"] == asked
    made = prompts.tokens(rows, padding=True, return_tensors="pt")
    assert [ids[mask.bool()].tolist() for ids, mask in zip(*made.values(), strict=True)] == asked
    # Training's prompts and texts have one end, where the answer or the text ends.
    options = {"tokenizer": tokenizer, "max_length": 99, "packed": False}
    learned = make_examples({"prompt": ["copy"], "answer": [" it"]}, form="completion", **options)["input_ids"]
    texts = make_examples({"text": ["copy it"]}, form="text", **options)["input_ids"]
    assert (learned[0].count(end), learned[0][-1]) == (1, end)
    assert learned == texts


@pytest.mark.parametrize(("prompts", "system"), [(["s", "s"], "s"), (["s", "t"], None), ([None, None], None)])
def test_a_system_prompt_is_learned_if_all_chats_begin_with_it(prompts, system, tiny_llama):
    rows = [
        {"messages": [*([{"role": "system", "content": prompt}] if prompt else []),
                      {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
        for prompt in prompts
    ]  # fmt: skip
    task = LanguageModeling(str(tiny_llama), dict.fromkeys(["train", "val", "test"], rows), form="chat")
    assert (task.training_inputs.form, task.training_inputs.system) == ("chat", system)


def test_the_number_of_a_regression_is_no_class(tiny_bert, launch, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=1, ignore_mismatched_sizes=True)
    adapter(tmp_path / "adapter", model, tiny_bert, None, modules_to_save=["classifier"])
    code, printed, said = launch(cli.main, "predict", "adapter", "a fine film")
    assert (code, printed) == (2, "")
    assert "got a BertForSequenceClassification with 1 outputs" in said


def test_unusable_rows_and_outputs_are_refused_before_the_model_is_loaded(classifier, launch, tmp_path, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("dynrank.app.commands.predict.Answerer", never)
    empty = {"id": "", "Subject": "", "Body": " "}
    file = write(tmp_path / "rows.csv", [empty, *ROWS[:3], empty])
    (tmp_path / "taken.csv").write_text("")
    (tmp_path / "tickets").mkdir()
    for options, message in {
        (file,): "rows 2, 6: each has an empty text; correct these 2, or give --skip-unusable",
        (file, "--out", "out.xlsx"): "--out must end in one of ['.csv', '.parquet', '.jsonl']",
        (file, "--out", "taken.csv"): "'taken.csv' exists",
        (file, "--columns", "text=Text"): "no column 'Text'; it has ['Subject', 'Body']; give --columns text=NAME",
        (file, "--columns", "prompt=Body"): "--columns must name one of ['text'] for the form classification",
        ("absent.csv",): "FILE=absent.csv does not exist; set FILE to a file (.csv, .tsv, .jsonl, .ndjson, .json, "
        ".parquet, .txt)\n",
        ("-",): "TEXT must be a text or a file, got '-'; write what a pipe gives into a file",
        ("/dev/null",): "TEXT must be a text or a file, got '/dev/null'; write",
        ("tickets",): "TEXT must be a text or a file, got the folder 'tickets'; name one of its files",
        (file, "taken.csv"): "a file must be the only TEXT",
    }.items():
        code, _, said = launch(cli.main, "predict", classifier, *options)
        assert code == 2
        assert message in said.replace("'id', ", ""), said
    assert (tmp_path / "taken.csv").read_text() == ""
    # The form of rows is not known for adapters of other programs, but the names of columns are.
    shutil.copytree(classifier, tmp_path / "theirs")
    (tmp_path / "theirs" / "inputs.json").unlink()
    code, _, said = launch(cli.main, "predict", "theirs", file, "--columns", "txt=Body")
    assert (code, "--columns txt=… names no column that is read" in said) == (2, True)
    config = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())
    for task, column, message in (
        (None, ["answer=Body"], "--columns must name one of ['text'] for the form text, got ['answer']"),
        ("SEQ_CLS", ["prompt=Body"], "for the form classification, got ['prompt']"),
        ("CAUSAL_LM", ["text=Body", "label=Subject"], "for the form text, got ['label']"),
        ("CAUSAL_LM", ["prompt=Body", "system=Subject"], "for the form completion, got ['system']"),
    ):
        (tmp_path / "theirs" / "adapter_config.json").write_text(json.dumps(config | {"task_type": task}))
        options = [option for name in column for option in ("--columns", name)]
        code, _, said = launch(cli.main, "predict", "theirs", "rows.csv", *options)
        assert (code, message in said) == (2, True), said


def test_a_full_disk_is_one_line(classifier, launch, tmp_path, monkeypatch, request):
    answer = Answerer.labels

    def with_full_disk(self, rows):
        request.getfixturevalue("full_disk")
        return answer(self, rows)

    monkeypatch.setattr(Answerer, "labels", with_full_disk)
    file = write(tmp_path / "rows.csv", ROWS * 5)
    code, _, said = launch(cli.main, "predict", classifier, file, "--out", "answers.jsonl", "--batch-size", 64)
    assert code == 1
    assert re.search("error: a file cannot be written: File too large.*; free space$", said.strip()), said
    assert not (tmp_path / "answers.jsonl").exists()


@pytest.fixture
def asked(classifier, launch, tmp_path, monkeypatch):
    """Gives a file with one row to ``predict`` of an adapter that has learned from these columns.

    Returns the exit code, what was printed, and the rows that the model is asked; the model itself is not loaded.
    """
    rows = []

    class Asked:
        several = False
        longest = float("inf")

        def __init__(self, adapter, base, prompts, **_):
            form = json.loads((tmp_path / "adapter" / "inputs.json").read_text())["form"]
            self.writes = form != "classification"

        def labels(self, batch):
            rows.extend(batch)
            return [[("login", 1.0)] for _ in batch]

        def texts(self, batch):
            rows.extend(batch)
            return ["answer" for _ in batch]

    monkeypatch.setattr("dynrank.app.commands.predict.Answerer", Asked)

    def ask(inputs, row, *options):
        shutil.copytree(classifier, tmp_path / "adapter", dirs_exist_ok=True)
        (tmp_path / "adapter" / "chat_template.jinja").write_text(TEMPLATE)
        write_sidecar_files(tmp_path / "adapter", torch.nn.Linear(1, 1), None, inputs)
        rows.clear()
        cells_are_texts = all(isinstance(cell, str) for cell in row.values())
        file = write(tmp_path / ("rows.csv" if cells_are_texts else "rows.jsonl"), [row])
        code, _, said = launch(cli.main, "predict", tmp_path / "adapter", file, *options)
        return code, said, [{k: row[k] for k in ("text", "prompt", "messages") if k in row} for row in rows]

    return ask


TRAINED = {
    "texts": Inputs("classification", {"text": ["Subject", "Body"], "label": "queue"}),
    "headlines": Inputs("classification", {"text": "headline", "label": "label"}),
    "prompts": Inputs("completion", {"prompt": "prompt", "answer": "answer"}),
    "prompts with inputs": Inputs("completion", {"prompt": "prompt", "input": "context", "answer": "answer"}),
    "chats of prompts": Inputs("chat", {"prompt": "prompt", "answer": "answer"}),
    "chats with a system": Inputs("chat", {"prompt": "prompt", "answer": "answer", "system": "rule"}),
    "one system in all chats": Inputs("chat", {"prompt": "prompt", "answer": "answer", "system": "rule"}, "Be kind."),
}
QUESTION = [{"role": "user", "content": "Q"}]
LEFT_ALONE = [
    ("texts", {"Subject": "S", "Body": "B", "text": "T", "queue": "login"}, [], {"text": "S\nB"}),
    ("texts", {"Title": "S", "Body": "B"}, ["--columns", "text=Title,Body"], {"text": "S\nB"}),
    ("prompts", {"prompt": "Q", "context": "note"}, [], {"prompt": "Q"}),
    ("prompts", {"prompt": "Q", "query": "q", "input": "i"}, [], {"prompt": "Q"}),
    ("prompts", {"prompt": "Q", "note": "i"}, ["--columns", "input=note"], {"prompt": "Q\ni"}),
    ("prompts with inputs", {"prompt": "Q", "input": "no", "context": "i"}, [], {"prompt": "Q\ni"}),
    ("prompts with inputs", {"prompt": "Q"}, ["--columns", "input="], {"prompt": "Q"}),
    ("prompts", {"prompt": "Q", "system": "S"}, ["--chat"], {"messages": QUESTION}),
    ("chats of prompts", {"prompt": "Q", "system_prompt": "S"}, [], {"messages": QUESTION}),
    ("chats of prompts", {"prompt": "Q", "messages": "none"}, [], {"messages": QUESTION}),
    ("prompts", {"prompt": "no", "query": "Q", "input": "i"}, ["--columns", "prompt=query"], {"prompt": "Q"}),
    ("chats of prompts", {"prompt": "no", "query": "Q"}, ["--columns", "prompt=query"], {"messages": QUESTION}),
    ("one system in all chats", {"prompt": "Q"}, [], {"messages": QUESTION}),
    ("chats with a system", {"prompt": "Q"}, ["--system", "S"], {"messages": QUESTION}),
]


@pytest.mark.parametrize(("trained", "row", "options", "expected"), LEFT_ALONE)
def test_the_columns_that_training_read_are_read_and_others_left_alone(trained, row, options, expected, asked):
    code, said, rows = asked(TRAINED[trained], row, *options)
    assert code == 0, said
    assert rows == [expected]


def test_columns_that_another_program_may_have_read_are_named(classifier, launch, tmp_path):
    """As those of pairs, in which a text is asked with its first column alone. Labels are the base's, too."""
    theirs = shutil.copytree(classifier, tmp_path / "theirs")
    (theirs / "inputs.json").unlink()
    (theirs / "labels.json").unlink()
    pairs = write(tmp_path / "pairs.csv", [{"sentence1": "a", "sentence2": "b", "label": 1, "id": 7}])
    code, _, said = launch(cli.main, "predict", theirs, pairs)
    assert (code, "not used         sentence2, label, id\n" in said) == (0, True), said
    assert "labels           LABEL_0, LABEL_1, LABEL_2; one for each text: as the base says" in said
    known = write(tmp_path / "known.csv", [{"Subject": "a", "Body": "b", "sentence2": "c"}])
    code, _, said = launch(cli.main, "predict", classifier, known)
    assert (code, "not used" in said, "as the base says" in said) == (0, False, False), said


MISSING = [
    (
        "texts",
        {"Title": "S", "Body": "B"},
        "no column 'Subject', .* (text <- Subject + Body); it has ['Title', 'Body']",
    ),
    ("headlines", {"content": "C"}, "no column 'headline', .* (text <- headline); it has ['content']"),
    ("prompts with inputs", {"prompt": "Q", "input": "i"}, "no column 'context', .*; give --columns input=NAME"),
    ("prompts with inputs", {"query": "Q"}, "no columns 'prompt' and 'context', .*"),
    ("prompts with inputs", {"prompt": "Q"}, "--columns input= if these rows have none"),
    ("chats with a system", {"prompt": "Q"}, "no column 'rule', .* --columns system= if these rows have none"),
]


@pytest.mark.parametrize(("trained", "row", "message"), MISSING)
def test_a_column_that_training_read_and_a_file_lacks_is_named(trained, row, message, asked):
    code, said, rows = asked(TRAINED[trained], row)
    assert (code, rows) == (2, [])
    pattern = re.escape(message).replace(re.escape(".*"), ".*")
    assert re.search(pattern, " ".join(said.split())), said


SYSTEM = {"role": "system", "content": "Be kind."}
ANSWER = {"role": "assistant", "content": "A"}
MORE = {"context": "no", "input": "no", "query": "no", "system": "no", "title": "no", "history": "no"}
# For each: the form, training rows of Python, the cells of a row of a file, and what is asked of it, whatever else the
# file has. The last is part of the error without the columns.
OF_PYTHON = {
    "texts in tuples": ("classification", [("T", "login"), ("U", "other")], {"text": "T"}, {"text": "T"}, "text"),
    "texts of another name": ("classification", [("T", "login")] * 2, {"body": "T"}, {"text": "T"}, "text"),
    "texts in mappings": (
        "classification",
        [{"body": "T", "label": "login"}, {"body": "U", "label": "other"}],
        {"body": "T", "text": "no"},
        {"text": "T"},
        "'body'",
    ),
    "pairs": ("completion", [("Q", "A")], {"prompt": "Q"}, {"prompt": "Q"}, "prompt"),
    "pairs of another name": ("completion", [["Q", "A"]], {"instruction": "Q"}, {"prompt": "Q"}, "prompt"),
    "pairs beside mappings": (
        "completion",
        [("Q", "A"), {"prompt": "Q", "answer": "A", "facts": "F", "context": "C"}],
        {"prompt": "Q", "context": "C"},
        {"prompt": "Q\nC"},
        "'prompt' and 'context'",
    ),
    "mappings with an input": (
        "completion",
        [{"instruction": "Q", "input": "I", "output": "A"}],
        {"instruction": "Q", "input": "I"},
        {"prompt": "Q\nI"},
        "'instruction' and 'input'",
    ),
    "a data set": (
        "completion",
        Dataset.from_list([{"question": "Q", "answer": "A"}]),
        {"question": "Q"},
        {"prompt": "Q"},
        "'question'",
    ),
    "chats in tuples": ("chat", [([*QUESTION, ANSWER],)], {"messages": QUESTION}, {"messages": QUESTION}, "messages"),
    "chats of a system": (
        "chat",
        [{"messages": [SYSTEM, *QUESTION, ANSWER]}],
        {"messages": QUESTION},
        {"messages": QUESTION},
        "'messages'",
    ),
    "chats of prompts": (
        "chat",
        [{"prompt": "Q", "system": "S", "response": "A"}],
        {"prompt": "Q", "system": "S"},
        {"messages": [{"role": "system", "content": "S"}, *QUESTION]},
        # All chats of training have the same system.
        "'prompt'",
    ),
    "texts to go on": ("text", [("T",), ("U",)], {"text": "T"}, {"text": "T"}, "text"),
}


@pytest.mark.parametrize("name", OF_PYTHON)
def test_rows_of_python_say_what_is_read_of_a_file(name, tiny_bert, tiny_llama, asked):
    form, rows, cells, expected, missing = OF_PYTHON[name]
    data = {split: rows for split in ("train", "val", "test")}
    if form == "classification":
        learned = Classification(str(tiny_bert), data).training_inputs
    else:
        learned = LanguageModeling(str(tiny_llama), data, form=form).training_inputs
    # Columns of training stand in the file, too.
    more = {name: cell for name, cell in MORE.items() if name not in cells}
    for columns in (cells, more | cells, cells | more):
        code, said, found = asked(learned, columns)
        assert code == 0, said
        assert found == [expected]
    code, said, found = asked(learned, {"other": "T", "title": "no"})
    assert (code, found) == (2, [])
    said = " ".join(said.split())
    assert re.search(rf"has no (columns? )?{missing}", said), said


def test_unusable_rows_are_left_out_on_request(classifier, launch, tmp_path):
    file = write(tmp_path / "rows.csv", [{**ROWS[0], "Body": " "}, *ROWS[:3]])
    with file.open("a") as more:
        more.write("one,,\n")
    code, _, said = launch(cli.main, "predict", classifier, file, "--skip-unusable", "--out", "out.jsonl")
    assert code == 0, said
    assert "left out         2 rows" in said
    assert [row["row"] for row in read(tmp_path / "out.jsonl")] == [3, 4, 5]


@pytest.fixture
def short(tiny_llama, tmp_path):
    """An adapter on a random GPT-2 that reads 32 tokens."""
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=600, n_positions=32, n_embd=16, n_layer=2, n_head=2))
    model.save_pretrained(tmp_path / "base")
    model = GPT2LMHeadModel.from_pretrained(tmp_path / "base")
    return adapter(tmp_path / "adapter", model, tmp_path / "base", Inputs("completion", {"prompt": "prompt"}))


def test_prompts_that_leave_no_positions_for_an_answer_are_named_before_the_first_answer(short, launch, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    # The last of 12 new tokens is not read.
    longest = "x"
    while len(tokenizer(longest)["input_ids"]) < 21:
        longest += "x"
    prompts = ["who are you", longest, f"{longest} y", "I", longest * 3]
    file = write(tmp_path / "rows.csv", [{"prompt": prompt} for prompt in prompts])
    options = ["--max-new-tokens", 12, "--batch-size", 4]
    code, printed, said = launch(cli.main, "predict", short, file, *options)
    assert (code, printed) == (2, "")
    message = "rows 4, 6: each has a prompt of more than 21 tokens, the model reads 32, and the answer may need 12"
    assert message in said
    code, _, said = launch(cli.main, "predict", short, file, *options, "--skip-unusable", "--out", "out.jsonl")
    assert code == 0, said
    assert "left out         2 rows whose prompts have more than 21 tokens" in said
    expected = {i + 2: written(short, prompts[i]) for i in (0, 1, 3)}
    assert {row["row"]: row["answer"] for row in read(tmp_path / "out.jsonl")} == expected
    code, _, said = launch(cli.main, "predict", short, "I", "--max-new-tokens", 33)
    assert (code, "--max-new-tokens must be at most 32" in said) == (2, True)


def test_chats_that_the_template_refuses_are_listed_before_the_model_is_loaded(chatty, launch, tmp_path, monkeypatch):
    """As templates do that know no system prompt, or only turns that alternate."""
    folder = shutil.copytree(chatty, tmp_path / "adapter")
    shutil.copytree(chatty.parent / "base", tmp_path / "base")
    (folder / "inputs.json").unlink()
    refusing = (
        "{% for m in messages %}{% if loop.index0 % 2 != (m.role == 'assistant') | int %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}"
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = refusing + TEMPLATE
    tokenizer.save_pretrained(folder)
    user = {"role": "user", "content": "who are you"}
    talks = [[user], [user, user], [user, {"role": "assistant", "content": "x"}, user], [user, user, user]]
    write(tmp_path / "rows.jsonl", [{"messages": talk} for talk in talks])
    message = "rows 2, 4: each is refused by the chat template: roles must alternate; correct these 2, or give --skip-"
    command = ["predict", folder, "rows.jsonl", "--max-new-tokens", 3, "--out", "out.jsonl"]
    # The form of rows is not known for adapters of other programs, so the model says first whether it writes.
    code, _, said = launch(cli.main, *command)
    assert (code, message in said) == (2, True), said
    code, _, said = launch(cli.main, *command, "--skip-unusable")
    assert code == 0, said
    assert "left out         2 rows that the chat template refuses" in said
    assert [row["row"] for row in read(tmp_path / "out.jsonl")] == [1, 3]

    def never(*args, **kwargs):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("dynrank.app.commands.predict.Answerer", never)
    code, _, said = launch(cli.main, *command[:-1], "new.jsonl", "--chat")
    assert (code, message in said) == (2, True), said
    # No row is left.
    code, _, said = launch(cli.main, *command[:-1], "new.jsonl", "--system", "Be brief.", "--skip-unusable")
    assert (code, "rows 1, 2, 3, 4: each is refused by" in said) == (2, True), said
    tokenizer.chat_template = None
    (folder / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(folder)
    code, _, said = launch(cli.main, *command[:-1], "new.jsonl", "--chat")
    assert (code, "need a tokenizer with a chat template" in said) == (2, True), said


def test_a_text_is_cut_where_the_model_ends_if_training_did_not_cut(classifier, tmp_path):
    shutil.copytree(classifier, tmp_path / "adapter")
    (tmp_path / "adapter" / "inputs.json").unlink()
    stored = dynrank.read_adapter(tmp_path / "adapter")
    prompts = Prompts(stored, None, None)
    answerer = Answerer(stored, None, prompts, max_length=None, max_new_tokens=1)
    answerer.tokenizer.model_max_length = 10**30
    again = Answerer(stored, None, prompts, max_length=600, max_new_tokens=1)
    rows = [{"text": "word " * 900}]
    assert answerer.labels(rows) == again.labels(rows)
