"""``dynrank predict``: rows are answered in order as PEFT answers each alone; what cannot be answered is named."""

import json
import re
import shutil
from functools import partial

import pandas as pd
import pytest
import torch
from peft import PeftModel
from tokenizers.processors import TemplateProcessing
from trained import updated
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
    TextClassificationPipeline,
)

import dynrank
from dynrank.adapters.load import start_from
from dynrank.adapters.sidecar_files import Inputs, write_sidecar_files
from dynrank.app.commands import cli
from dynrank.app.commands.predict import _rows
from dynrank.app.console import one_line
from dynrank.app.tasks.data.columns import COLUMNS
from dynrank.app.tasks.language_modeling import LanguageModeling
from dynrank.errors import ConfigurationError

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# As transformers calls labels; sorted as texts they stand in another order.
LABELS = ["LABEL_0", "LABEL_10", "LABEL_2"]
SUBJECTS = ["" if i % 5 == 0 else f"Ticket {i}" for i in range(30)]
BODIES = [f'first line {i * i}\nsecond, "{i}" ' * (i % 4 + 1) for i in range(30)]
ROWS = [{"id": i, "Subject": SUBJECTS[i], "Body": BODIES[i]} for i in range(30)]
TEXTS = ["\n".join(filter(None, (row["Subject"], row["Body"]))) for row in ROWS]


def adapter(folder, model, base, inputs, **options):
    updated(dynrank.add_lora(model, rank=2, alpha=8, **options))
    model.config.name_or_path = str(base)
    dynrank.save_adapter(model, folder)
    write_sidecar_files(folder, model, AutoTokenizer.from_pretrained(base), inputs)
    return folder


def classifier_of(base, **options):
    options = {"num_labels": 3, "ignore_mismatched_sizes": True, **options}
    return AutoModelForSequenceClassification.from_pretrained(base, **options)


@pytest.fixture(scope="module")
def classifier(tiny_bert, tmp_path_factory):
    torch.manual_seed(0)
    model = classifier_of(tiny_bert)
    model.config.id2label = dict(enumerate(LABELS))
    model.classifier.weight.data *= 30
    inputs = Inputs("classification", {"text": ["Subject", "Body"], "label": "queue"}, None, max_length=20)
    folder = tmp_path_factory.mktemp("run") / "adapter"
    return adapter(folder, model, tiny_bert, inputs, modules_to_save=["classifier"])


@pytest.fixture
def writer(tiny_llama, tmp_path):
    """An adapter on a copy of the tiny Llama beside it, in ``base``, that learned ``form``."""

    def make(form, template=None, **generation):
        base = shutil.copytree(tiny_llama, tmp_path / "base")
        tokenizer = AutoTokenizer.from_pretrained(base)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(base)
        if generation:
            GenerationConfig(**generation).save_pretrained(base)
        torch.manual_seed(0)
        inputs = form if isinstance(form, Inputs) else Inputs(form)
        return adapter(tmp_path / "adapter", AutoModelForCausalLM.from_pretrained(base), base, inputs)

    return make


def write(path, rows):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def read(path):
    kinds = {".csv": pd.read_csv, ".jsonl": partial(pd.read_json, lines=True), ".parquet": pd.read_parquet}
    return kinds[path.suffix](path)


def test_rows_of_a_file_are_answered_in_order_as_by_peft_alone(classifier, tiny_bert, launch, tmp_path):
    """Cut as in training; the heading of the file is row 1."""
    pd.DataFrame(ROWS).to_csv(tmp_path / "rows.csv", index=False)
    model = PeftModel.from_pretrained(classifier_of(tiny_bert), classifier).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    options = {"truncation": True, "max_length": 20, "return_tensors": "pt", "return_token_type_ids": False}
    with torch.no_grad():
        best = [model(**tokenizer(text, **options)).logits[0].softmax(-1).max(0) for text in TEXTS]
    expected = [LABELS[index] for _, index in best]
    assert len({*expected}) > 1
    for out in (tmp_path / f"out{kind}" for kind in (".csv", ".jsonl", ".parquet")):
        code, _, said = launch(cli.main, "predict", classifier, "rows.csv", "--out", out, "--batch-size", 4)
        assert code == 0, said
        answers = read(out)
        assert [*answers] == ["row", "label", "probability"]
        assert ([*answers["row"]], [*answers["label"]]) == ([*range(2, 32)], expected)
        assert [*answers["probability"]] == pytest.approx([float(value) for value, _ in best], abs=1e-4)


def never(*_, **__):
    raise AssertionError("the model was loaded")


def test_wrong_files_columns_and_options_are_refused_before_the_model_is_loaded(
    classifier, launch, tmp_path, monkeypatch
):
    monkeypatch.setattr("dynrank.app.commands.predict.on_base", never)
    empty = {"Subject": "", "Body": " "}
    file = write(tmp_path / "rows.jsonl", [empty, *ROWS[:3], empty])
    (tmp_path / "taken.csv").write_text("")
    (tmp_path / "tickets").mkdir()
    (tmp_path / "lines.log").write_text("a\n\nb\n")
    (tmp_path / "broken.json").write_text("[{")
    for options, message in {
        (file,): "rows 1, 5: text must be a text that is not blank, got ''",
        (file, "--out", "out.xlsx"): "--out must be a new file that ends in one of ['.csv', '.jsonl', '.parquet']",
        (file, "--out", "taken.csv"): "--out must be a new file",
        ("a text", "--batch-size", 0): "batch_size must be greater than or equal to 1, got 0 (--batch-size)",
        ("absent.csv",): "FILE=absent.csv does not exist; set FILE to a file (.csv, .tsv, ",
        ("broken.json",): "FILE=broken.json cannot be read",
        ("lines.log",): "FILE=lines.log has rows that cannot be used; correct them:\n  row 2: text must",
        ("tickets",): "TEXT must be texts, or one file, got 'tickets'",
        ("a text", "taken.csv"): "TEXT must be texts, or one file, got 'taken.csv' of 2",
    }.items():
        code, _, said = launch(cli.main, "predict", classifier, *options)
        assert (code, message in said) == (2, True), said
    assert (tmp_path / "taken.csv").read_text() == ""


def test_what_neither_classifies_nor_goes_on_with_a_text_is_refused(tiny_bert, tiny_llama, launch, tmp_path):
    """As a reward model, a regression of several scores, classes that are no alternatives, and an encoder-decoder."""
    numbers = "BertForSequenceClassification whose outputs are not one class"
    for labels, kind in ((1, None), (3, "regression"), (3, "multi_label_classification")):
        model = classifier_of(tiny_bert, num_labels=labels, problem_type=kind)
        folder = adapter(tmp_path / f"of {labels} {kind}", model, tiny_bert, None, modules_to_save=["classifier"])
        code, printed, said = launch(cli.main, "predict", folder, "a text")
        assert (code, printed, f"adapts a {numbers}; dynrank predict asks classifiers" in said) == (2, "", True), said
    base = tmp_path / "base"
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(base)
    model = T5ForConditionalGeneration(T5Config(vocab_size=600, d_model=16, d_kv=8, d_ff=24, num_layers=1))
    model.save_pretrained(base)
    code, printed, said = launch(cli.main, "predict", adapter(tmp_path / "t5", model, base, None), "a text")
    assert (code, printed, "adapts a T5ForConditionalGeneration; dynrank predict" in said) == (2, "", True), said


def test_an_interrupted_command_leaves_no_file(classifier, launch, tmp_path, monkeypatch):
    def stopping(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(TextClassificationPipeline, "forward", stopping)
    assert launch(cli.main, "predict", classifier, "a text", "--out", "out.parquet")[0] == 130
    assert not [*tmp_path.glob("out*")]


def greedy(folder, prompt, count=12):
    """The tokens that PEFT's model writes, one after the other the most probable, and its tokenizer."""
    base = folder.parent / "base"
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    made = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
    start = made.shape[1]
    with torch.no_grad():
        for _ in range(count):
            made = torch.cat([made, model(input_ids=made).logits[:, -1].argmax(-1, keepdim=True)], 1)
    return made[0, start:].tolist(), tokenizer


def until(tokens, tokenizer, ends=(0,)):
    """The text of tokens up to one of the ``ends``."""
    count = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    return tokenizer.decode(tokens[:count], skip_special_tokens=True)


def test_chats_are_answered_with_the_system_prompt_that_was_learned(writer, launch, tmp_path):
    # A turn may end otherwise than a text, as in Gemma's chats.
    ends = [0, *range(1, 600, 16)]
    folder = writer(Inputs("chat", {"messages": "talk"}, "Be kind."), TEMPLATE, eos_token_id=ends)
    asked = [{"role": "user", "content": "who\nare you"}]
    answered = [*asked, {"role": "assistant", "content": "no one"}]
    with_system = [{"role": "system", "content": "Be brief."}, *asked]
    write(tmp_path / "rows.jsonl", [{"talk": talk} for talk in (asked, answered, with_system)])
    prompt = "<|system|>{}<|end|><|user|>who\nare you<|end|><|assistant|>"
    learned, brief = (until(*greedy(folder, prompt.format(text)), ends) for text in ("Be kind.", "Be brief."))
    assert learned != brief
    options = ["--max-new-tokens", 12, "--batch-size", 2]
    code, _, said = launch(cli.main, "predict", folder, "rows.jsonl", *options, "--out", "out.jsonl")
    assert code == 0, said
    assert [*read(tmp_path / "out.jsonl")["answer"]] == [learned, learned, brief]
    # Texts are first turns of a chat.
    code, printed, _ = launch(cli.main, "predict", folder, "who\nare you", *options)
    assert printed == f"{one_line(learned)}\n"


def test_a_chat_ends_where_its_template_ends_a_turn(writer, launch, tmp_path):
    """As ChatML's <|im_end|> in base models whose files name <|endoftext|>: in commands, tests of a run, a merge."""
    folder = writer("chat")
    base = tmp_path / "base"
    prompt = "<|user|>who are you|<|assistant|>"
    tokens, tokenizer = greedy(folder, prompt)
    # One of the tokens that it writes becomes the end of a turn.
    texts = tokenizer.convert_ids_to_tokens(tokens)
    new = [t for i, t in enumerate(texts) if i and t.isalpha() and t not in prompt and t not in texts[:i]]
    place, end = texts.index(new[0]), new[0]
    tokenizer.add_special_tokens({"additional_special_tokens": [end]})
    tokenizer.chat_template = TEMPLATE.replace("<|end|>", f"{{{{ '{end}' if m.role == 'assistant' else '|' }}}}")
    for at in (base, folder):
        tokenizer.save_pretrained(at)
    expected = tokenizer.decode(tokens[:place])
    code, printed, said = launch(cli.main, "predict", folder, "who are you", "--max-new-tokens", 12)
    assert (code, printed) == (0, f"{one_line(expected)}\n"), said
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


def test_each_prompt_of_a_batch_is_answered_greedily_as_alone(writer, launch, tmp_path):
    """Whatever the base says of generation, and by a tokenizer that puts an end behind texts (``add_eos_token``)."""
    folder = writer("completion", num_beams=3, repetition_penalty=4.0)
    prompts = ["who are you " * 9, "remove a tree", "copy the file"]
    # No token ends an answer.
    tokens, tokenizer = zip(*(greedy(folder, prompt) for prompt in prompts), strict=True)
    expected = [one_line(until(own, tokenizer[0], ends=())) for own in tokens]
    assert len({*expected}) == 3
    base = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), folder).eval()
    ids = tokenizer[0](prompts[0], return_tensors="pt")["input_ids"]
    assert base.generate(input_ids=ids, max_new_tokens=12)[0, ids.shape[1] :].tolist() != tokens[0]
    end = tokenizer[0].eos_token
    process = TemplateProcessing(single=f"$A {end}", special_tokens=[(end, tokenizer[0].eos_token_id)])
    tokenizer[0]._tokenizer.post_processor = process
    tokenizer[0].save_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder)("a")["input_ids"][-1] == tokenizer[0].eos_token_id
    code, printed, said = launch(cli.main, "predict", folder, *prompts, "--max-new-tokens", 12, "--batch-size", 2)
    assert (code, printed.splitlines()) == (0, expected), said


def test_a_system_prompt_is_learned_if_all_chats_begin_with_it(tiny_llama):
    for prompts, system in ((["s", "s"], "s"), (["s", "t"], None)):
        answered = [*CHAT, {"role": "assistant", "content": "a"}]
        rows = [{"messages": [{"role": "system", "content": prompt}, *answered]} for prompt in prompts]
        task = LanguageModeling(str(tiny_llama), dict.fromkeys(["train", "val", "test"], rows), form="chat")
        assert task.training_inputs.system == system


CHAT = [{"role": "user", "content": "M"}]
UNKNOWN = {"text": "T", "prompt": "Q", "messages": CHAT, "system": "S", "input": "I"}
TRAINED = Inputs("classification", {"text": ["Subject", "Body"], "label": "queue"})
# (the form, what training read, a row, what the model is asked, or what is wrong)
READ = [
    ("classification", TRAINED, {"Subject": "S", "Body": "B", "text": "T", "queue": "login"}, "S\nB"),
    ("classification", TRAINED, {"text": "T"}, "no column 'Subject'; it has ['text']; rename one"),
    # As version 0.4 wrote it.
    ("completion", Inputs("completion", {"prompt": "prompt", "input": "context"}), UNKNOWN, "got ['input']; join"),
    ("chat", Inputs("chat", {"messages": "talk"}), {"talk": CHAT, "messages": "x"}, CHAT),
    ("classification", Inputs(), UNKNOWN, "T"),
    ("completion", Inputs(), UNKNOWN, "Q"),
    ("text", Inputs("text", {"text": "text"}), UNKNOWN, "T"),
]


@pytest.mark.parametrize(("form", "learned", "row", "expected"), READ)
def test_the_columns_that_training_read_are_read_or_missed_and_others_left_alone(
    form, learned, row, expected, tmp_path
):
    texts = [str(write(tmp_path / "rows.jsonl", [row]))]
    if ";" in expected:
        with pytest.raises(ConfigurationError, match=re.escape(expected)):
            _rows(texts, form, learned)
    else:
        assert _rows(texts, form, learned)[COLUMNS[form][0]][:] == [expected]


def test_prompts_that_leave_no_positions_for_an_answer_are_refused_before_an_answer(tiny_llama, launch, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.save_pretrained(tmp_path / "base")
    GPT2LMHeadModel(GPT2Config(vocab_size=600, n_positions=32, n_embd=16, n_layer=2, n_head=2)).save_pretrained("base")
    model = GPT2LMHeadModel.from_pretrained("base")
    adapter(tmp_path / "adapter", model, "base", Inputs("completion", {"prompt": "prompt"}))
    # The last of 12 new tokens is not read.
    for count, refused in ((21, False), (22, True)):
        prompt = tokenizer.decode([5] * count)
        assert len(tokenizer(prompt)["input_ids"]) == count
        write(tmp_path / "rows.jsonl", [{"prompt": "who are you"}, {"prompt": prompt}])
        code, printed, said = launch(cli.main, "predict", "adapter", "rows.jsonl", "--max-new-tokens", 12)
        assert (code, bool(printed)) == (2 * refused, not refused), said
        assert ("22 tokens, and --max-new-tokens=12 must fit into the 32 positions" in said) == refused


def test_a_chat_that_the_template_refuses_is_named_before_the_model_is_loaded(writer, launch, tmp_path, monkeypatch):
    """As templates do that know no system prompt, or only turns that alternate."""
    refusing = "{% if messages | length > 1 %}{{ raise_exception('roles must alternate') }}{% endif %}"
    folder = writer("chat", refusing + TEMPLATE)
    user = {"role": "user", "content": "who are you"}
    write(tmp_path / "rows.jsonl", [{"messages": talk} for talk in ([user], [user, user])])
    monkeypatch.setattr("dynrank.app.commands.predict.on_base", never)
    code, _, said = launch(cli.main, "predict", folder, "rows.jsonl")
    assert (code, "the chat template refuses [{" in said, "roles must alternate" in said) == (2, True, True), said
    (folder / "chat_template.jinja").unlink()
    code, _, said = launch(cli.main, "predict", folder, "rows.jsonl")
    assert (code, "chat_template is not set" in said) == (2, True), said
