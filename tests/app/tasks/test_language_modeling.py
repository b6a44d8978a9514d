"""The task on a random Llama of two layers with a tokenizer made of Python: batches, losses, completions."""

import math

import pytest
import torch
from datasets import Dataset
from study_data.stdlib import stdlib_functions
from trained import updated
from transformers import GPT2Config, GPT2LMHeadModel

from dynrank.app.models.pretrained import load_tokenizer
from dynrank.app.tasks.language_modeling import LanguageModeling
from dynrank.errors import ConfigurationError

MODULES = ["base64", "csv", "gzip", "heapq", "pprint", "queue", "random", "shutil", "statistics", "textwrap"]
SIZES = {"batch_size": 4, "max_length": 160, "val_examples": 6, "val_generate": 5, "generate": 6, "limit": 60}
SIZES |= {"max_new_tokens": 48}
LORA = {"rank": 8, "alpha": 16}


@pytest.fixture(scope="module")
def functions():
    return stdlib_functions(MODULES, seed=0)


@pytest.fixture(scope="module")
def make(functions, tiny_llama):
    """Makes a task."""
    return lambda **values: LanguageModeling(str(tiny_llama), **{"data": functions, **SIZES, **values})


@pytest.fixture(scope="module")
def task(make):
    made = make()
    made.setup("fit")
    return made


@pytest.fixture
def module(task, optimizer):
    made = task.module(LORA, optimizer)
    updated(made.model, std=0.1)
    return made.eval()


def test_batch_learns_the_answer_and_its_end_and_not_the_prompt(task, functions):
    batch = next(iter(task.train_dataloader()))
    for ids, mask, labels in zip(*(batch[key] for key in ("input_ids", "attention_mask", "labels")), strict=True):
        start, end = int((labels != -100).nonzero()[0]), int(mask.sum())
        assert torch.equal(labels[start:end], ids[start:end])
        assert {*labels[:start].tolist(), *labels[end:].tolist()} == {-100}
        prompt, answer = task.tokenizer.decode(ids[:start]), task.tokenizer.decode(ids[start:end])
        assert {"prompt": prompt, "answer": answer.removesuffix("<|end|>")} in functions["train"]
        assert ids[end - 1] == task.tokenizer.eos_token_id


def texts(loader):
    pairs = [pair for batch in loader for pair in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    return sorted(tuple(ids[mask.bool()].tolist()) for ids, mask in pairs)


def test_evaluation_takes_each_example_once(task, functions):
    assert task.account["train"]["rows"] == SIZES["limit"]
    loss, val, train, written = task.test_dataloader()
    assert texts(loss) == sorted(map(tuple, task.examples["test"]["input_ids"]))
    assert texts(val) == texts(task.val_dataloader()[0])
    assert len(texts(val)) == len(set(texts(train))) == SIZES["val_examples"]
    assert set(texts(train)) <= set(map(tuple, task.examples["train"]["input_ids"]))
    for split, loader, count in (("test", written, 6), ("val", task.val_dataloader()[1], 5)):
        asked = [task.tokenizer.decode(ids) for ids in texts(loader)]
        assert len(asked) == len({*asked}) == count
        assert {*asked} <= {row["prompt"] for row in functions[split]}
        answers = {answer for batch in loader for answer in batch["answers"]}
        assert answers <= {row["answer"] for row in functions[split] if row["prompt"] in asked}


def test_loss_is_the_mean_over_the_tokens_of_answers(task, module):
    batch = next(iter(task.train_dataloader()))
    module.log = lambda *args, **kwargs: None
    loss = module.training_step(batch, 0).detach()
    log_probabilities = []
    for ids, mask, labels in zip(*(batch[key] for key in ("input_ids", "attention_mask", "labels")), strict=True):
        row = ids[mask.bool()]
        logits = module.model(input_ids=row[None]).logits[0].detach().double().log_softmax(-1)
        places = (labels[mask.bool()] != -100).nonzero().flatten()
        log_probabilities += [logits[i - 1, row[i]] for i in places]
    assert float(loss) == pytest.approx(-float(torch.stack(log_probabilities).mean()), rel=1e-5)


def test_continuation_is_the_most_probable_token_again_and_again(task, module):
    batch = next(iter(task.test_dataloader()[-1]))
    assert int(batch["attention_mask"].sum(1).min()) < batch["input_ids"].shape[1]
    module.max_new_tokens = 12
    # Chat models have ends beside the tokenizer's.
    ends = [0, *range(1, 600, 16)]
    module.model.generation_config.eos_token_id = ends
    written = module.continuations(batch["input_ids"], batch["attention_mask"])
    for row, mask, text in zip(batch["input_ids"], batch["attention_mask"], written, strict=True):
        ids = row[mask.bool()]
        start = len(ids)
        while len(ids) < start + 12 and (len(ids) == start or ids[-1] not in ends):
            ids = torch.cat([ids, module.model(input_ids=ids[None]).logits[0, -1].argmax()[None]])
        assert text == module.tokenizer.decode(ids[start:], skip_special_tokens=True)
    assert len(set(written)) > 1


GOOD = {"bleu": 1.0, "exact_match": 1.0}
# Each has what is written, from (number of the example, answer), and what is then measured.
CASES = {
    "answers": (lambda i, answer: answer, GOOD),
    "answers with blanks around": (lambda i, answer: f"{answer} \n", {"exact_match": 1.0}),
    "nothing": (lambda i, answer: "", {"bleu": 0.0, "exact_match": 0.0}),
    "half of them": (lambda i, answer: answer if i % 2 else answer + "\n\ndef other():", {"exact_match": 0.5}),
}


@pytest.mark.parametrize("case", CASES)
def test_quality_of_what_is_written(case, task, module, regression):
    write, expected = CASES[case]
    answers = [answer for batch in task.test_dataloader()[-1] for answer in batch["answers"]]
    made = iter([write(i, answer) for i, answer in enumerate(answers)])
    module.continuations = lambda ids, mask: [next(made) for _ in ids]
    results = regression[2]().test(module, task, verbose=False)
    metrics = {name: value for of_loader in results for name, value in of_loader.items()}
    assert {name: metrics[f"test/{name}"] for name in expected} == pytest.approx(expected)
    assert metrics["test/perplexity"] == pytest.approx(math.exp(metrics["test/loss"]), rel=1e-4)


@pytest.mark.parametrize("val_generate", [0, 5])
def test_metrics_of_the_task_are_those_that_a_fit_logs(val_generate, make, optimizer, regression):
    task = make(val_generate=val_generate)
    trainer = regression[2](max_steps=1, val_check_interval=1, check_val_every_n_epoch=None)
    trainer.fit(task.module(LORA, optimizer), task)
    assert set(task.metrics) == set(trainer.callback_metrics)


def test_accuracy_is_the_share_that_greedy_decoding_writes_exactly(make, optimizer, regression):
    task = make(generate=0, val_generate=0)
    module = task.module(LORA, optimizer).eval()
    rows = []
    for i in range(12):
        ids = [*range(20 * i, 20 * i + 5 + i % 4)]
        learned = [False] * len(ids) + [True] * 3
        for _ in range(3):
            ids.append(int(module.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if i % 3 == 0:
            # This answer is another one in the middle.
            ids[-2] += 1
        rows.append({"input_ids": ids, "learned": learned, "length": len(ids)})
    task.examples = dict.fromkeys(["train", "val", "test"], Dataset.from_list(rows))
    metrics, *_ = regression[2]().test(module, task, verbose=False)
    assert metrics["test/accuracy"] == pytest.approx(8 / 12)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"max_length": 8}, r"8 tokens.*task\.max_length"),
        ({"max_new_tokens": 1, "val_generate": 0}, r"no test example .* task\.max_new_tokens"),
        ({"form": "text"}, r"set task\.val_generate=0 and task\.generate=0"),
        ({"form": "chat", "packed": True}, r"task\.packed must go with task=text, got task\.form=chat"),
    ],
)
def test_what_cannot_be_used_is_named(values, named, make):
    """What a test would refuse, too, and before the first step."""
    with pytest.raises(ConfigurationError, match=named):
        make(**values).setup("fit")


def test_generation_leaves_out_prompts_that_leave_no_positions_for_an_answer(
    tiny_llama, optimizer, regression, tmp_path
):
    load_tokenizer(str(tiny_llama)).save_pretrained(tmp_path)
    GPT2LMHeadModel(GPT2Config(vocab_size=600, n_positions=32, n_embd=16, n_layer=1, n_head=2)).save_pretrained(
        tmp_path
    )
    rows = [{"prompt": "def " * (1 + i % 28), "answer": "x"} for i in range(56)]
    sizes = {"batch_size": 4, "max_length": 32, "val_generate": 56, "generate": 56, "max_new_tokens": 12}
    task = LanguageModeling(str(tmp_path), dict.fromkeys(["train", "val", "test"], rows), **sizes)
    trainer = regression[2](max_steps=1)
    module = task.module(LORA, optimizer)
    trainer.fit(module, task)
    assert len(trainer.test(module, task, verbose=False)) == 4
    lengths = [int(n) for batch in task.test_dataloader()[-1] for n in batch["attention_mask"].sum(1)]
    wanted = [len(task.tokenizer(row["prompt"])["input_ids"]) for row in rows]
    # The last of 12 new tokens is not read.
    assert sorted(lengths) == sorted(n for n in wanted if n <= 21)
    assert max(wanted) > 21
