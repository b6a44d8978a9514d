"""Damaged adapters, by hypothesis: refused or used; never half loaded, nothing executed."""

import copy
import json
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import dynrank
from dynrank.adapters.config import AdapterConfig
from dynrank.errors import ConfigurationError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def base(zoo, tmp_path_factory):
    """(plain model, folder of a whole adapter with mixed ranks and a head, folder to work in)."""
    folder = tmp_path_factory.mktemp("damaged")
    targets = ["q_proj", "up_proj", "embed_tokens"]
    options = {"target_modules": targets, "rank_map": {"up_proj": {"rank": 2, "alpha": 7}}}
    zoo.saved(folder / "adapter", "llama", modules_to_save=["lm_head"], **options)
    return zoo.plain("llama"), folder / "adapter", folder


# --- damages: each takes a folder with a whole adapter


def in_bytes(draw, folder):
    file = folder / draw(st.sampled_from([CONFIG, WEIGHTS]))
    content = bytearray(file.read_bytes())
    for _ in range(draw(st.integers(0, 3))):
        # half of them among the first, where a safetensors file has its header
        at = draw(st.integers(0, len(content) - 1) | st.integers(0, min(600, len(content) - 1)))
        content[at] ^= draw(st.integers(1, 255))
    length = draw(st.just(len(content)) | st.integers(0, len(content)))
    file.write_bytes(bytes(content[:length]) + draw(st.sampled_from([b"", b"\0", b"{}", b"more"])))


DTYPES = [torch.bool, torch.uint8, torch.int64, torch.float8_e4m3fn, torch.float16, torch.bfloat16, torch.float64]


def in_tensors(draw, folder):
    """A whole safetensors file of other tensors, as a careless program might write it."""
    tensors = load_file(folder / WEIGHTS)
    key = draw(st.sampled_from(sorted(tensors)))
    tensor = tensors.pop(key)
    kind = draw(st.sampled_from(["drop", "rename", "shape", "dtype", "not finite"]))
    if kind == "rename":
        names = ["", "x", "base_model.model.", "base_model.model.lm_head.lora_A.weight", key + ".lora_A.weight"]
        names += [key.replace("A", "B"), key.replace(".weight", ""), key.replace("layers.0", "layers.9")]
        tensors[draw(st.sampled_from(names))] = tensor
    elif kind == "shape":
        near = st.sampled_from([tensor.shape[::-1], (1, *tensor.shape), (*tensor.shape, 1)])
        tensors[key] = torch.ones(draw(near | st.lists(st.integers(0, 20), max_size=4)))
    elif kind == "dtype":
        tensors[key] = tensor.to(draw(st.sampled_from(DTYPES)))
    elif kind == "not finite":
        tensor.view(-1)[draw(st.integers(0, tensor.numel() - 1))] = draw(st.sampled_from([torch.nan, torch.inf, 3e38]))
        tensors[key] = tensor
    save_file(tensors, folder / WEIGHTS)


KEYS = [*AdapterConfig.model_fields, "fan_in_fan_out", "exclude_modules", "base_model_name_or_path"]
VALUES = [None, True, False, 0, -1, 1.5, 1e308, -1e308, 10**400, "", "no", "LORA", "all", "pissa", [], [1], ["lm_head"]]
VALUES += ["(", ["("], {}, {"(": 2}, {"q_proj": "x"}, {"q_proj": 10**400}, {"q_proj": {}}, [[]], {"": 3}, "\ud800"]
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


def damaged(data, base):
    folder = base[2] / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(base[1], folder)
    data.draw(st.sampled_from([in_bytes, in_tensors, in_config]))(data.draw, folder)
    return folder


@settings(max_examples=80, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_the_whole_is_loaded_with_an_output_or_nothing_changes(base, zoo, data):
    model = copy.deepcopy(base[0])
    before = zoo.state(model)
    folder = damaged(data, base)
    try:
        dynrank.load_adapter(model, folder)
    except ConfigurationError:
        assert zoo.state(model) == before
    else:
        assert {name for name, _ in dynrank.lora_layers(model)}
        assert zoo.outputs(model).shape == (3, 5, 20)
