import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support
from sklearn.utils.class_weight import compute_class_weight
from trained import updated
from transformers import AutoModelForSequenceClassification, DistilBertConfig, LlamaConfig, RobertaConfig

import dynrank
from dynrank.errors import ConfigurationError
from dynrank.models.pretrained import head_names, load_classifier
from dynrank.tasks.classification import Classification, Classifier
from dynrank.tasks.data.icd10 import icd10_terms

LORA = {"rank": 4, "alpha": 8}
SIZES = {"batch_size": 8, "max_length": 16, "limit": 40}


@pytest.fixture(scope="module")
def task(tiny_bert):
    made = Classification(str(tiny_bert), icd10_terms([1], 3, 10, seed=0), **SIZES)
    made.setup("fit")
    return made


@pytest.fixture(scope="module")
def module(task, optimizer):
    return task.module(LORA, optimizer)


def test_batches_are_padded_to_their_longest_text_and_have_its_class(task):
    batch = next(iter(task.train_dataloader()))
    train = task.examples["train"]
    lengths = batch["attention_mask"].sum(1)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (8, int(lengths.max()))
    assert batch["labels"].shape == (8,)
    assert lengths.max() <= 16
    classes = {tuple(ids): label for ids, label in zip(train["input_ids"], train["label"], strict=True)}
    texts = [tuple(ids[:length].tolist()) for ids, length in zip(batch["input_ids"], lengths, strict=True)]
    assert [classes[text] for text in texts] == batch["labels"].tolist()


def test_final_metrics_are_those_of_a_plain_evaluation(task, optimizer, regression, tiny_bert):
    made = Classifier(str(tiny_bert), task.labels, {**LORA, "dropout": 0.5}, optimizer, label_smoothing=0.5)
    results = regression[2]().test(made, task, verbose=False)
    metrics = {name: value for of_loader in results for name, value in of_loader.items()}
    assert {name for name in metrics if name.startswith("final/")} == {f"final/{name}" for name in task.final}
    made.eval()
    for name, loader in zip(("test", "final/val", "final/train"), task.test_dataloader(), strict=True):
        losses = []
        right = []
        for batch in loader:
            for ids, mask, label in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
                with torch.no_grad():
                    logits = made.model(input_ids=ids[mask.bool()][None]).logits[0].double()
                losses.append(-float(logits.log_softmax(0)[label]))
                right.append(int(logits.argmax()) == int(label))
        assert metrics[f"{name}/loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
        if name != "final/train":
            assert metrics[f"{name}/accuracy"] == pytest.approx(sum(right) / len(right))


def test_training_is_smoothed_and_with_dropout(task, module, optimizer, tiny_bert):
    assert all(part.training for part in module.model.modules())
    batch = next(iter(task.train_dataloader()))
    smoothed = Classifier(str(tiny_bert), task.labels, LORA, optimizer, label_smoothing=0.5)
    smoothed.load_state_dict(module.state_dict())
    smoothed.eval()
    logits = smoothed.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    smoothed.log = lambda *args, **kwargs: None
    assert torch.equal(smoothed.training_step(batch, 0), F.cross_entropy(logits, batch["labels"], label_smoothing=0.5))


def test_results_of_each_class_are_those_of_scikit_learn(task, optimizer, regression, tiny_bert):
    made = Classifier(str(tiny_bert), task.labels, LORA, optimizer)
    trainer = regression[2]()
    for _ in range(2):
        trainer.test(made, task, verbose=False)
    made.eval()
    wanted = []
    answered = []
    for batch in task.test_dataloader()[0]:
        with torch.no_grad():
            answered += made.predict(batch)[0].argmax(-1).tolist()
        wanted += batch["labels"].tolist()
    classes = range(len(task.labels))
    scores = precision_recall_fscore_support(wanted, answered, labels=classes, zero_division=0)
    matrix = confusion_matrix(wanted, answered, labels=classes)
    assert made.class_results.keys() == {task.labels[i] for i in classes if scores[3][i]}
    for i, (precision, recall, f1, texts) in enumerate(zip(*scores, strict=True)):
        if texts:
            found = made.class_results[task.labels[i]]
            assert (found.precision, found.recall, found.f1) == pytest.approx((precision, recall, f1))
            assert found.texts == texts
            assert found.answers == {task.labels[k]: matrix[i, k] for k in classes if matrix[i, k]}


def test_balanced_classes_weigh_alike_in_training_alone(tiny_bert, optimizer):
    rows = [(f"{label} {i}", label) for label, count in (("a", 2), ("b", 12), ("c", 6)) for i in range(count)]
    task = Classification(str(tiny_bert), dict.fromkeys(["train", "val", "test"], rows), class_weights="balanced")
    labels = [label for _, label in rows]
    expected = compute_class_weight("balanced", classes=np.array(["a", "b", "c"]), y=labels)
    assert task.weights == pytest.approx(expected)
    task.setup("fit")
    module = task.module(LORA, optimizer).eval()
    module.log = lambda *args, **kwargs: None
    batch = task.collate([*task.examples["train"]])
    with torch.no_grad():
        logits = module.predict(batch)[0]
        trained, plain = (
            float(loss) for loss in (module.training_step(batch, 0), module.loss(logits, batch["labels"]))
        )
    likely = logits.double().softmax(-1)[torch.arange(20), batch["labels"]].log()
    # Each class has the same share of the loss.
    means = [likely[batch["labels"] == index].mean() for index in range(3)]
    assert trained == pytest.approx(-float(sum(means)) / 3, rel=1e-5)
    assert plain == pytest.approx(-float(likely.mean()), rel=1e-5)
    again = Classifier(**{**module.hparams, "on_meta": True})
    assert again.class_weights.tolist() == pytest.approx(expected)


def test_having_a_label_and_not_having_it_weigh_alike(tiny_bert, optimizer):
    rows = [{"text": f"t {i}", "label": ["all"] * (i % 4 < 3) + ["rare"] * (i % 10 == 0)} for i in range(20)]
    task = Classification(str(tiny_bert), dict.fromkeys(["train", "val", "test"], rows), class_weights="balanced")
    assert task.weights == pytest.approx([5 / 15, 18 / 2])
    module = task.module(LORA, optimizer)
    logits = torch.zeros(20, 2)
    labels = torch.tensor([[label in row["label"] for label in task.labels] for row in rows]).float()
    loss = module.loss(logits, labels, weights=module.class_weights)
    # by hand: the same loss for both answers, twice the smaller class's number of times in each column
    assert float(loss) == pytest.approx((2 * 5 + 2 * 18) / 40 * math.log(2))


def test_several_labels_are_learned_and_measured_each_by_itself(tiny_bert, optimizer):
    made = Classifier(str(tiny_bert), ["a", "b", "c"], LORA, optimizer, several=True)
    logits = torch.randn(9, 3)
    labels = torch.randint(2, (9, 3)).float()
    wanted = 0.8 * labels + 0.1
    likely = logits.sigmoid()
    loss = -(wanted * likely.log() + (1 - wanted) * (1 - likely).log()).mean()
    torch.testing.assert_close(made.loss(logits, labels, label_smoothing=0.2), loss)
    made.quality["test"].update(*made.measured(logits, labels))
    made.by_class.update(*made.measured(logits, labels))
    made.on_test_epoch_end()
    scores = precision_recall_fscore_support(labels.int(), (logits > 0).int(), zero_division=0)
    for found, *expected in zip(made.class_results.values(), *scores, strict=True):
        assert (found.precision, found.recall, found.f1, found.texts) == pytest.approx(expected)
    assert made.quality["test"].compute()["test/accuracy"] == ((logits > 0) == labels.bool()).float().mean()


ROWS = [("one", 10), ("two", 9), ("three", 10)]


@pytest.mark.parametrize(
    ("rows", "names", "labels"),
    [(ROWS, ["9", "10"], [1, 0, 1]), ([("one", "b"), ("two", "a")], ["a", "b"], [1, 0])],
    ids=["ints", "texts"],
)
def test_classes_are_the_labels_in_order(rows, names, labels, tiny_bert, optimizer):
    task = Classification(str(tiny_bert), dict.fromkeys(["train", "val", "test"], rows), batch_size=2)
    task.setup("fit")
    assert [*task.examples["train"]["label"]] == labels
    texts = [task.tokenizer.decode(ids, skip_special_tokens=True) for ids in task.examples["train"]["input_ids"]]
    assert texts == [text for text, _ in rows]
    assert task.module(LORA, optimizer, on_meta=True).hparams["labels"] == names


REFUSED = {
    "max_length": ({"max_length": 1}, r"task\.max_length"),
    "an unknown key": ({"max_lenght": 8}, "max_lenght.*max_length"),
    "a large batch": ({"batch_size": 500}, r"500.*task\.batch_size|task\.batch_size.*500"),
    "one class": ({"data": dict.fromkeys(["train", "val", "test"], [("x", "a")])}, "'a'.*set data"),
    "a new label": ({"data": {"train": ROWS, "val": [("x", 3)], "test": ROWS}}, r"\['3'\].*set data"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_used_is_named(case, tiny_bert):
    def train():
        data = dict.fromkeys(["train", "val", "test"], ROWS)
        task = Classification(**{"model": str(tiny_bert), "data": data, "batch_size": 2, **REFUSED[case][0]})
        task.setup("fit")
        task.train_dataloader()

    with pytest.raises(ConfigurationError, match=REFUSED[case][1]):
        train()


SMALL = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 64}
ARCHITECTURES = {
    "decoder": lambda v: LlamaConfig(vocab_size=v, num_key_value_heads=2, bos_token_id=101, eos_token_id=102, **SMALL),
    "two-layer head": lambda v: RobertaConfig(vocab_size=v, **SMALL),
    "pre_classifier": lambda v: DistilBertConfig(vocab_size=v, dim=32, hidden_dim=64, n_layers=2, n_heads=4),
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_any_architecture_in_a_folder_trains_and_exports(architecture, task, optimizer, tmp_path):
    folder = tmp_path / "model"
    task.tokenizer.save_pretrained(folder)
    made = AutoModelForSequenceClassification.from_config(ARCHITECTURES[architecture](len(task.tokenizer)))
    # The saved head is for 2 classes, and the task replaces it.
    made.save_pretrained(folder)
    module = Classifier(str(folder), task.labels, LORA, optimizer)
    heads = set(head_names(module.model))
    assert heads
    assert not [name for name, _ in dynrank.lora_layers(module.model) if name.split(".")[0] in heads]
    updated(module.model)
    batch = next(iter(task.train_dataloader()))
    module.log = lambda *args, **kwargs: None
    module.training_step(batch, 0).backward()
    trained = {name: p for name, p in module.model.named_parameters() if p.requires_grad}
    assert {name.split(".")[0] for name in trained if "lora_" not in name} == heads
    assert all(p.grad is not None for p in trained.values())

    dynrank.save_adapter(module.model, tmp_path / "adapter")
    plain = load_classifier(str(folder), len(task.labels)).eval()
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    before = plain(**inputs).logits
    theirs = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()(**inputs).logits
    assert (theirs - module.model.eval()(**inputs).logits).abs().max() <= 1e-5
    assert (theirs - before).abs().max() > 1e-2
