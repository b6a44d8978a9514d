"""An adapter in 4 bits has the update that its codes say, is read as it lies, and PEFT reads it in float32."""

import json
import shutil

import pytest
import torch
from bitsandbytes.functional import get_4bit_type
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import dynrank
from dynrank.adapters.squeeze import squeeze
from dynrank.app.models.merging import merge_adapter
from dynrank.errors import ConfigurationError

PACKED = "adapter_model.packed.safetensors"
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


def unpacked(file):
    """{key: tensor} of a packed file, by its description alone; a number at a time."""
    levels = get_4bit_type("nf4", device="cpu").tolist()
    tensors = load_file(file)
    with safe_open(file, "pt") as opened:
        shapes = json.loads(opened.metadata()["dynrank.shapes"])
    found = {key: value for key, value in tensors.items() if key.removesuffix(".scales") not in shapes}
    for key, shape in shapes.items():
        of_B = key.endswith(("lora_B.weight", "lora_embedding_B"))
        width = shape[0] if of_B else torch.Size(shape[1:]).numel()
        rows = []
        for codes, scales in zip(tensors[key].tolist(), tensors[f"{key}.scales"].tolist(), strict=True):
            halves = [half for byte in codes for half in divmod(byte, 16)]
            rows.append([levels[code] * scales[i // 64] for i, code in enumerate(halves[:width])])
        values = torch.tensor(rows)
        found[key] = (values.T if of_B else values).reshape(shape).contiguous()
    return found


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "conv"])
def test_peft_computes_after_unpack_what_the_codes_say_and_so_does_every_reader(kind, zoo, tmp_path):
    options = {"use_rslora": True, "rank_pattern": {r".*\.1\..*|point": 4}}
    source = zoo.by_peft(kind, tmp_path / "source", **({"r": 6, "lora_alpha": 9} | options))
    rounding = squeeze(tmp_path / "source", tmp_path / "packed", dtype="nf4").rounding
    assert {file.name for file in (tmp_path / "packed").iterdir()} == {CONFIG, PACKED}
    assert 0.05 < rounding.whole < 0.15
    # The same files with the codes as numbers are an adapter that PEFT reads.
    by_hand = tmp_path / "by hand"
    shutil.copytree(tmp_path / "packed", by_hand)
    save_file(unpacked(by_hand / PACKED), by_hand / WEIGHTS)
    expected = zoo.outputs(PeftModel.from_pretrained(zoo.plain(kind), by_hand).eval())
    squeeze(tmp_path / "packed", tmp_path / "plain", dtype=torch.float32)
    assert {value.dtype for value in load_file(tmp_path / "plain" / WEIGHTS).values()} <= {torch.float32, torch.int64}
    plain = zoo.outputs(PeftModel.from_pretrained(zoo.plain(kind), tmp_path / "plain").eval())
    ours = zoo.outputs(dynrank.load_adapter(zoo.plain(kind), tmp_path / "packed"))
    swapped = zoo.outputs(dynrank.swap_adapter(zoo.adapted(kind, 3), tmp_path / "packed"))
    for logits in (plain, ours, swapped):
        assert (logits - expected).abs().max() <= 3e-6 * (1 + expected.abs().max())
    change = (zoo.outputs(zoo.plain(kind)) - zoo.outputs(source)).norm()
    assert (expected - zoo.outputs(source)).norm() < 0.5 * change


def test_commands_pack_and_read_a_packed_adapter(zoo, launch, tmp_path):
    source = zoo.saved(tmp_path / "source", "llama", rank_map={"q_proj": {"rank": 2, "alpha": 40}})
    (source / "tokenizer_config.json").write_text("{}")
    zoo.plain("llama").save_pretrained(tmp_path / "base")
    pack = ["squeeze", source, "--dtype", "nf4", "--out", tmp_path / "packed"]
    code, printed, said = launch(*pack)
    assert code == 0, said
    assert " of the update, at most " in printed
    assert (tmp_path / "packed" / "tokenizer_config.json").exists()
    layers = {name: layer.scaling for name, layer in dynrank.read_adapter(source).layers.items()}
    packed = dynrank.read_adapter(tmp_path / "packed")
    assert {name: layer.scaling for name, layer in packed.layers.items()} == pytest.approx(layers)
    expected = zoo.outputs(dynrank.load_adapter(zoo.plain("llama"), packed))
    assert launch("inspect", tmp_path / "packed")[0] == 0
    assert launch("squeeze", tmp_path / "packed", "--rank", 2, "--out", tmp_path / "less")[0] == 0
    assert launch("export", tmp_path / "packed", "--to", "vllm", "--out", tmp_path / "vllm")[0] == 0
    assert launch("squeeze", tmp_path / "packed", "--dtype", "float32", "--out", tmp_path / "plain")[0] == 0
    merged = merge_adapter(tmp_path / "packed", str(tmp_path / "base"), tmp_path / "merged")
    for model in (merged, *(dynrank.load_adapter(zoo.plain("llama"), tmp_path / name) for name in ("vllm", "plain"))):
        assert (zoo.outputs(model) - expected).abs().max() <= 1e-5
    assert launch(*pack)[0] == 2


def test_a_packed_file_is_a_seventh_of_float32(tmp_path):
    torch.manual_seed(0)
    model = dynrank.add_lora(nn.Sequential(nn.Linear(384, 384), nn.Linear(384, 1536)), rank=16)
    with torch.no_grad():
        for _, layer in dynrank.lora_layers(model):
            layer.lora_B.normal_(std=1e-6)
    dynrank.save_adapter(model, tmp_path / "source")
    rounding = squeeze(tmp_path / "source", tmp_path / "packed", dtype="nf4").rounding
    assert rounding.whole < 0.13
    size = (tmp_path / "packed" / PACKED).stat().st_size
    assert size <= 0.145 * (tmp_path / "source" / WEIGHTS).stat().st_size


# --- damages, by hypothesis


@pytest.fixture(scope="module")
def whole(zoo, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    zoo.saved(folder / "source", "bert", rank_map={"value": {"rank": 2, "alpha": 7}})
    squeeze(folder / "source", folder / "packed", dtype="nf4")
    return folder / "packed"


VALUES = ["", "{", "[]", "{}", "3", "null", "nf5", '{"x": [2, 3]}', '{"x": 3}', "[" * 99_999, '{"x": [-1, 1e9]}']


@settings(max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_a_damaged_packed_file_is_loaded_whole_or_refused_in_one_sentence(whole, zoo, data):
    model = zoo.plain("bert")
    before = zoo.state(model)
    folder = whole.with_name("damaged")
    shutil.copytree(whole, folder, dirs_exist_ok=True)
    kind = data.draw(st.sampled_from(["bytes", "metadata", "tensors"]))
    tensors = load_file(folder / PACKED)
    with safe_open(folder / PACKED, "pt") as file:
        metadata = file.metadata()
    if kind == "bytes":
        content = bytearray((folder / PACKED).read_bytes())
        for _ in range(data.draw(st.integers(0, 3))):
            content[data.draw(st.integers(0, 3000) | st.integers(0, len(content) - 1)) % len(content)] ^= data.draw(
                st.integers(1, 255)
            )
        end = data.draw(st.just(len(content)) | st.integers(0, len(content)))
        (folder / PACKED).write_bytes(content[:end])
    elif kind == "metadata":
        name = data.draw(st.sampled_from([*metadata]))
        shapes = json.loads(metadata["dynrank.shapes"])
        key = data.draw(st.sampled_from([*shapes]))
        shapes[key] = data.draw(st.lists(st.integers(0, 40), max_size=4))
        value = data.draw(st.sampled_from([*VALUES, json.dumps(shapes)]))
        save_file(tensors, folder / PACKED, metadata={**metadata, name: value})
    else:
        key = data.draw(st.sampled_from([*tensors]))
        change = data.draw(
            st.sampled_from([lambda t: t[:-1], lambda t: t.float(), lambda t: t[..., :-1], lambda t: t * torch.inf])
        )
        changed = change(tensors.pop(key))
        if data.draw(st.booleans()):
            tensors[key] = changed.contiguous()
        save_file(tensors, folder / PACKED, metadata=metadata)
    try:
        dynrank.load_adapter(model, folder)
    except ConfigurationError:
        assert zoo.state(model) == before
    else:
        assert {name for name, _ in dynrank.lora_layers(model)}
        assert zoo.outputs(model).shape == (3, 3)
