"""``dynrank plan``: the bytes counted without weights are those that real steps hold; its table and its errors."""

import json

import pytest
import torch
import transformers
from hydra.utils import instantiate
from storages import storages_of
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

import dynrank
from dynrank.app.commands import cli
from dynrank.app.models.names import shipped_configs
from dynrank.app.models.pretrained import read_config, storage_bytes, tensors_of
from dynrank.app.planner.plan import make_plan, show_plan
from dynrank.app.runs.config import plain
from dynrank.app.runs.job import lora_arguments
from dynrank.app.tasks.data import splits
from dynrank.app.tasks.data.source import read_source
from dynrank.app.tasks.optimizers import make_optimizer
from dynrank.driver.driver import RankDriver
from dynrank.errors import ConfigurationError
from dynrank.layers.finding import own_layers, parameter_count
from dynrank.schedules import early_budget
from dynrank.triggers import Run

SMALL = {"hidden_size": 64, "vocab_size": 200, "max_position_embeddings": 64}
HEADS = {"num_hidden_layers": 3, "num_attention_heads": 4}
LLAMA = {**SMALL, **HEADS, "intermediate_size": 96, "num_key_value_heads": 2}
TINY = {
    "llama": LLAMA,
    "bloom": {"hidden_size": 64, "vocab_size": 200, "n_layer": 3, "n_head": 4, "hidden_dropout": 0.1},
    "gpt2": {"n_embd": 64, "vocab_size": 200, "n_positions": 64, "n_layer": 3, "n_head": 4},
}
MOE = {
    "mixtral": {**LLAMA, "num_local_experts": 4},
    "gpt_oss": {**LLAMA, "num_local_experts": 4, "head_dim": 16},
}
CLASSES = {"gpt2": "GPT2LMHeadModel", "gpt_oss": "GptOssForCausalLM"}


def plan_of(*overrides):
    """The need at each rank."""
    return make_plan(dynrank.compose(overrides, "plan"))[1]


@pytest.fixture
def small(tmp_path):
    """Writes the config.json of a small model; returns the overrides of a plan for it at rank 4, and the model."""

    def write(kind="llama", dtype="float32", **changes):
        cls = CLASSES.get(kind, f"{kind.capitalize()}ForCausalLM")
        values = {"model_type": kind, "architectures": [cls], **{**TINY, **MOE}[kind], **changes}
        file = tmp_path / "config.json"
        file.write_text(json.dumps(values))
        batch = ["task.batch_size=3", "task.max_length=24", "ranks=[4]"]
        model = getattr(transformers, cls)._from_config(read_config(str(file)), dtype=getattr(torch, dtype)).train()
        model.config.use_cache = False
        return ["task=completion", f"task.model={file}", f"model.dtype={dtype}", *batch], model

    return write


def held(tensors):
    """Bytes of the storages behind ``tensors``."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def real_step(model, make_loss, batch, optimizer="adamw"):
    """(weights, adapter, optimizer state, gradients, activations) of a step, in bytes."""
    saved = []
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers(), *batch]}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            saved.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = make_loss()
    activations = held(saved)
    saved.clear()
    loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    factors = {id(p) for layer in own_layers(model).values() for p in (layer.lora_A, layer.lora_B)}
    made = make_optimizer(
        [p for p in trained if id(p) in factors],
        [p for p in trained if id(p) not in factors],
        10,
        **plain(dynrank.compose([f"optimizer={optimizer}"]).optimizer),
    )["optimizer"]
    made.step()
    state = held(t for s in made.state.values() for t in s.values() if isinstance(t, torch.Tensor))
    gradients = held(p.grad for p in trained if p.grad is not None)
    frozen = [p for p in model.parameters() if not p.requires_grad]
    return held([*frozen, *model.buffers()]), held(trained), state, gradients, activations


def counted(need):
    return need.weights, need.adapter, need.optimizer, need.gradients, need.activations


@pytest.mark.parametrize(
    ("kind", "dtype", "checkpointing"),
    [
        *((kind, "bfloat16", False) for kind in TINY),
        ("llama", "bfloat16", True),
        *((kind, "float32", False) for kind in MOE),
    ],
)
def test_counted_bytes_are_those_of_a_real_step(kind, dtype, checkpointing, small):
    options, model = small(kind, dtype)
    (need,) = plan_of(*options, f"model.gradient_checkpointing={checkpointing}")
    dynrank.add_lora(model, rank=4)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(200, (3, 24))
    real = real_step(model, lambda: model(input_ids=ids, labels=ids).loss, [ids])
    # without values there are no ends of the experts' rows: 4 bytes for each expert
    assert counted(need) == (pytest.approx(real, rel=1e-4) if kind in MOE else real)


def test_peak_of_a_step_is_that_of_torchs_own_allocator(small):
    options, model = small(vocab_size=3000)
    (need,) = plan_of(*options)
    dynrank.add_lora(model, rank=4)
    ids = torch.randint(3000, (3, 24))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model(input_ids=ids, labels=ids).loss.backward()
    now = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    lasting = need.weights + need.adapter + need.optimizer + need.importance
    assert need.total - lasting == pytest.approx(peak, rel=0.05)


@pytest.mark.parametrize(("schedule", "precision"), [("early_budget", "32"), ("auto", "bf16-true"), ("fixed", "32")])
def test_importance_counts_as_many_bytes_as_a_run_holds_after_real_steps(schedule, precision, small):
    """They count only where the schedule shares ranks by importance."""
    options, model = small("llama", "bfloat16" if precision == "bf16-true" else "float32")
    (need,) = plan_of(*options, f"schedule={schedule}", f"trainer.precision={precision}")
    dynrank.add_lora(model, rank=4, dtype=model.dtype)
    optimizer = torch.optim.SGD(dynrank.adapter_parameters(model), lr=0.1)
    training = dynrank.Training(model, [optimizer])
    driver = RankDriver(early_budget(2, at=0.9) if schedule != "fixed" else [])
    driver.start(training, Run(10))
    batch = torch.zeros(3, 24, dtype=torch.long)
    for _ in range(3):
        driver.advance(training)
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        training.step += 1
        driver.end_step(training)
        optimizer.zero_grad()
    real = sum(storages_of(driver, ["_layers", "_factors", "_rates", "_steps"]).values())
    # A few numbers for each layer and each factor.
    assert real - need.importance == (
        0 if schedule == "fixed" else pytest.approx(0, abs=8 * 12 * len(own_layers(model)))
    )
    assert (need.importance > 0) is (schedule != "fixed")


def test_tables_that_an_8_bit_optimizer_shares_count_for_each_parameter(small):
    # Only factors above 4,096 numbers have states of 8 bits.
    options, model = small(intermediate_size=2048)
    (need,) = plan_of(*options, "optimizer=adamw8bit")
    dynrank.add_lora(model, rank=4)
    ids = torch.randint(200, (3, 24))
    real = real_step(model, lambda: model(input_ids=ids, labels=ids).loss, [ids], "adamw8bit")
    factors = len([p for p in model.parameters() if p.requires_grad])
    # Two tables of 256 numbers in float32.
    assert real[2] < need.optimizer <= real[2] + 2 * 4 * 256 * factors


CHECKPOINTING = "model.gradient_checkpointing=true"
# Each has a task, keys of the model, and an optimizer.
MODES = {
    "as they are": ("completion", [], "adamw"),
    "nf4": ("classification", ["model.quantization=nf4"], "adamw"),
    "nf4, checkpoints": ("completion", ["model.quantization=nf4", "model.dtype=bfloat16", CHECKPOINTING], "adafactor"),
    "int8": ("completion", ["model.quantization=int8"], "adamw"),
    "eager, bfloat16": ("classification", ["model.attention=eager", "model.dtype=bfloat16"], "sgd"),
}


@pytest.mark.parametrize("mode", MODES)
def test_plan_and_training_hold_the_same_bytes_by_the_keys_of_model(mode, tiny_bert, tiny_llama, tmp_path):
    """The weights are those that transformers and bitsandbytes have packed, and the step is a real one."""
    task, keys, optimizer = MODES[mode]
    # A row of a prompt, and one of a text with its class.
    rows = [{"prompt": f"p {i}", "answer": "a", "text": f"text {i}", "label": "abc"[i % 3]} for i in range(90)]
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(rows))
    model = tiny_llama if task == "completion" else tiny_bert
    options = [f"task={task}", f"task.model={model}", f"data.train={file}", "lora.rank=4", *keys]
    options.append(f"optimizer={optimizer}")
    need = plan_of(*options, "ranks=[4]", "task.batch_size=8", "task.max_length=32")[0]
    config = dynrank.compose(options)
    module = instantiate(config.task, _convert_="all").module(lora_arguments(config, None), plain(config.optimizer))
    assert {layer.lora_A.dtype for layer in own_layers(module.model).values()} == {torch.float32}
    ids = torch.randint(600, (8, 32))
    labels = ids if task == "completion" else torch.zeros(8, dtype=torch.long)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    module.log = lambda *_, **__: None
    weights = storage_bytes(tensors_of(module.model)) - need.adapter
    real = real_step(module.model, lambda: module.training_step(batch, 0), batch.values(), optimizer)
    assert need.weights == weights
    # Of weights in four bits, two are in a byte.
    plain_base = [key for key in options if not key.startswith("model.quantization")]
    assert need.of == plan_of(*plain_base, "ranks=[4]", "task.batch_size=8", "task.max_length=32")[0].of
    assert parameter_count(module.model.parameters()) == need.of + need.parameters
    assert counted(need)[1:4] == real[1:4]
    # The loss is of 31 tokens here and of 32 in the plan.
    assert need.activations == pytest.approx(real[4], rel=0.04)


def test_precision_of_the_trainer_counts(small):
    options, _ = small()
    # By the op: plain operations, which small batches take, save inputs in the dtype of the factors.
    options = [*options, "lora.backend=torch"]
    precisions = ("32-true", "bf16-true", "bf16-mixed")
    full, pure, mixed = (plan_of(*options, f"trainer.precision={name}")[0] for name in precisions)
    for need, share in ((pure, 0.5), (mixed, 1)):
        assert need.adapter == share * full.adapter
        assert need.weights == pytest.approx(share * full.weights, rel=0.01)
        assert need.activations < 0.8 * full.activations


PUBLISHED = {
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3.1-8b": 8_030_261_248,
    "mistral-7b-v0.1": 7_241_732_096,
    "qwen2.5-7b": 7_615_616_512,
    "bloom-7b1": 7_069_016_064,
    "smollm2-135m": 134_515_008,
    "minilm-l6": 22_713_216,
}


def test_shipped_configs_have_the_published_number_of_parameters():
    configs = {name: read_config(name) for name in shipped_configs()}
    with torch.device("meta"):
        made = {name: getattr(transformers, config.architectures[0])(config) for name, config in configs.items()}
    assert {name: model.num_parameters() for name, model in made.items()} == PUBLISHED


def test_a_run_on_a_gpu_is_planned_without_one(small):
    options, _ = small()
    assert plan_of(*options, "lora.backend=triton") == plan_of(*options)


def test_a_rank_map_holds_in_every_row(small, tmp_path, capsys):
    options, _ = small()
    (tmp_path / "ranks.yaml").write_text("rank_pattern: {q_proj: 2, 'layers\\.0\\..*up_proj': 16}")
    options += [f"rank_map.file={tmp_path / 'ranks.yaml'}", "lora.target_modules=[q_proj,up_proj]"]
    plan = plan_of(*options, "ranks=[4,8]")
    assert [need.parameters for need in plan] == [
        3 * 2 * (64 + 64) + 16 * (64 + 96) + 2 * rank * (64 + 96) for rank in (4, 8)
    ]
    assert {need.ranks for need in plan} == {(2, 16)}
    show_plan(dynrank.compose(options, "plan"))
    assert "4 (2-16)" in capsys.readouterr().out


def test_data_are_read_once_for_all_ranks(tiny_bert, tmp_path, monkeypatch):
    (tmp_path / "rows.csv").write_text("\n".join(["text,label", *(f"text {i},{i % 3}" for i in range(60))]))
    data = ["task=classification", f"task.model={tiny_bert}", f"data.train={tmp_path / 'rows.csv'}"]
    read = []
    monkeypatch.setattr(splits, "read_source", lambda name, *rest: read.append(name) or read_source(name, *rest))
    show_plan(dynrank.compose([*data, "ranks=[2,4]"], "plan"))
    assert read == [str(tmp_path / "rows.csv")]


def test_the_table_adds_up_and_says_what_fits_the_budget(small, capsys):
    options = [*small()[0], "ranks=[8,4]"]
    totals = {need.rank: need.total for need in plan_of(*options)}
    for budget, said in (
        ("1.5GB", "1,430.5 MiB: rank 8 is the highest of these that fits"),
        (f"{totals[8] - 1}B", "rank 4 is the highest of these that fits"),
        (f"{totals[4] - 1}B", "none of these fits; rank 4 lacks 0.0 MiB"),
    ):
        show_plan(dynrank.compose([*options, f"budget={budget}"], "plan"))
        out = capsys.readouterr().out
        assert said in out
    rows = [line.split("│")[4:12] for line in out.splitlines() if line.startswith("│")]
    assert len(rows) == 2
    for row in rows:
        *held, gradients, logits, total = map(float, row)
        # Each number is rounded to a tenth.
        assert sum(held) + max(gradients, logits) == pytest.approx(total, abs=0.3)


def test_a_plan_needs_no_data_and_takes_groups_of_ones_own(tiny_bert, tmp_path, launch):
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "mine.yaml").write_text(
        f"defaults: [classification, _self_]\nmodel: {tiny_bert}\nmax_length: 9\n"
    )
    code, printed, said = launch(cli.main, "plan", "task=mine", "--config-dir", tmp_path, "ranks=[4]")
    assert (code, "32 x 9 tokens" in printed) == (0, True), said
    assert "a head of two classes: data.train is not set" in printed
    code, printed, said = launch(cli.main, "ranks", "task=mine", "--config-dir", tmp_path, "lora.rank=4")
    assert (code, printed.count("│ bert."), "13 layers" in printed) == (0, 13, True), said


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["budget=lots"], ["budget", "'lots'"]),
        (["ranks=[]"], ["ranks", "[]"]),
        (["trainer.precision=64-true"], ["trainer.precision", "64-true"]),
        (["optimizer.name=LBFGS"], ["optimizer", "LBFGS"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_what_cannot_be_used_is_named(small, overrides, words):
    options, _ = small()
    with pytest.raises(ConfigurationError) as caught:
        plan_of(*options, *overrides)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    # No key has a name that begins so.
    assert "plan." not in str(caught.value)


@pytest.mark.parametrize("content", ["", "{}", '{"model_type": "llama", "hidden_size": "wide"}'])
def test_a_file_that_is_no_config_is_refused(content, tmp_path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigurationError, match=f"task.model={tmp_path}"):
        plan_of("task=completion", f"task.model={tmp_path}")
