"""``dynrank predict``: rows are answered in order as PEFT answers each alone; what cannot be answered is named."""

import json
import shutil

import pandas as pd
import pytest
import torch
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
    TextClassificationPipeline,
)

import dynrank
from dynrank.adapters.base import base_of
from dynrank.adapters.load import start_from
from dynrank.adapters.sidecar_files import Inputs, write_sidecar_files
from dynrank.app.commands import cli
from dynrank.app.console import one_line
from dynrank.app.models.predicting import answering
from dynrank.app.tasks.language_modeling import LanguageModeling

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# As transformers calls labels; sorted as texts they stand in another order.
LABELS = ["LABEL_0", "LABEL_10", "LABEL_2"]
SUBJECTS = ["" if i % 5 == 0 else f"Ticket {i}" for i in range(30)]
BODIES = [f'first line {i * i}\nsecond, "{i}" ' * (i % 4 + 1) for i in range(30)]
ROWS = [{"id": f"00{i}", "Subject": SUBJECTS[i], "Body": BODIES[i], "score": 1.5e-12 * i} for i in range(30)]
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


@pytest.fixture(scope="module")
def by_peft(classifier, tiny_bert):
    """The label and probability of each text by PEFT, alone, cut as in training."""
    model = PeftModel.from_pretrained(classifier_of(tiny_bert), classifier).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    found = []
    for text in TEXTS:
        inputs = tokenizer(text, truncation=True, max_length=20, return_tensors="pt", return_token_type_ids=False)
        with torch.no_grad():
            value, index = model(**inputs).logits[0].softmax(-1).max(0)
        found.append((LABELS[index], float(value)))
    return found


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
    table = pd.DataFrame(rows)
    if path.suffix == ".parquet":
        table.to_parquet(path)
    elif path.suffix == ".csv":
        table.to_csv(path, index=False)
    else:
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def read(path):
    if path.suffix == ".parquet":
        return pd.read_parquet(path).to_dict("records")
    if path.suffix == ".csv":
        return pd.read_csv(path, dtype={"id": str}).to_dict("records")
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(("kind", "out"), [("csv", "csv"), ("jsonl", "parquet"), ("parquet", "jsonl")])
def test_rows_of_a_file_are_answered_in_order_as_by_peft_alone(kind, out, classifier, by_peft, launch, tmp_path):
    """With an unusable row in between."""
    file = write(tmp_path / f"rows.{kind}", [*ROWS[:7], {**ROWS[0], "Subject": "", "Body": " "}, *ROWS[7:]])
    options = ["--batch-size", 4, "--skip-unusable"]
    code, _, said = launch(cli.main, "predict", classifier, file, "--out", f"out.{out}", *options)
    assert code == 0, said
    assert "left out         1 rows" in said
    answers = read(tmp_path / f"out.{out}")
    assert [*answers[0]] == ["row", "label", "probability"]
    # The heading of a csv file is row 1.
    first = 2 if kind == "csv" else 1
    assert [row["row"] - first for row in answers] == [i for i in range(31) if i != 7]
    assert [row["label"] for row in answers] == [label for label, _ in by_peft]
    assert len({row["label"] for row in answers}) > 1
    assert [row["probability"] for row in answers] == pytest.approx([value for _, value in by_peft], abs=1e-4)
    assert {file.name for file in tmp_path.iterdir()} == {f"rows.{kind}", f"out.{out}"}


def never(*_, **__):
    raise AssertionError("the model was loaded")


def test_wrong_files_columns_and_options_are_refused_before_the_model_is_loaded(
    classifier, tiny_bert, launch, tmp_path, monkeypatch
):
    monkeypatch.setattr("dynrank.app.commands.predict.answering", never)
    empty = {"id": "", "Subject": "", "Body": " ", "label": "x"}
    file = write(tmp_path / "rows.csv", [empty, *({**row, "label": "x"} for row in ROWS[:3]), empty])
    (tmp_path / "taken.csv").write_text("")
    (tmp_path / "tickets").mkdir()
    (tmp_path / "lines.log").write_text("a\n\nb\n")
    (tmp_path / "broken.json").write_text("[{")
    for options, message in {
        (file,): "rows 2, 6: text must be a text that is not blank, got ''",
        (file, "--out", "out.xlsx"): "--out must be a new file that ends in one of ['.csv', '.parquet', '.jsonl']",
        (file, "--out", "taken.csv"): "--out must be a new file",
        (file, "--columns", "text=Text"): "no column 'Text'; it has [",
        (file, "--columns", "prompt=Body"): "--columns NAME must name one of ['text'] for the form classification",
        ("a text", "--columns", "text=Body"): "--columns must go with a file of columns",
        (file, "--chat"): "cannot answer rows of the form chat",
        ("absent.csv",): "FILE=absent.csv does not exist; set FILE to a file (.csv, .tsv, ",
        ("broken.json",): "FILE=broken.json cannot be read",
        ("lines.log",): "row 2: has an empty text",
        ("-",): "TEXT must be a text or a file, got '-'",
        ("/dev/null",): "TEXT must be a text or a file, got '/dev/null'; name one file of a folder, or write what",
        ("tickets",): "TEXT must be a text or a file, got 'tickets'; name one file of a folder",
        (file, "taken.csv"): "a file must be the only TEXT",
    }.items():
        code, _, said = launch(cli.main, "predict", classifier, *options)
        assert (code, message in said) == (2, True), said
    assert (tmp_path / "taken.csv").read_text() == ""
    assert not (tmp_path / "out.csv").exists()
    for folder in ("tickets", tiny_bert):
        code, _, said = launch(cli.main, "predict", folder, "a text")
        assert (code, "adapter" in said) == (2, True), said


@pytest.mark.parametrize(("labels", "kind"), [(1, None), (3, "regression")])
def test_a_model_whose_outputs_are_numbers_does_not_classify(labels, kind, tiny_bert, launch, tmp_path):
    """As a reward model, and a regression of several scores."""
    model = classifier_of(tiny_bert, num_labels=labels, problem_type=kind)
    adapter(tmp_path / "adapter", model, tiny_bert, None, modules_to_save=["classifier"])
    code, printed, said = launch(cli.main, "predict", "adapter", "a text")
    assert (code, printed) == (2, "")
    assert f"got a BertForSequenceClassification with {labels} outputs of numbers" in said


@pytest.mark.parametrize("command", ["predict", "merge"])
def test_a_base_with_other_weights_is_refused(command, classifier, tiny_bert, launch, tmp_path):
    """Of the same shapes, as an instruct model beside its base; rounded to float16 it is the same."""
    shutil.copytree(classifier, tmp_path / "adapter")
    adapted = dynrank.load_adapter(classifier_of(tiny_bert), classifier)
    write_sidecar_files(tmp_path / "adapter", adapted, None, None, base_of(adapted))
    other = classifier_of(tiny_bert)
    for place, change in (("half", 1.0), ("other", 1.1)):
        AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(tmp_path / place)
        other.bert.encoder.layer[1].output.dense.weight.data *= change
        (other.half() if place == "half" else other.float()).save_pretrained(tmp_path / place)
    for base in (tiny_bert, "half", "other"):
        last = ["a text"] if command == "predict" else ["--out", f"merged {base}".replace("/", "")]
        code, _, said = launch(cli.main, command, "adapter", "--model", base, *last)
        refused = base == "other"
        assert (code, "trained on another base" in said) == (2 if refused else 0, refused), said
    (tmp_path / "adapter" / "base.json").unlink()
    assert launch(cli.main, command, "adapter", "--model", "other", *last)[0] == 0


def test_an_interrupted_command_leaves_no_file_and_begins_anew(classifier, launch, tmp_path, monkeypatch):
    write(tmp_path / "rows.csv", ROWS)
    command = ["predict", classifier, "rows.csv", "--batch-size", 4, "--out"]
    assert launch(cli.main, *command, "whole.parquet")[0] == 0
    asked = []
    forward = TextClassificationPipeline.forward

    def stopping(self, inputs, **options):
        asked.append(len(inputs["input_ids"]))
        if sum(asked) == 16:
            raise KeyboardInterrupt
        return forward(self, inputs, **options)

    monkeypatch.setattr(TextClassificationPipeline, "forward", stopping)
    code, _, said = launch(cli.main, *command, "out.parquet")
    assert (code, "30 rows; if this is interrupted, it begins anew" in said) == (130, True), said
    assert not [*tmp_path.glob("out*")]
    asked.clear()
    monkeypatch.setattr(TextClassificationPipeline, "forward", forward)
    assert launch(cli.main, *command, "out.parquet")[0] == 0
    assert (tmp_path / "out.parquet").read_bytes() == (tmp_path / "whole.parquet").read_bytes()


def greedy(folder, prompt, count=12, cls=AutoModelForCausalLM):
    """The tokens that PEFT's model writes, one after the other the most probable, and its tokenizer."""
    base = folder.parent / "base"
    model = PeftModel.from_pretrained(cls.from_pretrained(base), folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
    is_read = model.config.is_encoder_decoder
    made = torch.tensor([[model.config.decoder_start_token_id]]) if is_read else ids
    start = made.shape[1]
    with torch.no_grad():
        for _ in range(count):
            inputs = {"input_ids": ids, "decoder_input_ids": made} if is_read else {"input_ids": made}
            made = torch.cat([made, model(**inputs).logits[:, -1].argmax(-1, keepdim=True)], 1)
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
    texts = [prompt.format(text) for text in ("Be kind.", "Be brief.", "Be rude.")]
    learned, brief, given = (until(*greedy(folder, text), ends) for text in texts)
    assert len({learned, brief, given}) == 3
    options = ["--max-new-tokens", 12, "--batch-size", 2]
    for extra, expected in (((), learned), (("--system", "Be rude."), given)):
        out = tmp_path / f"{len(extra)}.jsonl"
        code, _, said = launch(cli.main, "predict", folder, "rows.jsonl", *options, *extra, "--out", out)
        assert code == 0, said
        assert [row["answer"] for row in read(out)] == [expected, expected, brief]
    # Texts are first turns of a chat, without --chat.
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
    command = ["predict", folder, "who are you", "--max-new-tokens", 12]
    by_run = launch(cli.main, *command)
    # Adapters of other programs say nothing of their training.
    (folder / "inputs.json").rename(tmp_path / "inputs.json")
    by_user = launch(cli.main, *command, "--chat")
    (tmp_path / "inputs.json").rename(folder / "inputs.json")
    for code, printed, said in (by_run, by_user):
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


@pytest.mark.parametrize("settings", [{"repetition_penalty": 4.0}, {"no_repeat_ngram_size": 1}, {"num_beams": 3}])
def test_answers_are_greedy_whatever_the_base_says_of_generation(settings, writer, launch, tmp_path):
    folder = writer("completion", eos_token_id=0, **settings)
    tokens, tokenizer = greedy(folder, "def first", count=24)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    ids = tokenizer("def first", return_tensors="pt")
    own = PeftModel.from_pretrained(base, folder).eval().generate(**ids, max_new_tokens=24, do_sample=False)
    assert own[0, ids["input_ids"].shape[1] :].tolist() != tokens
    code, printed, said = launch(cli.main, "predict", folder, "def first", "--max-new-tokens", 24)
    assert (code, printed) == (0, f"{one_line(until(tokens, tokenizer))}\n"), said
    assert launch(cli.main, "merge", folder, "--out", "merged")[0] == 0
    kept = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    assert settings.items() <= kept.items()


@pytest.mark.parametrize("strips", [False, True])
def test_answers_keep_the_blanks_around_them(strips, writer, launch, tmp_path):
    """A prompt and its answer together are what was learned, such as indented code. Llama 2's decoder strips texts."""
    folder = writer("completion")
    base = tmp_path / "base"
    tokenizer = AutoTokenizer.from_pretrained(base)
    (blank,) = tokenizer(" return", add_special_tokens=False)["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(base)
    # Its answer to any prompt: no other token has a value.
    model.lm_head.weight.data.zero_()
    inputs = tokenizer("def f", return_tensors="pt")
    adapted = dynrank.load_adapter(model, folder).eval()
    with torch.no_grad():
        model.lm_head.weight[blank] = adapted.model(**inputs).last_hidden_state[0, -1]
    plain = dynrank.merge(adapted)
    plain.save_pretrained(base)
    shutil.rmtree(folder)
    plain.config.name_or_path = str(base)
    dynrank.save_adapter(dynrank.add_lora(plain, rank=2), folder)
    if strips:
        made = json.loads((base / "tokenizer.json").read_text())
        strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
        made["decoder"] = {"type": "Sequence", "decoders": [made["decoder"], {"type": "Fuse"}, strip]}
        (base / "tokenizer.json").write_text(json.dumps(made))
        assert AutoTokenizer.from_pretrained(base).decode([blank]) == "return"
    code, printed, said = launch(cli.main, "predict", folder, "def f", "--max-new-tokens", 1)
    assert (code, printed) == (0, " return\n"), said


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
    ends = [model.generation_config.eos_token_id, 0]
    # No file can have so long a name.
    prompts = ["who are you " * 30, "remove a tree", "copy the file"]
    expected = [one_line(until(*greedy(tmp_path / "adapter", prompt, 12, cls), ends)) for prompt in prompts]
    assert len({*expected}) == 3
    code, printed, said = launch(cli.main, "predict", "adapter", *prompts, "--max-new-tokens", 12)
    assert (code, printed.splitlines()) == (0, expected), said
    assert said == ""


@pytest.mark.parametrize("decoder", [True, False])
def test_an_end_that_a_tokenizer_puts_behind_texts_is_not_asked_after(decoder, tiny_llama, tmp_path):
    """As ``add_eos_token=True`` of Llama's and Mistral's; an encoder reads it."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    plain = tokenizer("remove a tree")["input_ids"]
    tokenizer.pad_token = tokenizer.eos_token
    end = tokenizer.eos_token_id
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single=f"$A {tokenizer.eos_token}", special_tokens=[(tokenizer.eos_token, end)]
    )
    model = AutoModelForCausalLM.from_pretrained(tiny_llama) if decoder else AutoModelForSeq2SeqLM.from_config(T5)
    model.save_pretrained(tmp_path / "base")
    dynrank.save_adapter(dynrank.add_lora(model, rank=2), tmp_path / "adapter")
    stored = dynrank.read_adapter(tmp_path / "adapter")
    sizes = {"max_length": None, "max_new_tokens": 3, "turn": None}
    pipe = answering(stored, str(tmp_path / "base"), tokenizer, **sizes)
    made = pipe.preprocess("remove a tree")
    assert made["input_ids"].tolist() == [[*plain, *([] if decoder else [end])]]
    assert made["attention_mask"].all()


@pytest.mark.parametrize(("prompts", "system"), [(["s", "s"], "s"), (["s", "t"], None), ([None, None], None)])
def test_a_system_prompt_is_learned_if_all_chats_begin_with_it(prompts, system, tiny_llama):
    rows = [
        {"messages": [*([{"role": "system", "content": prompt}] if prompt else []),
                      {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
        for prompt in prompts
    ]  # fmt: skip
    task = LanguageModeling(str(tiny_llama), dict.fromkeys(["train", "val", "test"], rows), form="chat")
    assert (task.training_inputs.form, task.training_inputs.system) == ("chat", system)


@pytest.fixture
def asked(classifier, writer, launch, tmp_path, monkeypatch):
    """Gives a file with one row to ``predict`` of an adapter that has learned from these columns.

    Returns the exit code, what was said, and the texts that the model is asked; the model itself is not loaded.
    """
    writes = writer("completion", TEMPLATE)
    texts = []

    def ask(inputs, row, *options):
        def fake(*_, **__):
            def pipe(asked, batch_size):
                for text in asked:
                    texts.append(text)
                    yield [{"label": "login", "score": 1.0}] if inputs.form == "classification" else "answer"

            return pipe

        monkeypatch.setattr("dynrank.app.commands.predict.answering", fake)
        folder = classifier if inputs.form == "classification" else writes
        folder = shutil.copytree(folder, tmp_path / "copy", dirs_exist_ok=True)
        write_sidecar_files(folder, torch.nn.Linear(1, 1), None, inputs)
        texts.clear()
        code, _, said = launch(cli.main, "predict", folder, write(tmp_path / "rows.csv", [row]), *options)
        return code, " ".join(said.split()), texts

    return ask


TRAINED = {
    "texts": Inputs("classification", {"text": ["Subject", "Body"], "label": "queue"}),
    "prompts": Inputs("completion", {"prompt": "prompt", "answer": "answer"}),
    "prompts with inputs": Inputs("completion", {"prompt": "prompt", "input": "context", "answer": "answer"}),
}
LEFT_ALONE = [
    ("texts", {"Subject": "S", "Body": "B", "text": "T", "queue": "login"}, [], "S\nB"),
    ("texts", {"Title": "S", "Body": "B"}, ["--columns", "text=Title,Body"], "S\nB"),
    ("texts", {"text": "T"}, [], "no column 'Subject'; it has ['text']; set --columns text=NAME"),
    ("prompts", {"prompt": "Q", "context": "note", "query": "q", "input": "i"}, [], "Q"),
    # As version 0.4 wrote it.
    (
        "prompts with inputs",
        {"prompt": "Q", "context": "i"},
        [],
        "read a column as 'input', which this version does no",
    ),
    ("prompts with inputs", {"prompt": "Q", "context": "i"}, ["--columns", "prompt=prompt,context"], "Q\ni"),
]


@pytest.mark.parametrize(("trained", "row", "options", "expected"), LEFT_ALONE)
def test_the_columns_that_training_read_are_read_or_missed_and_others_left_alone(
    trained, row, options, expected, asked
):
    code, said, texts = asked(TRAINED[trained], row, *options)
    refused = expected.startswith(("no column", "read a"))
    assert (code, texts) == ((2, []) if refused else (0, [expected])), said
    assert not refused or expected in said


def test_labels_of_another_programs_adapter_are_the_bases(classifier, launch, tmp_path):
    theirs = shutil.copytree(classifier, tmp_path / "theirs")
    (theirs / "inputs.json").unlink()
    (theirs / "labels.json").unlink()
    code, _, said = launch(cli.main, "predict", theirs, write(tmp_path / "rows.csv", [{"text": "a"}]))
    assert (code, "labels           LABEL_0, LABEL_1, LABEL_2: as the base says" in said) == (0, True), said


def test_prompts_that_leave_no_positions_for_an_answer_are_refused_before_an_answer(tiny_llama, launch, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.save_pretrained(tmp_path / "base")
    GPT2LMHeadModel(GPT2Config(vocab_size=600, n_positions=32, n_embd=16, n_layer=2, n_head=2)).save_pretrained("base")
    model = GPT2LMHeadModel.from_pretrained("base")
    adapter(tmp_path / "adapter", model, "base", Inputs("completion", {"prompt": "prompt"}))
    # The last of 12 new tokens is not read.
    longest = "x"
    while len(tokenizer(longest)["input_ids"]) < 21:
        longest += "x"
    for last, refused in ((longest, False), (f"{longest} y", True)):
        write(tmp_path / "rows.csv", [{"prompt": prompt} for prompt in ("who are you", last)])
        out = tmp_path / f"{refused}.jsonl"
        command = ["predict", "adapter", "rows.csv", "--max-new-tokens", 12, "--batch-size", 1, "--out", out]
        code, printed, said = launch(cli.main, *command)
        assert (code, printed, out.exists()) == (2 * refused, "", not refused), said
        assert ("so it may have 21 tokens, got 2" in said) == refused
    assert "0/2" in said
    code, _, said = launch(cli.main, "predict", "adapter", "I", "--max-new-tokens", 33)
    assert (code, "--max-new-tokens must be at most 32" in said) == (2, True)


def test_chats_that_the_template_refuses_are_listed_before_the_model_is_loaded(writer, launch, tmp_path, monkeypatch):
    """As templates do that know no system prompt, or only turns that alternate."""
    refusing = (
        "{% for m in messages %}{% if loop.index0 % 2 != (m.role == 'assistant') | int %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}"
    )
    folder = writer("chat", refusing + TEMPLATE)
    user = {"role": "user", "content": "who are you"}
    talks = [[user], [user, user], [user, {"role": "assistant", "content": "x"}, user], [user, user, user]]
    write(tmp_path / "rows.jsonl", [{"messages": talk} for talk in talks])
    command = ["predict", folder, "rows.jsonl", "--max-new-tokens", 3, "--out", "out.jsonl"]
    code, _, said = launch(cli.main, *command, "--skip-unusable")
    assert code == 0, said
    assert "left out         2 rows that the chat template refuses" in said
    assert [row["row"] for row in read(tmp_path / "out.jsonl")] == [1, 3]
    monkeypatch.setattr("dynrank.app.commands.predict.answering", never)
    message = "rows 2, 4: is refused by the chat template: roles must alternate"
    code, _, said = launch(cli.main, *command[:-1], "new.jsonl")
    assert (code, message in said) == (2, True), said
    # No row is left.
    code, _, said = launch(cli.main, *command[:-1], "new.jsonl", "--system", "Be brief.", "--skip-unusable")
    assert (code, "rows 1, 2, 3, 4: is refused by" in said) == (2, True), said
    (folder / "chat_template.jinja").unlink()
    code, _, said = launch(cli.main, *command[:-1], "new.jsonl", "--chat")
    assert (code, "need a tokenizer with a chat template" in said) == (2, True), said


def test_a_text_is_cut_where_the_model_ends_if_training_did_not_cut(classifier):
    stored = dynrank.read_adapter(classifier)
    tokenizer = AutoTokenizer.from_pretrained(classifier, model_max_length=10**30)
    pipes = [answering(stored, None, tokenizer, max_length=m, max_new_tokens=1, turn=None) for m in (None, 600, 512)]
    found = [pipe("word " * 900) for pipe in pipes]
    assert found[0] == found[1] == found[2]
