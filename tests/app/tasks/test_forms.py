"""Completions, chats and texts: what is learned of them."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers as hf
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import dynrank
from dynrank.app.models.pretrained import load_tokenizer
from dynrank.app.runs import job
from dynrank.app.tasks.data.rows import fingerprint
from dynrank.app.tasks.examples import make_examples
from dynrank.app.tasks.language_modeling import LanguageModeling
from dynrank.errors import ConfigurationError

PLAIN = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|{{ m.role }}|>\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|end|>\n"
    "{% endgeneration %}{% else %}{{ m.content }}<|end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def turns(*contents, system=None):
    roles = ["user", "assistant"] * len(contents)
    first = [{"role": "system", "content": system}] if system else []
    return [*first, *({"role": r, "content": c} for r, c in zip(roles, contents, strict=False))]


# As Qwen 3's: thoughts before the last answer, which the prompt for an answer does not have.
THINKING = PLAIN.replace(
    "{{ m.content }}", "{{ '<think></think>\n' if m.role == 'assistant' and loop.last else '' }}{{ m.content }}"
)


@pytest.mark.parametrize(("template", "before"), [(THINKING, "<think></think>\n"), (PLAIN, "")])
def test_a_written_answer_is_compared_with_all_that_is_learned_of_the_turn(template, before, speaking):
    tokenizer = speaking(template)
    rows = {"messages": [turns("q", "  return")]}
    made = make_examples(rows, tokenizer=tokenizer, max_length=100, form="chat", packed=False)
    assert made["answer"] == [f"{before}  return\n"]
    assert tokenizer.decode(made["input_ids"][0][made["prompt_length"][0] :]) == f"{before}  return<|end|>\n"


@pytest.fixture(scope="module")
def metaspace():
    """A tokenizer as Llama 2's: a blank before the first word of a text, which decoding takes away again."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    sequence = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(sequence)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(["return x if y else z f(x) y = x"] * 9, trainer)
    return hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


# Chat templates of ten families, as TRL has them beside their marked ones.
FAMILIES = ["cohere", "deepseekv3", "gemma", "glm4moe", "gptoss", "lfm2", "llama3", "phi3", "qwen2_5", "qwen3"]
TALKS = [
    turns("def f(x):", "return x", "and é, 漢?", "  return 1"),
    turns("import os", "os.path", "more", "less", "words <|end|> in it", "y"),
]


@pytest.fixture
def by_trl(tiny_llama, tmp_path):
    """What SFTTrainer makes of rows: their tokens, and the tokens that are learned, with None for others."""
    trl = pytest.importorskip("trl", reason="pip install trl")

    def prepared(tokenizer, rows, **options):
        model = hf.AutoModelForCausalLM.from_pretrained(tiny_llama)
        options = {"max_length": None, "report_to": "none", "use_cpu": True, "bf16": False, **options}
        made = trl.SFTTrainer(
            model,
            trl.SFTConfig(str(tmp_path / "trl"), **options),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        ).train_dataset
        return made["input_ids"][:], [[None if label == -100 else label for label in own] for own in made["labels"]]

    return prepared


def learned_of(rows, tokenizer, form):
    """Our tokens, and those that are learned, with None for others."""
    made = make_examples(rows, tokenizer=tokenizer, max_length=10_000, form=form, packed=False)
    pairs = zip(made["input_ids"], made["learned"], strict=True)
    return made["input_ids"], [[i if own else None for i, own in zip(*pair, strict=True)] for pair in pairs]


@pytest.fixture
def speaking(tiny_llama):
    """Makes the tiny Llama's tokenizer with a chat template, or that of a family."""

    def make(template):
        tokenizer = load_tokenizer(str(tiny_llama))
        tokenizer.bos_token = tokenizer.eos_token
        tokenizer.chat_template = template
        if template in FAMILIES:
            trl = pytest.importorskip("trl", reason="pip install trl")
            file = Path(trl.__file__).parent / "chat_templates" / f"{template}.jinja"
            tokenizer.chat_template = file.read_text(encoding="utf-8")
        return tokenizer

    return make


@pytest.mark.parametrize("template", [*FAMILIES, MARKED])
def test_chats_are_learned_as_sft_trainer_learns_them(template, speaking, by_trl):
    tokenizer = speaking(template)
    ours = learned_of({"messages": TALKS}, tokenizer, "chat")
    assert ours == by_trl(tokenizer, [{"messages": talk} for talk in TALKS], assistant_only_loss=True)
    assert all(None in own and {*own} != {None} for own in ours[1])


@pytest.mark.parametrize("template", [*FAMILIES, PLAIN])
def test_a_chat_whose_only_answer_is_last_needs_no_marks_and_is_learned_as_sft_trainer_learns_completions(
    template, speaking, by_trl
):
    tokenizer = speaking(template)
    talks = [turns("def f(x):", "return x"), turns("import os", "os.path and é, 漢?")]
    ours = learned_of({"messages": talks}, tokenizer, "chat")
    assert ours == by_trl(tokenizer, [{"prompt": talk[:-1], "completion": talk[-1:]} for talk in talks])


@pytest.mark.parametrize("answer", ["x)", " if x else y", "\n    return x", "y", "y<|end|>"])
def test_completions_are_learned_as_sft_trainer_learns_them(answer, metaspace, tiny_llama, by_trl):
    for tokenizer in (metaspace, load_tokenizer(str(tiny_llama))):
        rows = {"prompt": ["y = f(", "y = "], "answer": [answer, answer]}
        expected = [{"prompt": prompt, "completion": answer} for prompt in rows["prompt"]]
        assert learned_of(rows, tokenizer, "completion") == by_trl(tokenizer, expected)


# Each has a template, a chat, and what is said of them.
REFUSED = {
    "unknown": (PLAIN, turns("q", "a", "q", "a"), r"not training-compatible.*set task\.model to one whose"),
    "drops": ("{{ messages[0].content }}", turns("question", "answer"), r"drop whole turns; set task\.model"),
    "refuses": ("{{ raise_exception('never') }}", turns("q", "a"), "refuses .*never.*set data"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_template_that_cannot_be_learned_is_named(case, speaking):
    template, chat, said = REFUSED[case]
    with pytest.raises(ConfigurationError, match=said):
        learned_of({"messages": [chat]}, speaking(template), "chat")


@pytest.mark.parametrize(("form", "said"), [("chat", "no chat template"), ("completion", "no eos_token")])
def test_a_tokenizer_that_a_form_cannot_use_is_named(form, said, tmp_path):
    hf.ByT5Tokenizer().save_pretrained(tmp_path)
    rows = dict.fromkeys(["train", "val", "test"], [{"prompt": "x", "answer": "y", "messages": turns("x", "y")}])
    task = LanguageModeling("minilm" if form == "completion" else str(tmp_path), rows, form=form)
    with pytest.raises(ConfigurationError, match=rf"task\.model=.* {said}.*; set task\.model"):
        task.setup("fit") if form == "completion" else task.module({}, {})


WORDS = ["class", "import", "return x", "def", "with open", "lambda"]
ROWS = {
    "chat": [{"messages": turns(f"item {i}" * (1 + i % 3 * 9), WORDS[i % 3], "more", WORDS[i % 6])} for i in range(90)],
    "text": [{"text": f"def item{i}():\n    return {i}\n" * (1 + i % 5)} for i in range(90)],
}
LENGTH = 100


@pytest.fixture
def task_of(tiny_llama, speaking, tmp_path):
    base = shutil.copytree(tiny_llama, tmp_path / "llama")
    speaking(MARKED).save_pretrained(base)

    def make(form, *overrides):
        file = tmp_path / f"{form}.jsonl"
        if not file.exists():
            file.write_text("\n".join(map(json.dumps, ROWS[form])))
        task = [f"task={form}", f"task.model={base}"]
        options = [f"data.train={file}", f"task.max_length={LENGTH}", "task.batch_size=4", "plots=false"]
        made = job.make(dynrank.compose([*task, *options, *overrides]).task, "task")
        made.setup("fit")
        return made

    return make


def test_examples_are_made_once_and_then_read_from_the_disk(task_of, monkeypatch):
    first = task_of("chat").examples
    assert all(part.cache_files for part in first.values())

    def fail(*_, **__):
        raise AssertionError("made again")

    monkeypatch.setattr(hf.PreTrainedTokenizerFast, "__call__", fail)
    monkeypatch.setattr(hf.PreTrainedTokenizerFast, "apply_chat_template", fail)
    again = task_of("chat").examples
    assert all(again[split].to_list() == part.to_list() for split, part in first.items())
    with pytest.raises(AssertionError, match="made again"):
        task_of("chat", "task.max_length=90")


def test_stored_examples_are_of_the_same_code_options_and_tokenizer(speaking, monkeypatch):
    def found(max_length=9, template=PLAIN):
        return fingerprint(make_examples, "rows", {"max_length": max_length}, speaking(template))

    before = found()
    assert found() == before not in (found(max_length=8), found(template=MARKED))
    monkeypatch.setattr("inspect.getsource", lambda module: f"other code of {module}")
    assert found() != before


@pytest.mark.parametrize("packed", [True, False])
def test_texts_are_cut_with_their_ends_one_by_one_or_as_a_stream(packed, task_of):
    task = task_of("text", f"task.packed={packed}")
    for split, examples in task.examples.items():
        texts = [[*task.tokenizer(text)["input_ids"], 0] for text in task.rows[split]["text"]]
        parts = [sum(texts, [])] if packed else texts
        expected = [part[start : start + LENGTH] for part in parts for start in range(0, len(part), LENGTH)]
        assert examples["input_ids"][:] == expected
    # The end of the first text would be alone, with nothing before it to predict it from.
    options = {"tokenizer": hf.ByT5Tokenizer(), "max_length": 4, "form": "text", "packed": False}
    assert make_examples({"text": ["abcd", "abcde"]}, **options)["length"] == [4, 4, 2]
    batch = task.collate([*task.examples["train"]][-4:])
    real = batch["attention_mask"].bool()
    assert torch.equal(batch["labels"], torch.where(real, batch["input_ids"], -100))


def test_account_says_what_became_of_every_row(task_of, capsys):
    """Beside the rows, tokenised whole."""
    task = task_of("chat")
    printed = capsys.readouterr().out
    for split, rows in task.rows.items():
        lengths = [len(task.tokenizer.apply_chat_template(row["messages"])["input_ids"]) for row in rows]
        kept = [length for length in lengths if length <= LENGTH]
        counts = {"rows": len(rows), "examples": len(kept), "tokens": sum(kept), "too_long": len(rows) - len(kept)}
        assert counts.items() <= task.account[split].items()
        assert re.search(rf"^{split} +{len(rows)} rows, {len(kept)} examples, {sum(kept):,} tokens, ", printed, re.M)
    assert any(task.account[split]["too_long"] for split in task.account)
