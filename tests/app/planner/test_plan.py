"""``dynrank plan``: the bytes counted without weights are those that real steps hold; its table and its errors."""

import json

import pytest
import torch
import transformers
from hydra.utils import instantiate
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

import dynrank
from dynrank.app.commands import cli
from dynrank.app.models.names import shipped_configs
from dynrank.app.models.pretrained import read_config
from dynrank.app.planner.plan import make_plan, show_plan
from dynrank.app.runs.config import plain
from dynrank.app.runs.job import lora_arguments
from dynrank.app.tasks.optimizers import make_optimizer
from dynrank.errors import ConfigurationError
from dynrank.importance.importance import bytes_held
from dynrank.layers.finding import parameter_count

LLAMA = {"hidden_size": 64, "vocab_size": 200, "max_position_embeddings": 64, "num_hidden_layers": 3}
LLAMA |= {"num_attention_heads": 4, "intermediate_size": 96, "num_key_value_heads": 2}
TINY = {
    "llama": LLAMA,
    "bloom": {"hidden_size": 64, "vocab_size": 200, "n_layer": 3, "n_head": 4, "hidden_dropout": 0.1},
    "gpt2": {"n_embd": 64, "vocab_size": 200, "n_positions": 64, "n_layer": 3, "n_head": 4},
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
        file = tmp_path / "config.json"
        file.write_text(json.dumps({"model_type": kind, "architectures": [cls], **TINY[kind], **changes}))
        batch = ["task.batch_size=3", "task.max_length=24", "ranks=[4]"]
        model = getattr(transformers, cls)._from_config(read_config(str(file)), dtype=getattr(torch, dtype)).train()
        model.config.use_cache = False
        return ["task=completion", f"task.model={file}", f"model.dtype={dtype}", *batch], model

    return write


def held(tensors):
    """Bytes of the storages behind ``tensors``."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def real_step(model, make_loss, batch, optimizer):
    """{part: bytes} of a step; of weights that are packed, with the scales and tables beside them."""
    saved = []
    trained = [p for p in model.parameters() if p.requires_grad]
    frozen = [p for p in model.parameters() if not p.requires_grad] + [*model.buffers()]
    states = [getattr(p, "quant_state", None) for p in frozen]
    owners = [*frozen, *states, *(getattr(state, "state2", None) for state in states)]
    beside = [getattr(owner, name, None) for owner in owners for name in ("CB", "SCB", "absmax", "code", "offset")]
    weights = held([*frozen, *(table for table in beside if table is not None)])
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
    made = make_optimizer(trained, [], 10, **optimizer)["optimizer"]
    made.step()
    return {
        "weights": weights,
        "adapter": held(trained),
        "activations": activations,
        "gradients": held(p.grad for p in trained if p.grad is not None),
        "optimizer": held(t for s in made.state.values() for t in s.values() if isinstance(t, torch.Tensor)),
    }


@pytest.mark.parametrize("kind", TINY)
def test_counted_bytes_are_those_of_a_real_step(kind, small):
    experts = "num_local_experts" in TINY[kind]
    options, model = small(kind, "float32" if experts else "bfloat16")
    (need,) = plan_of(*options)
    dynrank.add_lora(model, rank=4)
    ids = torch.randint(200, (3, 24))
    real = real_step(model, lambda: model(input_ids=ids, labels=ids).loss, [ids], {})
    # Without values there are no ends of the experts' rows: 4 bytes for each expert.
    assert {part: need.bytes[part] for part in real} == pytest.approx(real, rel=1e-4 if experts else 0)
    assert need.bytes["importance"] == bytes_held(dynrank.adapter_parameters(model))


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
    lasting = sum(need.bytes[part] for part in ("weights", "adapter", "optimizer", "importance"))
    assert need.total - lasting == pytest.approx(peak, rel=0.05)


@pytest.mark.parametrize(
    "keys",
    [
        "task=classification model.quantization=nf4",
        "task=completion model.quantization=nf4 model.dtype=bfloat16 model.gradient_checkpointing=true "
        "optimizer=adafactor",
        "task=completion model.quantization=int8 optimizer=adamw8bit",
        "task=classification model.attention=eager model.dtype=bfloat16 optimizer=sgd",
    ],
)
def test_plan_and_training_hold_the_same_bytes_by_the_keys_of_model(keys, tiny_bert, tiny_llama, tmp_path):
    """The weights are those that transformers and bitsandbytes have packed, and the step is a real one."""
    completes = "task=completion" in keys
    # A row of a prompt, and one of a text with its class.
    rows = [{"prompt": f"p {i}", "answer": "a", "text": f"text {i}", "label": "abc"[i % 3]} for i in range(90)]
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(rows))
    options = [*keys.split(), f"task.model={tiny_llama if completes else tiny_bert}", f"data.train={file}"]
    (need,) = plan_of(*options, "ranks=[4]", "task.batch_size=8", "task.max_length=32")
    config = dynrank.compose([*options, "lora.rank=4"])
    module = instantiate(config.task, _convert_="all").module(lora_arguments(config, None), plain(config.optimizer))
    ids = torch.randint(600, (8, 32))
    labels = ids if completes else torch.zeros(8, dtype=torch.long)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    module.log = lambda *_, **__: None
    assert parameter_count(module.model.parameters()) == need.of + need.parameters
    real = real_step(module.model, lambda: module.training_step(batch, 0), batch.values(), plain(config.optimizer))
    # The loss is of 31 tokens here and of 32 in the plan.
    assert need.bytes["activations"] == pytest.approx(real.pop("activations"), rel=0.04)
    assert {part: need.bytes[part] for part in real} == real


def test_precision_of_the_trainer_counts(small):
    options, _ = small()
    # By the op: plain operations, which small batches take, save inputs in the dtype of the factors.
    options = [*options, "lora.backend=torch"]
    precisions = ("32-true", "bf16-true", "bf16-mixed")
    full, pure, mixed = (plan_of(*options, f"trainer.precision={name}")[0].bytes for name in precisions)
    for part in ("weights", "adapter"):
        assert (pure[part], mixed[part]) == (full[part] / 2, full[part])
    for half in (pure, mixed):
        assert half["activations"] < 0.8 * full["activations"]


@pytest.mark.parametrize(("names", "parameters"), [("[q_proj]", 2_097_152), ("[q_proj,v_proj]", 4_194_304)])
def test_founding_case_of_a_llama_of_7b(names, parameters):
    model = ["task=completion", "task.model=llama-2-7b", "model.quantization=nf4", f"lora.target_modules={names}"]
    (need,) = plan_of(*model, "ranks=[8]", "task.batch_size=1", "task.max_length=8")
    assert (need.parameters, need.of) == (parameters, PUBLISHED["llama-2-7b"])


PUBLISHED = {"llama-2-7b": 6_738_415_616, "llama-2-13b": 13_015_864_320, "llama-2-70b": 68_976_648_192}
PUBLISHED |= {"llama-3.1-8b": 8_030_261_248, "mistral-7b-v0.1": 7_241_732_096, "qwen2.5-7b": 7_615_616_512}
PUBLISHED |= {"bloom-7b1": 7_069_016_064, "smollm2-135m": 134_515_008, "minilm-l6": 22_713_216}


def test_shipped_configs_have_the_published_number_of_parameters():
    configs = {name: read_config(name) for name in shipped_configs()}
    with torch.device("meta"):
        made = {name: getattr(transformers, config.architectures[0])(config) for name, config in configs.items()}
    assert {name: model.num_parameters() for name, model in made.items()} == PUBLISHED


def test_rules_a_schedule_without_importance_and_the_backend_of_a_gpu_are_planned(small, tmp_path, capsys):
    (tmp_path / "ranks.yaml").write_text("rank_pattern: {q_proj: 2, 'layers\\.0\\..*up_proj': 16}")
    options = [*small()[0], f"rank_map.file={tmp_path / 'ranks.yaml'}", "lora.target_modules=[q_proj,up_proj]"]
    options += ["ranks=[8,4]", "schedule=fixed"]
    plan = plan_of(*options)
    expected = [3 * 2 * (64 + 64) + 16 * (64 + 96) + 2 * rank * (64 + 96) for rank in (4, 8)]
    assert [need.parameters for need in plan] == expected
    assert {need.bytes["importance"] for need in plan} == {0}
    show_plan(dynrank.compose(options, "plan"))
    assert "4 (2-16)" in capsys.readouterr().out
    assert plan_of(*options, "lora.backend=triton") == plan_of(*options, "lora.backend=torch")


def test_the_table_says_what_fits_the_budget(small, capsys):
    options = [*small()[0], "ranks=[8,4]"]
    four, eight = (need.total for need in plan_of(*options))
    for budget, fit, said in (
        ("1.5GB", ["yes", "yes"], "1,430.5 MiB: rank 8 is the highest of these that fits"),
        (f"{eight - 1}B", ["yes", "no"], "rank 4 is the highest of these that fits"),
        (f"{four - 1}B", ["no", "no"], "none of these fits; rank 4 lacks 0.0 MiB"),
    ):
        show_plan(dynrank.compose([*options, f"budget={budget}"], "plan"))
        out = capsys.readouterr().out
        assert said in out
        rows = [line.strip("│ ").split() for line in out.splitlines() if line.startswith("│")]
        assert [row[-1] for row in rows] == fit
        assert [row[-3] for row in rows] == [f"{total / 2**20:,.1f}" for total in (four, eight)]


def test_a_plan_needs_no_data_and_takes_groups_of_ones_own(tiny_bert, tmp_path, launch):
    (tmp_path / "task").mkdir()
    mine = f"defaults: [classification, _self_]\nmodel: {tiny_bert}\nmax_length: 9\n"
    (tmp_path / "task" / "mine.yaml").write_text(mine)
    code, printed, said = launch(cli.main, "plan", "task=mine", "--config-dir", tmp_path, "ranks=[4]")
    assert (code, "32 x 9 tokens" in printed) == (0, True), said
    assert "a head of two classes: data.train is not set" in printed


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["budget=lots"], ["budget", "'lots'"]),
        (["ranks=[]"], ["ranks", "[]"]),
        (["trainer.precision=64-true"], ["trainer.precision", "64-true"]),
    ],
)
def test_what_cannot_be_used_is_named(small, overrides, words):
    options, _ = small()
    with pytest.raises(ConfigurationError) as caught:
        plan_of(*options, *overrides)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize("content", ["", "{}", '{"model_type": "llama", "hidden_size": "wide"}'])
def test_a_file_that_is_no_config_is_refused(content, tmp_path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigurationError, match=f"task.model={tmp_path}"):
        plan_of("task=completion", f"task.model={tmp_path}")
