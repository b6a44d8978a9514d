"""The task on a random Llama of two layers with a tokenizer made here: batches, losses, completions, and whole runs."""

import csv
import inspect
import json
import math

import pytest
import torch
from peft import PeftModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import dynrank
from dynrank.callbacks import AdapterCheckpoint, RankScheduler
from dynrank.errors import ConfigurationError
from dynrank.models.pretrained import load_causal_lm
from dynrank.output.metrics_csv import series
from dynrank.schedules import milestones
from dynrank.tasks.code_completion import BodyWriter, CodeCompletion, FunctionsData

MODULES = ["base64", "csv", "gzip", "heapq", "pprint", "queue", "random", "shutil", "statistics", "textwrap"]
DATA = {"batch_size": 4, "max_length": 160, "modules": MODULES, "seed": 0, "val_functions": 8, "val_generate": 5}
DATA |= {"generate": 6, "max_new_tokens": 48, "limit": 24}
OPTIMIZER = {"name": "AdamW", "lr": 1e-3, "head_lr": 1e-3, "weight_decay": 0.0, "warmup_steps": 1, "decay": "linear"}
OPTIMIZER |= {"decay_share": 0.0, "options": {}}
LORA = {"rank": 8, "alpha": 16}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([inspect.getsource(json)], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>").save_pretrained(folder)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    size |= {"vocab_size": 600, "bos_token_id": None, "eos_token_id": 0, "initializer_range": 0.3}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**size, tie_word_embeddings=True)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def data(llama):
    made = FunctionsData(llama, **DATA)
    made.setup("fit")
    return made


@pytest.fixture
def module(llama):
    made = BodyWriter(llama, LORA, OPTIMIZER, DATA["max_new_tokens"])
    for _, layer in dynrank.lora_layers(made.model):
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    return made.eval()


def test_batch_learns_the_body_and_its_end_and_not_the_prompt(data):
    batch = next(iter(data.train_dataloader()))
    for ids, mask, labels in zip(*(batch[key] for key in ("input_ids", "attention_mask", "labels")), strict=True):
        length, learned = int(mask.sum()), labels != -100
        assert length <= DATA["max_length"]
        assert not mask[length:].any()
        prompt = data.tokenizer.decode(ids[: int(learned.nonzero()[0])])
        body = data.tokenizer.decode(ids[learned])
        examples = data.examples["train"]
        (example,) = [e for e in examples if (e.source.prompt, e.source.body + "<|end|>") == (prompt, body)]
        assert torch.equal(labels[learned], ids[learned])
        assert int(learned.sum()) == len(example.answer)


def texts(loader):
    pairs = [pair for batch in loader for pair in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    return sorted(tuple(ids[mask.bool()].tolist()) for ids, mask in pairs)


def test_evaluation_takes_each_function_once(data):
    learned = [len(e.answer) for e in data.examples["test"]]
    loss, val, train, completed = data.test_dataloader()
    assert texts(val) == texts(data.val_dataloader()[0])
    assert len(texts(train)) == DATA["val_functions"]
    assert set(texts(train)) <= {(*e.prompt, *e.answer) for e in data.examples["train"]}
    assert sorted(int(n) for b in loss for n in (b["labels"] != -100).sum(1)) == sorted(learned)
    functions = [function for batch in completed for function in batch["functions"]]
    assert len(set(functions)) == len(functions) == DATA["generate"]
    loss, completed = data.val_dataloader()
    assert sum(len(batch["labels"]) for batch in loss) == DATA["val_functions"]
    functions = {function for batch in completed for function in batch["functions"]}
    assert len(functions) == DATA["val_generate"]
    assert functions <= {(e.source.prompt, e.source.body) for e in data.examples["val"]}


def test_loss_is_the_mean_over_the_tokens_of_bodies(data, module):
    batch = next(iter(data.train_dataloader()))
    module.log = lambda *args, **kwargs: None
    loss = module.training_step(batch, 0).detach()
    log_probabilities = []
    for ids, mask, labels in zip(*(batch[key] for key in ("input_ids", "attention_mask", "labels")), strict=True):
        row = ids[mask.bool()]  # alone, without padding
        logits = module.model(input_ids=row[None]).logits[0].detach().double().log_softmax(-1)
        places = (labels[mask.bool()] != -100).nonzero().flatten()
        log_probabilities += [logits[i - 1, row[i]] for i in places]
    assert float(loss) == pytest.approx(-float(torch.stack(log_probabilities).mean()), rel=1e-5)


def test_continuation_is_the_most_probable_token_again_and_again(data, module):
    batch = next(iter(data.test_dataloader()[-1]))
    assert int(batch["attention_mask"].sum(1).min()) < batch["input_ids"].shape[1]  # some prompt is padded
    module.max_new_tokens = 12
    written = module.continuations(batch["input_ids"], batch["attention_mask"])
    for row, mask, text in zip(batch["input_ids"], batch["attention_mask"], written, strict=True):
        ids = row[mask.bool()]
        start = len(ids)
        while len(ids) < start + 12 and (len(ids) == start or ids[-1] != 0):
            ids = torch.cat([ids, module.model(input_ids=ids[None]).logits[0, -1].argmax()[None]])
        assert text == module.tokenizer.decode(ids[start:], skip_special_tokens=True)
    assert len(set(written)) > 1


def metrics_of(module, data, quiet_trainer, write, split="test"):
    """Metrics of a test or validation in which the module writes ``write(number of the function, prompt, body)``."""
    loaders = data.test_dataloader() if split == "test" else data.val_dataloader()
    made = iter([write(i, *function) for i, function in enumerate(f for b in loaders[-1] for f in b["functions"])])
    module.continuations = lambda ids, mask: [next(made) for _ in ids]
    trainer = quiet_trainer()
    results = (trainer.test if split == "test" else trainer.validate)(module, data, verbose=False)
    return {name: value for of_loader in results for name, value in of_loader.items()}


GOOD = {"test/bleu": 1.0, "test/exact_match": 1.0, "test/parses": 1.0}
CASES = {
    "bodies": (lambda i, prompt, body: body, GOOD),
    "bodies and another function": (lambda i, prompt, body: body + "\n\ndef other():\n    return 1", GOOD),
    "bodies and prose": (lambda i, prompt, body: body + "\n```\nThis is it", GOOD),
    "nothing": (lambda i, prompt, body: "", {"test/bleu": 0.0, "test/exact_match": 0.0, "test/parses": 0.0}),
    "half of them": (lambda i, prompt, body: body if i % 2 else "", {"test/exact_match": 0.5, "test/parses": 0.5}),
    "their first line": (lambda i, prompt, body: body + "\n    (", {"test/exact_match": 1.0, "test/parses": 0.0}),
    "another line first": (lambda i, prompt, body: "\n    zz" + body, {"test/exact_match": 0.0, "test/parses": 1.0}),
}


@pytest.mark.parametrize("case", CASES)
def test_quality_of_what_is_written(case, data, module, regression):
    write, expected = CASES[case]
    metrics = metrics_of(module, data, regression[2], write)
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)
    assert metrics["test/perplexity"] == pytest.approx(math.exp(metrics["test/loss"]), rel=1e-4)


@pytest.mark.parametrize("case", ["bodies", "nothing", "their first line", "another line first"])
def test_validation_measures_the_same(case, data, module, regression):
    write, expected = CASES[case]
    metrics = metrics_of(module, data, regression[2], write, "val")
    found = {name.replace("val/", "test/"): value for name, value in metrics.items()}
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert found["test/perplexity"] == pytest.approx(math.exp(found["test/loss"]), rel=1e-4)


def test_no_completions_where_none_are_asked_for(llama, module, regression):
    made = FunctionsData(llama, **{**DATA, "generate": 0, "val_generate": 0})
    results = regression[2]().test(module, made, verbose=False)
    names = {"test/loss", "test/perplexity", "final/val/loss", "final/train/loss"}
    assert {name for of_loader in results for name in of_loader} == names
    (metrics,) = regression[2]().validate(module, made, verbose=False)
    assert set(metrics) == {"val/loss", "val/perplexity"}


@pytest.mark.parametrize("val_generate", [0, 5])
def test_metrics_of_the_task_are_those_that_a_fit_logs(llama, regression, val_generate):
    task = CodeCompletion(llama, **{**DATA, "val_generate": val_generate})
    trainer = regression[2](max_steps=1, val_check_interval=1, check_val_every_n_epoch=None)
    trainer.fit(task.module(LORA, OPTIMIZER), task.data)
    assert set(task.metrics) == set(trainer.callback_metrics)


def test_resumed_run_is_the_run_bit_by_bit(llama, regression, tmp_path):
    def run(**options):
        torch.manual_seed(0)
        made = BodyWriter(llama, LORA, OPTIMIZER, 8)
        keep = AdapterCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
        callbacks = [RankScheduler(milestones([4], at=[4], unit="step")), keep]
        trainer = regression[2](
            max_steps=8,
            val_check_interval=3,
            check_val_every_n_epoch=None,
            callbacks=callbacks,
            enable_checkpointing=True,
        )
        trainer.fit(made, FunctionsData(llama, **DATA), **options)
        assert {layer.rank for _, layer in dynrank.lora_layers(made.model)} == {4}
        return dict(made.named_parameters())

    whole = run()
    for step in (2, 6):  # before the drop, and after it
        resumed = run(ckpt_path=tmp_path / f"step={step}.ckpt")
        assert all(torch.equal(p, whole[name]) for name, p in resumed.items())


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"batch_size": 0}, "task.batch_size"),
        ({"max_length": "long"}, "task.max_length"),
        ({"max_new_tokens": 0}, "task.max_new_tokens"),
        ({"val_functions": -1}, "task.val_functions"),
        ({"val_generate": 0.5}, "task.val_generate"),
        ({"generate": -1}, "task.generate"),
        ({"limit": 1.5}, "task.limit"),
    ],
)
def test_data_refuses_unusable_values(llama, values, key):
    with pytest.raises(ConfigurationError, match=key):
        FunctionsData(llama, **{**DATA, **values})


@pytest.mark.parametrize(
    ("values", "loader", "key"),
    [
        ({"batch_size": 25}, "train_dataloader", r"task\.batch_size must be at most the 24"),
        ({"max_new_tokens": 1}, "test_dataloader", r"no test function .* task\.max_new_tokens"),
        ({"max_new_tokens": 1}, "val_dataloader", r"no val function .* task\.max_new_tokens"),
        ({"max_length": 8}, "setup", r"task\.max_length"),
    ],
)
def test_data_refuses_what_leaves_nothing(llama, values, loader, key):
    made = FunctionsData(llama, **{**DATA, **values})
    if loader != "setup":
        made.setup("fit")
    with pytest.raises(ConfigurationError, match=key):
        getattr(made, loader)(*["fit"][: loader == "setup"])


@pytest.fixture(scope="module")
def runs(llama, run_command, tmp_path_factory):
    """The experiment and what it is compared with, in miniature, by one command; folders by name."""
    folder = tmp_path_factory.mktemp("code")
    names = ["code_32_to_16", "code_fixed_32", "code_fixed_16"]
    task = [
        "task=code_completion",
        f"task.model={llama}",
        f"task.modules=[{','.join(MODULES)}]",
        "task.val_generate=3",
        "task.generate=4",
        "task.max_new_tokens=48",
    ]
    options = ["debug=smoke", "task.limit=8", "task.batch_size=2", "plots=false", f"hydra.sweep.dir={folder}"]
    done = run_command("dynrank-train", "--multirun", f"experiment={','.join(names)}", *options, *task, cwd=folder)
    assert done.returncode == 0, done.stderr
    return {name: folder / str(number) for number, name in enumerate(names)}


def test_experiment_drops_and_its_comparisons_do_not(runs):
    ranks = {}
    for name, folder in runs.items():
        with (folder / "rank_history.csv").open(newline="") as file:
            drops = {(row["rank_before"], row["rank_after"]) for row in csv.DictReader(file)}
        summary = json.loads((folder / "summary.json").read_text())
        metrics = summary["test"]
        assert set(metrics) == {f"test/{m}" for m in ("loss", "perplexity", "bleu", "exact_match", "parses")}
        assert all(math.isfinite(value) for value in metrics.values())
        (final,) = set(summary["final_ranks"].values())
        ranks[name] = drops, final
    assert ranks == {
        "code_32_to_16": ({("32", "16")}, 16),
        "code_fixed_32": (set(), 32),
        "code_fixed_16": (set(), 16),
    }


def test_experiment_measures_right_before_and_right_after_the_drop_and_at_the_end(runs):
    """The drop by deadline, at a step where no validation is due."""
    with (runs["code_32_to_16"] / "rank_history.csv").open(newline="") as file:
        (drop,) = {int(row["step"]) for row in csv.DictReader(file)}
    for name in ("val/bleu", "val/exact_match", "val/parses", "val/loss"):
        steps, values = series(runs["code_32_to_16"] / "metrics.csv", name)
        assert steps == [3, 7, drop, drop, 11]  # those after a batch have its index
        assert all(math.isfinite(value) for value in values)
    assert values[2] != values[3]
    assert series(runs["code_fixed_16"] / "metrics.csv", "val/bleu")[0] == [3, 7, 11]


def test_adapter_of_a_run_gives_equal_logits_in_peft_and_here(runs, llama):
    folder = runs["code_32_to_16"]
    trained = BodyWriter.load_from_checkpoint(folder / "checkpoints" / "last.ckpt").eval()
    ids = torch.randint(600, (3, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = trained.model(input_ids=ids).logits
        plain = load_causal_lm(llama).eval()(input_ids=ids).logits
        ours = dynrank.load_adapter(load_causal_lm(llama), folder / "adapter").eval()(input_ids=ids).logits
        base = AutoModelForCausalLM.from_pretrained(llama)
        peft = PeftModel.from_pretrained(base, folder / "adapter").eval()(input_ids=ids).logits
    assert torch.allclose(peft, expected, atol=1e-5, rtol=0)
    assert torch.allclose(ours, expected, atol=1e-5, rtol=0)
    assert not torch.allclose(plain, expected, atol=1e-4, rtol=0)
