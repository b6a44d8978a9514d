import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import f1_score
from transformers import DistilBertConfig, LlamaConfig

import dynrank
from dynrank.app.models.pretrained import load_classifier
from dynrank.app.tasks.classification import Classification, Classifier
from dynrank.errors import ConfigurationError

LORA = {"rank": 4, "alpha": 8}
WORDS = ["fever", "cough with blood", "rash", "broken arm", "headache in the morning"]
SPLITS = ("train", "val", "test")


def rows_of(*pairs):
    return [{"text": text, "label": label} for text, label in pairs]


def same(*pairs):
    """These rows in each split."""
    return dict.fromkeys(SPLITS, rows_of(*pairs))


TERMS = {
    split: rows_of(*((f"{split}, patient {i}: {WORDS[i % 5]}", f"class {i % 7 % 5}") for i in range(40)))
    for split in SPLITS
}


@pytest.fixture(scope="module")
def task(tiny_bert):
    made = Classification(str(tiny_bert), TERMS, batch_size=8, max_length=16, limit=39)
    made.setup("fit")
    return made


def test_batches_are_padded_to_their_longest_text_and_have_its_class(task):
    batch = next(iter(task.train_dataloader()))
    train = task.examples["train"]
    assert len(train) == 39
    lengths = batch["attention_mask"].sum(1)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (8, int(lengths.max()))
    known = [*zip(train["input_ids"], train["label"], strict=True)]
    for ids, length, label in zip(batch["input_ids"], lengths, batch["labels"], strict=True):
        assert (ids[:length].tolist(), int(label)) in known


def test_results_are_those_of_a_plain_evaluation_and_of_scikit_learn(task, optimizer, regression, tiny_bert):
    model = load_classifier(str(tiny_bert), len(task.labels))
    made = Classifier(model, task.labels, {**LORA, "dropout": 0.5}, optimizer, label_smoothing=0.5)
    trainer = regression[2]()
    # The second test starts from 0 again.
    _, results = (trainer.test(made, task, verbose=False) for _ in range(2))
    metrics = {name: value for of_loader in results for name, value in of_loader.items()}
    assert {name for name in metrics if name.startswith("final/")} == {f"final/{name}" for name in task.final}
    made.eval()
    for name, loader in zip(("test", "final/val", "final/train"), task.test_dataloader(), strict=True):
        losses = []
        answers = []
        for batch in loader:
            for ids, mask, label in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
                with torch.no_grad():
                    logits = made.model(input_ids=ids[mask.bool()][None]).logits[0].double()
                losses.append(-float(logits.log_softmax(0)[label]))
                answers.append((int(label), int(logits.argmax())))
        assert metrics[f"{name}/loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
        if name != "final/train":
            right = sum(label == answer for label, answer in answers)
            assert metrics[f"{name}/accuracy"] == pytest.approx(right / len(losses))
        if name == "test":
            assert metrics["test/macro_f1"] == pytest.approx(f1_score(*zip(*answers, strict=True), average="macro"))


def test_training_is_smoothed_and_with_dropout(task, optimizer, tiny_bert):
    model = load_classifier(str(tiny_bert), len(task.labels))
    module = Classifier(model, task.labels, LORA, optimizer, label_smoothing=0.5)
    assert all(part.training for part in module.model.modules())
    module.eval()
    batch = next(iter(task.train_dataloader()))
    logits = module.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    module.log = lambda *args, **kwargs: None
    assert torch.equal(module.training_step(batch, 0), F.cross_entropy(logits, batch["labels"], label_smoothing=0.5))


ROWS = rows_of(("one", 10), ("two", 9), ("three", 10))


def test_classes_are_the_labels_in_order(tiny_bert, optimizer):
    task = Classification(str(tiny_bert), dict.fromkeys(SPLITS, ROWS), batch_size=2)
    task.setup("fit")
    assert [*task.examples["train"]["label"]] == [1, 0, 1]
    texts = [task.tokenizer.decode(ids, skip_special_tokens=True) for ids in task.examples["train"]["input_ids"]]
    assert texts == [row["text"] for row in ROWS]
    assert task.module(LORA, optimizer, on_meta=True).hparams["labels"] == ["9", "10"]


REFUSED = {
    "one class": (rows_of(("x", "a")), rows_of(("x", "a")), "'a'.*set data"),
    "a list of labels": (ROWS, rows_of(("x", ["9"])), r"label must be .*\['9'\]"),
    "a new label": (ROWS, rows_of(("x", 3)), r"\['3'\].*set data"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_used_is_named(case, tiny_bert):
    train, val, named = REFUSED[case]
    with pytest.raises(ConfigurationError, match=named):
        Classification(str(tiny_bert), {"train": train, "val": val, "test": train}).setup("fit")


def test_a_length_that_the_model_cannot_read_is_refused_before_the_first_step(tiny_bert, optimizer, regression):
    task = Classification(str(tiny_bert), same(("word " * 600, "a"), ("word", "b")), batch_size=2, max_length=600)
    with pytest.raises(ConfigurationError, match="max_length must be at most 512"):
        regression[2](max_steps=1).fit(task.module(LORA, optimizer), task)


def test_labels_that_are_nearly_alike_are_said_and_texts_end_as_the_tokenizer_ends_them(tiny_bert, capsys):
    labels = ["Late bill", "late  Bill ", "caf\u00e9", "cafe\u0301", "010", "10"]
    data = same(*((f"{i} {'word ' * i}", labels[i % 6]) for i in range(24)))
    task = Classification(str(tiny_bert), data, batch_size=2, max_length=16)
    task.setup("fit")
    start = "labels that differ only by case, blanks or Unicode form: "
    said = {line.removeprefix(start) for line in capsys.readouterr().out.splitlines() if line.startswith(start)}
    assert said == {"'Late bill', 'late  Bill '", "'cafe\u0301', 'caf\u00e9'"}
    expected = task.tokenizer([row["text"] for row in data["train"]], truncation=True, max_length=16)["input_ids"]
    assert task.examples["train"]["input_ids"][:] == expected
    assert task.account["train"]["at_max_length"] == sum(len(ids) == 16 for ids in expected) > 0


SMALL = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 64}
# Each has the config of a model, and its parts that are new and have no LoRA.
HEADS = {
    "decoder": (LlamaConfig(num_key_value_heads=2, **SMALL), {"score"}),
    "two parts": (DistilBertConfig(dim=32, hidden_dim=64, n_layers=2, n_heads=4), {"pre_classifier", "classifier"}),
}


@pytest.mark.parametrize("architecture", HEADS)
def test_a_new_head_is_trained_whole_and_the_body_by_lora(architecture, optimizer, tmp_path):
    config, heads = HEADS[architecture]
    config.save_pretrained(tmp_path)
    model = Classifier(load_classifier(str(tmp_path), 3, on_meta=True), ["a", "b", "c"], LORA, optimizer).model
    assert not [name for name, _ in dynrank.lora_layers(model) if name.split(".")[0] in heads]
    trained = {name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name}
    assert trained == {name for name, _ in model.named_parameters() if name.split(".")[0] in heads}
