"""``dynrank plan``: the bytes counted without weights are those that real steps hold; its table and its errors."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from hydra.utils import instantiate
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

import dynrank
from dynrank.commands import cli
from dynrank.errors import ConfigurationError
from dynrank.layers.finding import own_layers
from dynrank.models.names import shipped_configs
from dynrank.models.pretrained import read_config, storage_bytes, tensors_of
from dynrank.planner.plan import make_plan, show_plan
from dynrank.runs.config import plain
from dynrank.runs.job import lora_arguments
from dynrank.tasks.optimizers import make_optimizer

SMALL = {"hidden_size": 64, "vocab_size": 200, "max_position_embeddings": 64}
HEADS = {"num_hidden_layers": 3, "num_attention_heads": 4}
LLAMA = {**SMALL, **HEADS, "intermediate_size": 96, "num_key_value_heads": 2}
TINY = {
    "llama": LLAMA,
    "mistral": {**LLAMA, "sliding_window": 16},
    "bloom": {"hidden_size": 64, "vocab_size": 200, "n_layer": 3, "n_head": 4, "hidden_dropout": 0.1},
    "gpt2": {"n_embd": 64, "vocab_size": 200, "n_positions": 64, "n_layer": 3, "n_head": 4},
}
MOE = {
    "mixtral": {**LLAMA, "num_local_experts": 4},
    "qwen3_moe": {**LLAMA, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "head_dim": 16},
    "gpt_oss": {**LLAMA, "num_local_experts": 4, "head_dim": 16},
}
CLASSES = {"gpt2": "GPT2LMHeadModel", "qwen3_moe": "Qwen3MoeForCausalLM", "gpt_oss": "GptOssForCausalLM"}


def plan_of(*overrides):
    """The need at each rank."""
    return make_plan(dynrank.compose(overrides, "plan"))[1]


def batch_of(file, rows, length):
    """The overrides that name a model by its config.json, and a batch."""
    return ["task=completion", f"task.model={file}", f"task.batch_size={rows}", f"task.max_length={length}"]


@pytest.fixture
def config_file(tmp_path):
    """Writes the config.json of a small model; returns its path and the class of the model."""

    def write(kind, **changes):
        cls = CLASSES.get(kind, f"{kind.capitalize()}ForCausalLM")
        values = {"model_type": kind, "architectures": [cls], **{**TINY, **MOE}[kind], **changes}
        file = tmp_path / "config.json"
        file.write_text(json.dumps(values))
        return file, getattr(transformers, cls)

    return write


def real_model(cls, file, dtype=torch.float32):
    model = cls._from_config(read_config(str(file)), dtype=dtype).train()
    model.config.use_cache = False
    return model


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
    if hasattr(made, "train"):
        made.train()
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
        *((kind, "float32", False) for kind in ("llama", *MOE)),
    ],
)
def test_counted_bytes_are_those_of_a_real_step(kind, dtype, checkpointing, config_file):
    file, cls = config_file(kind)
    options = [*batch_of(file, 3, 24), f"model.dtype={dtype}", "ranks=[4]"]
    (need,) = plan_of(*options, f"model.gradient_checkpointing={checkpointing}")
    model = real_model(cls, file, getattr(torch, dtype))
    dynrank.add_lora(model, rank=4)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(200, (3, 24))
    real = real_step(model, lambda: model(input_ids=ids, labels=ids).loss, [ids])
    # without values there are no ends of the experts' rows: 4 bytes for each expert
    assert counted(need) == (pytest.approx(real, rel=1e-4) if kind in MOE else real)


def test_peak_of_a_step_is_that_of_torchs_own_allocator(config_file):
    file, cls = config_file("llama", vocab_size=3000)
    (need,) = plan_of(*batch_of(file, 3, 24), "ranks=[4]")
    model = dynrank.add_lora(real_model(cls, file), rank=4)
    ids = torch.randint(3000, (3, 24))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model(input_ids=ids, labels=ids).loss.backward()
    now = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    assert need.total - need.weights - need.adapter - need.optimizer == pytest.approx(peak, rel=0.05)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "adafactor", "muon", "sgd"])
def test_optimizer_state_is_that_of_a_real_step(optimizer, config_file):
    # Only factors above 4,096 numbers have states of 8 bits.
    file, cls = config_file("llama", intermediate_size=2048)
    need = plan_of(*batch_of(file, 1, 8), f"optimizer={optimizer}", "ranks=[8]")[0]
    model = dynrank.add_lora(real_model(cls, file), rank=8)
    ids = torch.randint(200, (1, 8))
    real = real_step(model, lambda: model(input_ids=ids, labels=ids).loss, [ids], optimizer)
    factors = len([p for p in model.parameters() if p.requires_grad])
    # Two tables of 256 numbers in float32, which the parameters share, count for each.
    tables = 2 * 4 * 256 * factors if optimizer == "adamw8bit" else 0
    assert real[2] <= need.optimizer <= real[2] + tables


CHECKPOINTING = "model.gradient_checkpointing=true"
# Each has a task, and keys of the model.
MODES = {
    "as they are": ("completion", []),
    "nf4": ("classification", ["model.quantization=nf4"]),
    "nf4, bfloat16, checkpoints": ("completion", ["model.quantization=nf4", "model.dtype=bfloat16", CHECKPOINTING]),
    "int8": ("completion", ["model.quantization=int8"]),
    "eager, bfloat16": ("classification", ["model.attention=eager", "model.dtype=bfloat16"]),
}


@pytest.mark.parametrize("mode", MODES)
def test_plan_and_training_hold_the_same_bytes_by_the_keys_of_model(mode, tiny_bert, tiny_llama, tmp_path):
    """The weights are those that transformers and bitsandbytes have packed, and the step is a real one."""
    task, keys = MODES[mode]
    rows = {"text": [f"text {i}" for i in range(90)], "label": ["a", "b", "c"] * 30}
    names = {"text": "prompt", "label": "answer"} if task == "completion" else {}
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([{names.get(k, k): v[i] for k, v in rows.items()} for i in range(90)]))
    model = tiny_llama if task == "completion" else tiny_bert
    options = [f"task={task}", f"task.model={model}", f"data.train={file}", "lora.rank=4", *keys]
    need = plan_of(*options, "ranks=[4]", "task.batch_size=8", "task.max_length=32")[0]
    config = dynrank.compose(options)
    module = instantiate(config.task, _convert_="all").module(lora_arguments(config), plain(config.optimizer))
    assert {layer.lora_A.dtype for layer in own_layers(module.model).values()} == {torch.float32}
    ids = torch.randint(600, (8, 32))
    labels = ids if task == "completion" else torch.zeros(8, dtype=torch.long)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    module.log = lambda *_, **__: None
    weights = storage_bytes(tensors_of(module.model)) - need.adapter
    real = real_step(module.model, lambda: module.training_step(batch, 0), batch.values())
    assert need.weights == weights
    assert counted(need)[1:4] == real[1:4]
    # The loss is of 31 tokens here and of 32 in the plan.
    assert need.activations == pytest.approx(real[4], rel=0.04)


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_precision_of_the_trainer_counts(precision, tiny_bert):
    options = [f"task.model={tiny_bert}", "task.batch_size=4", "ranks=[4]"]
    need, full = (plan_of(*options, f"trainer.precision={p}")[0] for p in (precision, "32-true"))
    share = 0.5 if precision == "bf16-true" else 1
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


def test_experts_without_lora_are_counted_too(config_file):
    file, _ = config_file("mixtral")
    options = [*batch_of(file, 3, 24), "model.dtype=float32", "ranks=[4]"]
    (need,), (all_linear,) = (plan_of(*options, *more) for more in (["lora.target_modules=attention"], []))
    assert 0 < need.activations < all_linear.activations


def test_shipped_configs_have_the_published_number_of_parameters():
    configs = {name: read_config(name) for name in shipped_configs()}
    with torch.device("meta"):
        made = {name: getattr(transformers, config.architectures[0])(config) for name, config in configs.items()}
    assert {name: model.num_parameters() for name, model in made.items()} == PUBLISHED


@pytest.mark.parametrize("kind", ["bloom-7b1", "qwen2.5-7b"])
def test_shipped_configs_can_be_run(kind, tmp_path):
    shipped = Path(dynrank.__file__).parent / "models" / f"{kind}.json"
    values = json.loads(shipped.read_text())
    values["n_layer" if "n_layer" in values else "num_hidden_layers"] = 1
    (tmp_path / "config.json").write_text(json.dumps(values))
    options = [*batch_of(tmp_path, 1, 8), "ranks=[4]"]
    keeping, again = (plan_of(*options, f"model.gradient_checkpointing={on}")[0] for on in (False, True))
    assert again.activations < keeping.activations


def test_a_run_on_a_gpu_is_planned_without_one(config_file):
    file, _ = config_file("llama")
    options = [*batch_of(file, 8, 8), "ranks=[4]"]
    (there,), (here,) = (plan_of(*options, *backend) for backend in (["lora.backend=triton"], []))
    assert there == here


def test_a_rank_map_holds_in_every_row(config_file, capsys):
    file, _ = config_file("llama")
    (file.parent / "ranks.yaml").write_text("rank_pattern: {q_proj: 2, 'layers\\.0\\..*up_proj': 16}")
    rules = f"rank_map.file={file.parent / 'ranks.yaml'}"
    plan = plan_of(*batch_of(file, 8, 8), rules, "ranks=[4,8]", "lora.target_modules=[q_proj,up_proj]")
    assert [need.parameters for need in plan] == [
        3 * 2 * (64 + 64) + 16 * (64 + 96) + 2 * rank * (64 + 96) for rank in (4, 8)
    ]
    assert {need.ranks for need in plan} == {(2, 16)}
    show_plan(dynrank.compose([*batch_of(file, 8, 8), rules, "ranks=[4]"], "plan"))
    assert "4 (2-16)" in capsys.readouterr().out


def test_a_head_tied_to_the_embedding_is_held_once(config_file):
    file, _ = config_file("bloom")
    options = [*batch_of(file, 8, 8), "ranks=[4]"]
    with_head = plan_of(*options, "lora.target_modules=[lm_head,query_key_value]")[0]
    without = plan_of(*options, "lora.target_modules=[query_key_value]")[0]
    assert with_head.weights == without.weights
    assert with_head.parameters - without.parameters == 4 * (64 + 200)


@pytest.mark.parametrize(("text", "size"), [("24GiB", 24 * 2**30), ("1.5GB", 1_500_000_000)])
def test_a_budget_is_a_size_with_its_unit(text, size, config_file, capsys):
    file, _ = config_file("llama")
    show_plan(dynrank.compose([*batch_of(file, 8, 8), "ranks=[4]", f"budget={text}"], "plan"))
    assert f"budget           {size / 2**20:,.1f} MiB: " in capsys.readouterr().out


@pytest.fixture
def tiny(config_file):
    """The overrides that name the config.json of a small model."""
    return batch_of(config_file("llama")[0], 2, 8)


def test_parts_add_up_to_the_total_in_the_table(tiny, capsys):
    show_plan(dynrank.compose([*tiny, "ranks=[4]", "budget=1MiB"], "plan"))
    out = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in out.splitlines() if line.startswith("│")]
    ((*_, fits),) = rows
    *held, gradients, logits, total = map(float, rows[0][3:10])
    # Each number is rounded to a tenth.
    assert sum(held) + max(gradients, logits) == pytest.approx(total, abs=0.3)
    assert fits in ("yes", "no")


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


def test_budget_names_the_highest_rank_that_fits_or_the_lacking_bytes(tiny, capsys):
    options = [*tiny, "ranks=[16,4,8]"]
    totals = {need.rank: need.total for need in plan_of(*options)}
    for budget, said in (
        (totals[8], "rank 8 is the highest of these that fits"),
        (totals[8] - 1, "rank 4 is the highest of these that fits"),
        (totals[4] - 1, "none of these fits; rank 4 lacks 0.0 MiB"),
    ):
        show_plan(dynrank.compose([*options, f"budget={budget}B"], "plan"))
        assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["budget=lots"], ["budget", "'lots'", "24GiB"]),
        (["ranks=[]"], ["ranks", "[]"]),
        (["ranks=[4,65]", "lora.target_modules=[q_proj]"], ["min(d_in, d_out) = 64", "got 65"]),
        (["task.model=lama-2-7b"], ["task.model", "'lama-2-7b'", "llama-2-7b"]),
        (["task.max_length=0"], ["task.max_length", "got 0"]),
        (["trainer.precision=64-true"], ["trainer.precision", "64-true"]),
        (["optimizer.name=LBFGS"], ["optimizer", "LBFGS"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_what_cannot_be_used_is_named(tiny, overrides, words):
    with pytest.raises(ConfigurationError) as caught:
        make_plan(dynrank.compose([*tiny, "ranks=[4]", *overrides], "plan"))
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize("content", ["", "{}", '{"model_type": "llama", "hidden_size": "wide"}'])
def test_a_file_that_is_no_config_is_refused(content, tmp_path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigurationError, match=f"task.model={tmp_path}"):
        make_plan(dynrank.compose(["task=completion", f"task.model={tmp_path}"], "plan"))
