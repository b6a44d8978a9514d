"""Damaged adapters, by hypothesis: refused in one line or used; never half loaded, no traceback, nothing executed."""

import copy
import io
import json
import shutil
from contextlib import redirect_stderr

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

import dynrank
from dynrank.commands import cli
from dynrank.errors import ConfigurationError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
IDS = torch.tensor([[3, 1, 4, 1, 5]])
examples = settings(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """(plain model, its folder, folder of a whole adapter with mixed ranks and a head, folder to work in)."""
    folder = tmp_path_factory.mktemp("damaged")
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=20, **sizes)).eval()
    model.save_pretrained(folder / "model")
    options = {
        "target_modules": ["q_proj", "up_proj", "embed_tokens"],
        "rank_map": {"up_proj": {"rank": 3, "alpha": 7}},
    }
    adapted = dynrank.add_lora(copy.deepcopy(model), rank=2, modules_to_save=["lm_head"], **options)
    torch.manual_seed(1)
    with torch.no_grad():
        for _, layer in dynrank.lora_layers(adapted):
            layer.lora_B.normal_()
    dynrank.save_adapter(adapted, folder / "adapter")
    return model, folder / "model", folder / "adapter", folder


# --- mutations: each takes a folder with a whole adapter and damages it


def in_bytes(draw, folder):
    file = folder / draw(st.sampled_from([CONFIG, WEIGHTS]))
    content = bytearray(file.read_bytes())
    for _ in range(draw(st.integers(0, 3))):
        # half of them among the first, where a safetensors file has its header
        at = draw(st.integers(0, len(content) - 1) | st.integers(0, min(600, len(content) - 1)))
        content[at] ^= draw(st.integers(1, 255))
    length = draw(st.just(len(content)) | st.integers(0, len(content)))
    file.write_bytes(bytes(content[:length]) + draw(st.sampled_from([b"", b"\0", b"{}", b"more"])))


SIZES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F4": 1, "F6_E2M3": 1, "F99": 1}
SIZES |= {"I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8, "C64": 8}


def in_tensors(draw, folder):
    """Header and numbers of the safetensors file, as a careless or malicious program might write them."""
    content = (folder / WEIGHTS).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, numbers = json.loads(content[8 : 8 + length]), bytearray(content[8 + length :])
    key = draw(st.sampled_from(sorted(set(header) - {"__metadata__"})))
    kind = draw(st.sampled_from(["drop", "rename", "shape", "dtype", "offsets", "not finite", "entry", "metadata"]))
    entry = header[key]
    if kind == "drop":
        del header[key]
    elif kind == "rename":
        names = ["", "x", "base_model.model.", "base_model.model.lm_head.lora_A.weight", key + ".lora_A.weight"]
        names += [key.replace("A", "B"), key.replace(".weight", ""), key.replace("layers.0", "layers.9")]
        header[draw(st.sampled_from(names))] = header.pop(key)
    elif kind == "shape":
        shape = entry["shape"]
        odd = [shape[::-1], [], [0], [1, *shape], [*shape, 1], [2**40, 0], [-1]]
        entry["shape"] = draw(st.sampled_from(odd) | st.lists(st.integers(0, 20), max_size=4))
    elif kind == "dtype":
        entry["dtype"] = draw(st.sampled_from(sorted(SIZES)))
        if draw(st.booleans()):  # a whole file of this dtype: the tensor's zeros stand at the end, the rest moves up
            start, end = entry["data_offsets"]
            del numbers[start:end]
            for name, other in header.items():
                if name != "__metadata__" and other["data_offsets"][0] >= end:
                    other["data_offsets"] = [at - (end - start) for at in other["data_offsets"]]
            size = torch.Size(entry["shape"]).numel() * SIZES[entry["dtype"]]
            entry["data_offsets"] = [len(numbers), len(numbers) + size]
            numbers += bytes(size)
    elif kind == "offsets":
        entry["data_offsets"] = draw(st.sampled_from([[0, 0], [0, 2**62], [8, 4], [-8, 0], [], ["0", "8"], None]))
    elif kind == "not finite":
        value = draw(st.sampled_from([float("nan"), float("inf"), -float("inf"), 3e38]))
        start, end = entry["data_offsets"]
        at = start + 4 * draw(st.integers(0, (end - start) // 4 - 1))
        numbers[at : at + 4] = torch.tensor(value).numpy().tobytes()
    elif kind == "entry":
        header[key] = draw(st.sampled_from([None, [], {}, {"dtype": "F32"}, "x", 3]))
    else:
        header["__metadata__"] = draw(st.sampled_from([None, {"a": 1}, [], {"format": "np"}, {"format": {}}]))
    text = json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + bytes(numbers))


KEYS = ["peft_type", "lora_alpha", "r", "lora_dropout", "use_rslora", "bias", "target_modules", "modules_to_save"]
KEYS += ["rank_pattern", "alpha_pattern", "init_lora_weights", "use_dora", "lora_bias", "target_parameters"]
KEYS += ["layer_replication", "fan_in_fan_out", "exclude_modules", "corda_config", "base_model_name_or_path"]
VALUES = [None, True, False, 0, -1, 1.5, 1e308, -1e308, 10**400, "", "no", "LORA", "all", "pissa", [], [1], ["lm_head"]]
VALUES += [["("], {}, {"(": 2}, {"q_proj": "x"}, {"q_proj": 10**400}, {"q_proj": {}}, [[]], {"": 3}, "\ud800"]
VALUES += [float("nan"), float("inf")]


def in_config(draw, folder):
    config = json.loads((folder / CONFIG).read_text())
    for _ in range(draw(st.integers(1, 2))):
        key = draw(st.sampled_from(KEYS) | st.text(max_size=4))
        if draw(st.booleans()) and key in config:
            del config[key]
        else:
            config[key] = draw(st.sampled_from(VALUES))
    whole = draw(st.sampled_from([config, config, config, config, [config], "LORA", None, 3]))
    (folder / CONFIG).write_text(json.dumps(whole))


@st.composite
def damages(draw):
    """A function that damages the adapter in a folder; what it draws is drawn when it is called."""
    return draw(st.sampled_from([in_bytes, in_tensors, in_config]))


def damaged(data, base):
    folder = base[3] / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(base[2], folder)
    data.draw(damages())(data.draw, folder)
    return folder


def state_of(model):
    return (
        [id(module) for module in model.modules()],
        [(name, id(p), p.requires_grad, bytes(p.detach().numpy().tobytes())) for name, p in model.named_parameters()],
    )


def loaded_or_untouched(change, model, folder):
    """The change is made as a whole, with an output, or refused with a message and without any trace."""
    before = state_of(model)
    try:
        change(model, folder)
    except ConfigurationError:
        assert state_of(model) == before
    else:
        assert {name for name, _ in dynrank.lora_layers(model)}
        with torch.no_grad():
            assert model(IDS).logits.shape == (1, 5, 20)


@settings(examples, max_examples=80)
@given(data=st.data())
def test_load_adapter_loads_the_whole_or_nothing(base, data):
    loaded_or_untouched(dynrank.load_adapter, copy.deepcopy(base[0]), damaged(data, base))


@settings(examples, max_examples=40)
@given(data=st.data())
def test_swap_adapter_swaps_the_whole_or_nothing(base, data):
    model = dynrank.swap_adapter(copy.deepcopy(base[0]), base[2])
    loaded_or_untouched(dynrank.swap_adapter, model, damaged(data, base))


def launch(arguments, out):
    """Run the command in this process: it ends with 0 and its output, or with 2, a message, and none."""
    shutil.rmtree(out, ignore_errors=True)
    with pytest.MonkeyPatch.context() as patch, redirect_stderr(io.StringIO()) as errors:
        patch.setattr("sys.argv", ["dynrank", *map(str, arguments)])
        try:
            cli.main()
            code = 0
        except SystemExit as ended:
            code = ended.code or 0
    said = errors.getvalue()
    assert code in (0, 2), said
    assert (code == 2) == said.startswith("error: "), said
    assert "Traceback" not in said
    return code


COMMANDS = {
    "inspect": (40, lambda folder, out, _: ["inspect", folder]),
    "squeeze": (60, lambda folder, out, _: ["squeeze", folder, "--rank", 1, "--out", out]),
    "squeeze --energy": (20, lambda folder, out, _: ["squeeze", folder, "--energy", 0.5, "--out", out]),
    "merge": (25, lambda folder, out, model: ["merge", folder, "--model", model, "--out", out]),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_end_with_a_result_or_a_message(base, name):
    count, arguments = COMMANDS[name]
    out = base[3] / "out"

    @settings(examples, max_examples=count)
    @given(data=st.data())
    def run(data):
        code = launch(arguments(damaged(data, base), out, base[1]), out)
        assert out.exists() == (code == 0 and name != "inspect")
        assert not list(base[3].glob(".*"))

    run()
