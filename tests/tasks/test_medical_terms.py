import json

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, DistilBertConfig, LlamaConfig, RobertaConfig

import dynrank
from dynrank.errors import ConfigurationError
from dynrank.models.pretrained import head_names, load_classifier
from dynrank.tasks.medical_terms import MedicalTermsData, TermClassifier

DATA = {"batch_size": 8, "max_length": 16, "chapters": [1], "code_length": 3, "min_terms": 10, "seed": 0, "limit": 40}
OPTIMIZER = {
    "name": "AdamW",
    "lr": 1e-3,
    "head_lr": 1e-3,
    "weight_decay": 0.0,
    "warmup_steps": 1,
    "decay": "linear",
    "decay_share": 0.0,
    "options": {},
}


@pytest.fixture(scope="module")
def data():
    made = MedicalTermsData("minilm", **DATA)
    made.setup("fit")
    return made


@pytest.fixture(scope="module")
def module(data):
    return TermClassifier("minilm", data.labels, {"rank": 4, "alpha": 8}, OPTIMIZER)


def test_batches_are_padded_to_their_longest_term(data):
    batch = next(iter(data.train_dataloader()))
    lengths = batch["attention_mask"].sum(1)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (8, int(lengths.max()))
    assert batch["labels"].shape == (8,)
    assert lengths.max() <= 16


def rows(batch):
    return [
        (tuple(ids[ids != 0].tolist()), int(label))
        for ids, label in zip(batch["input_ids"], batch["labels"], strict=True)
    ]


def test_evaluation_batches_hold_every_term_once(data):
    test, val, train = ([row for batch in loader for row in rows(batch)] for loader in data.test_dataloader())
    assert len(test) == min(40, len(data.splits.test.texts))
    assert sorted(val) == sorted(row for batch in data.val_dataloader() for row in rows(batch))
    assert len(train) == len(val)
    assert set(train) <= {(tuple(ids), label) for ids, label in data.train_dataloader().dataset}


def test_final_losses_are_those_of_a_plain_evaluation(data, regression):
    made = TermClassifier("minilm", data.labels, {"rank": 4, "alpha": 8, "dropout": 0.5}, OPTIMIZER, 0.5)
    results = regression[2]().test(made, data, verbose=False)
    metrics = {name: value for of_loader in results for name, value in of_loader.items()}
    assert {name for name in metrics if name.startswith("final/")} == {
        "final/val/loss", "final/val/accuracy", "final/val/macro_f1", "final/train/loss"
    }  # fmt: skip
    made.eval()
    for name, loader in zip(("test", "final/val", "final/train"), data.test_dataloader(), strict=True):
        losses, right = [], []
        for batch in loader:
            for ids, mask, label in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
                with torch.no_grad():
                    logits = made.model(input_ids=ids[mask.bool()][None]).logits[0].double()
                losses.append(-float(logits.log_softmax(0)[label]))
                right.append(int(logits.argmax()) == int(label))
        assert metrics[f"{name}/loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
        if name != "final/train":
            assert metrics[f"{name}/accuracy"] == pytest.approx(sum(right) / len(right))


def test_all_linear_leaves_the_trained_head_out(module):
    names = [name for name, _ in dynrank.lora_layers(module.model)]
    assert len(names) == 37  # 6 layers of 6, and the pooler
    assert "classifier" not in names
    trained = {name for name, p in module.model.named_parameters() if p.requires_grad}
    assert {name for name in trained if "lora_" not in name} == {"classifier.weight", "classifier.bias"}


def test_training_is_smoothed_and_evaluation_is_not(data, module):
    batch = next(iter(data.train_dataloader()))
    smoothed = TermClassifier("minilm", data.labels, {"rank": 4, "alpha": 8}, OPTIMIZER, label_smoothing=0.5)
    smoothed.load_state_dict(module.state_dict())
    smoothed.eval()
    logits = smoothed.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = F.cross_entropy(logits, batch["labels"], label_smoothing=0.5)
    smoothed.log = lambda *args, **kwargs: None
    assert torch.equal(smoothed.training_step(batch, 0), expected)


def test_dropout_of_the_encoder_is_on_in_training(module):
    assert module.training
    assert all(submodule.training for submodule in module.model.modules())


def test_hyperparameters_are_plain_values(module):
    def plain(value):
        if isinstance(value, dict):
            return all(plain(v) for v in value.values())
        if isinstance(value, list):
            return all(map(plain, value))
        return value is None or isinstance(value, str | int | float | bool)

    assert plain(dict(module.hparams))


@pytest.mark.parametrize(
    ("values", "key"), [({"batch_size": 0}, "task.batch_size"), ({"max_length": 1}, "task.max_length")]
)
def test_data_refuses_unusable_values(values, key):
    with pytest.raises(ConfigurationError, match=key):
        MedicalTermsData("minilm", **{**DATA, **values})


def test_batch_size_above_the_number_of_terms_is_refused():
    made = MedicalTermsData("minilm", **{**DATA, "batch_size": 500})
    made.setup("fit")
    with pytest.raises(ConfigurationError, match=r"task\.batch_size must be at most the 40"):
        made.train_dataloader()


SMALL = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 64}
ARCHITECTURES = {
    "decoder": lambda v: LlamaConfig(vocab_size=v, num_key_value_heads=2, bos_token_id=101, eos_token_id=102, **SMALL),
    "two-layer head": lambda v: RobertaConfig(vocab_size=v, **SMALL),
    "pre_classifier": lambda v: DistilBertConfig(vocab_size=v, dim=32, hidden_dim=64, n_layers=2, n_heads=4),
}


# peft 0.21 asks transformers 5.24 for a name that is on its way out
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_any_architecture_in_a_folder_trains_and_exports(architecture, data, tmp_path):
    folder = tmp_path / "model"
    data.tokenizer.save_pretrained(folder)
    made = AutoModelForSequenceClassification.from_config(ARCHITECTURES[architecture](len(data.tokenizer)))
    made.save_pretrained(folder)  # with a head for 2 classes, which the task replaces
    module = TermClassifier(str(folder), data.labels, {"rank": 4, "alpha": 8}, OPTIMIZER)
    heads = set(head_names(module.model))
    assert heads
    assert not [name for name, _ in dynrank.lora_layers(module.model) if name.split(".")[0] in heads]
    for _, layer in dynrank.lora_layers(module.model):
        torch.nn.init.normal_(layer.lora_B)
    batch = next(iter(data.train_dataloader()))
    module.log = lambda *args, **kwargs: None
    module.training_step(batch, 0).backward()
    assert all(p.grad is not None for p in module.model.parameters() if p.requires_grad)

    dynrank.save_adapter(module.model, tmp_path / "adapter")
    plain = load_classifier(str(folder), len(data.labels)).eval()
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    before = plain(**inputs).logits
    theirs = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()(**inputs).logits
    assert (theirs - module.model.eval()(**inputs).logits).abs().max() <= 1e-5
    assert (theirs - before).abs().max() > 1e-2


def test_body_that_does_not_fit_its_config_is_refused(data, tmp_path):
    data.tokenizer.save_pretrained(tmp_path)
    made = AutoModelForSequenceClassification.from_config(ARCHITECTURES["decoder"](len(data.tokenizer)))
    made.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 96}))
    with pytest.raises(ConfigurationError, match=r"mlp.*task\.model.*do not fit"):
        load_classifier(str(tmp_path), 3)
