"""``lora.from``: a run goes on from an adapter, ours or PEFT's, with its layers, ranks and scalings."""

import json
import shutil

import peft
import pytest
import torch
from trained import updated
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import dynrank
from dynrank.app.commands.ranks import print_ranks
from dynrank.app.models.merging import merge_adapter
from dynrank.app.runs.job import build, run
from dynrank.errors import ConfigurationError

SMALL = ["debug=smoke", "plots=false", "trainer.max_steps=4", "trainer.enable_progress_bar=false"]
IDS = torch.tensor([[5, 9, 30, 41, 7]])


@pytest.fixture(scope="module")
def task(tiny_llama, tmp_path_factory):
    """Overrides of a small run on prompts and answers."""
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": f"def f{i}(x):", "answer": f" return {i}"}) for i in range(60)))
    return [*SMALL, "task=completion", f"task.model={tiny_llama}", f"data.train={file}"]


@pytest.fixture(scope="module")
def theirs(tiny_llama, tmp_path_factory):
    """An adapter of PEFT's with unlike ranks and alphas, and rsLoRA, in two bytes."""
    folder = tmp_path_factory.mktemp("theirs")
    patterns = {"rank_pattern": {"q_proj": 6, r"0\..*down_proj": 1}, "alpha_pattern": {"q_proj": 5}}
    config = peft.LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "down_proj"], use_rslora=True, **patterns)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.bfloat16().save_pretrained(folder)
    return folder


def test_a_run_starts_as_the_adapter_of_somebody_else_and_keeps_its_ranks(task, theirs, tiny_llama, tmp_path, capsys):
    overrides = [*task, f"lora.from={theirs}"]
    model = build(dynrank.compose(overrides)).module.model.eval()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    expected = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), theirs).eval()
    with torch.no_grad():
        assert (model(IDS).logits - expected(IDS).logits).abs().max() < 1e-5
    layers = dynrank.read_adapter(theirs).layers
    found = {name: (layer.rank, layer.scaling) for name, layer in dynrank.lora_layers(model)}
    assert found == {name: (layer.rank, layer.scaling) for name, layer in layers.items()}
    assert {rank for rank, _ in found.values()} == {1, 4, 6}
    print_ranks(dynrank.compose(overrides))
    assert "4 layers" in capsys.readouterr().out
    first = run(dynrank.compose(overrides), tmp_path / "run")
    said = capsys.readouterr().out
    assert f"goes on from     the adapter {theirs}, at rank 1-6; schedule=fixed" in said
    trained = dynrank.read_adapter(tmp_path / "run" / "adapter")
    assert {name: layer.rank for name, layer in trained.layers.items()} == {n: la.rank for n, la in layers.items()}
    # A run of no step tests an adapter as it lies.
    again = dynrank.compose([*task, f"lora.from={tmp_path / 'run'}", "trainer.max_steps=0"])
    assert run(again, tmp_path / "again").test == pytest.approx(first.test, rel=1e-6)


def test_a_run_takes_the_base_that_the_adapter_names_unless_another_is_set(task, theirs, tiny_llama, tmp_path):
    without = [override for override in task if not override.startswith("task.model=")]
    for more, expected in (([], str(tiny_llama)), (["task.model=mine"], "mine")):
        config = dynrank.compose([*without, f"lora.from={theirs}", *more])
        assert (config.task.model, config.model.revision) == (expected, None)
    file = shutil.copytree(theirs, tmp_path / "copy") / "adapter_config.json"
    of_hub = json.loads(file.read_text()) | {"base_model_name_or_path": "org/tiny", "revision": "v1"}
    file.write_text(json.dumps(of_hub))
    config = dynrank.compose([*without, f"lora.from={file.parent}"])
    assert (config.task.model, config.model.revision) == ("org/tiny", "v1")
    file.write_text(json.dumps(of_hub | {"base_model_name_or_path": None}))
    with pytest.raises(ConfigurationError, match=r"\(lora\.from\) names no base model; set task\.model"):
        dynrank.compose([*without, f"lora.from={file.parent}"])


@pytest.mark.parametrize(
    "chosen", ["schedule=early_budget", "schedule.at=0.5", "schedule/how=early", "experiment=mine"]
)
def test_a_schedule_that_was_chosen_reckons_from_the_mean_rank_of_the_adapter(chosen, task, theirs, tmp_path):
    # A file of one's own that chooses a schedule is a choice, too.
    own = "# @package _global_\ndefaults:\n  - override /schedule: anneal\n"
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(own)
    config = dynrank.compose([*task, f"lora.from={theirs}", chosen], folder=tmp_path)
    # by hand: a direction of q_proj has 32 + 32 parameters, one of down_proj 32 + 48
    assert config.lora.rank == round((2 * 6 * 64 + (1 + 4) * 80) / (2 * 64 + 2 * 80))
    assert config.schedule.final_rank == max(1, config.lora.rank // (8 if chosen == "experiment=mine" else 2))
    build(config)


def test_an_adapter_of_a_run_knows_its_base_by_its_weights(task, tiny_llama, tmp_path):
    changed = "model.layers.1.self_attn.o_proj.weight"
    run(dynrank.compose([*task, "lora.rank=2", "schedule=fixed"]), tmp_path / "run")
    dynrank.squeeze(tmp_path / "run" / "adapter", tmp_path / "less", rank=1)
    same, other = (shutil.copytree(tiny_llama, tmp_path / name) for name in ("the same, moved", "other"))
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    with torch.no_grad():
        model.get_parameter(changed).mul_(1.5)
    model.save_pretrained(other)
    for place in ("run", "less"):
        build(dynrank.compose([*task, f"lora.from={tmp_path / place}", f"task.model='{same}'"]))
        build(dynrank.compose([*task, f"lora.from={tmp_path / place}", f"task.model='{same}'", "model.dtype=bfloat16"]))
        with pytest.raises(ConfigurationError, match=rf"another base \(.*\): '{changed}' has other values .*\(1 of "):
            build(dynrank.compose([*task, f"lora.from={tmp_path / place}", f"task.model={other}"]))


def test_what_contradicts_the_adapter_is_refused(task, theirs):
    for override in ("lora.rank=8", "lora.alpha=3", "lora.target_modules=attention", "rank_map=head_16"):
        with pytest.raises(ConfigurationError, match="cannot go with lora.from="):
            dynrank.compose([*task, f"lora.from={theirs}", override])
    with pytest.raises(ConfigurationError, match="adapter_config.json"):
        dynrank.compose([*task, "lora.from=absent"])


@pytest.fixture
def rows_of(tiny_bert, tmp_path):
    """Makes overrides of a small run on 20 texts of each of these labels."""

    def make(*labels):
        rows = [{"text": f"fine {label} {i}", "label": label} for label in labels for i in range(20)]
        file = tmp_path / f"{'-'.join(labels)}.jsonl"
        file.write_text("\n".join(map(json.dumps, rows)))
        return [*SMALL, "task=classification", f"task.model={tiny_bert}", f"data.train={file}"]

    return make


def test_a_classifier_goes_on_with_its_head_and_tokenizer_and_refuses_other_labels(rows_of, tiny_bert, tmp_path):
    trained = [*rows_of("a", "b"), "lora.rank=4", "schedule=fixed", "optimizer.head_lr=0.1"]
    run(dynrank.compose(trained), tmp_path / "run")
    adapter = tmp_path / "run" / "adapter"
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(60)
    tokenizer.save_pretrained(adapter)
    job = build(dynrank.compose([*rows_of("a", "b"), f"lora.from={tmp_path / 'run'}"]))
    again = job.module.model.eval()
    # Decoders classify by the last token before it, in training and once they are merged.
    assert job.task.tokenizer.pad_token_id == again.config.pad_token_id == 60
    assert merge_adapter(adapter, str(tiny_bert), tmp_path / "merged").config.pad_token_id == 60
    base = AutoModelForSequenceClassification.from_pretrained(tiny_bert)
    expected = peft.PeftModel.from_pretrained(base, adapter).eval()
    with torch.no_grad():
        assert (again(IDS).logits - expected(IDS).logits).abs().max() < 1e-5
    with pytest.raises(ConfigurationError, match=r"those of the adapter lora.from, \['a', 'b'\], got \['c'\]"):
        build(dynrank.compose([*rows_of("b", "c"), f"lora.from={tmp_path / 'run'}"]))
    plain = AutoModelForSequenceClassification.from_pretrained(tiny_bert)
    dynrank.save_adapter(updated(dynrank.add_lora(plain, rank=2)), tmp_path / "headless")
    with pytest.raises(ConfigurationError, match=r"'classifier\.weight' is trained by the task, .* no values"):
        build(dynrank.compose([*rows_of("a", "b"), f"lora.from={tmp_path / 'headless'}"]))


def test_classes_of_the_adapter_without_a_row_keep_their_places(rows_of, tmp_path):
    run(dynrank.compose([*rows_of("b", "10", "a", "9"), "optimizer.head_lr=0.1"]), tmp_path / "run")
    labels = json.loads((tmp_path / "run" / "adapter" / "labels.json").read_text())["labels"]
    stored = dynrank.read_adapter(tmp_path / "run" / "adapter")
    head = stored.tensor(stored.others["classifier.weight"])
    overrides = [*rows_of("a", "9"), f"lora.from={tmp_path / 'run'}"]
    job = build(dynrank.compose(overrides))
    assert job.task.labels == labels
    assert torch.equal(job.module.model.classifier.weight, head)


def test_a_head_whose_classes_nobody_names_is_refused_until_the_user_does(rows_of, tmp_path):
    """Sorted labels would be given rows of the head by chance: the order of its training is not known."""
    run(dynrank.compose(rows_of("0", "1")), tmp_path / "run")
    labels = tmp_path / "run" / "adapter" / "labels.json"
    labels.unlink()
    overrides = dynrank.compose([*rows_of("sports", "world"), f"lora.from={tmp_path / 'run'}"])
    with pytest.raises(ConfigurationError, match=r'no names of its classes.*labels.json.*\{"labels": \[...\]\}'):
        build(overrides)
    labels.write_text(json.dumps({"labels": ["world", "sports"]}))
    assert build(overrides).task.labels == ["world", "sports"]
