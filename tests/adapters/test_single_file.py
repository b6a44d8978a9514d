"""A squeezed file is the dense SVD truncation of its source, by the rules of all tools that read it; all else stays."""

import re
import struct

import pytest
import torch
from dense import truncation
from diffusers import UNet2DConditionModel
from diffusers.loaders import StableDiffusionLoraLoaderMixin as StableDiffusion
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from dynrank.adapters.squeeze import inspect, squeeze
from dynrank.errors import ConfigurationError


def unet():
    """With convolutions, and outputs of three channels, which are fewer than the rank."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")}
    blocks["up_block_types"] = ("CrossAttnUpBlock2D", "UpBlock2D")
    sizes = {"block_out_channels": (8, 16), "cross_attention_dim": 12, "attention_head_dim": 4, "norm_num_groups": 4}
    return UNet2DConditionModel(8, 3, 3, layers_per_block=1, **blocks, **sizes)


def kohya(path, dtype=torch.float32, alphas=(3, 2, 8), ranks=(6, 3, 4), metadata=None):
    """A file of kohya's names with a LoRA for each layer of ``unet()``, and its tensors."""
    torch.manual_seed(1)
    tensors = {}
    modules = [(n, m) for n, m in unet().named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    for index, (name, module) in enumerate(modules):
        key = f"lora_unet_{name.replace('.', '_')}"
        weight = module.weight
        rank = ranks[index % len(ranks)]
        alpha = alphas[index % len(alphas)]
        tensors[f"{key}.lora_down.weight"] = torch.randn(rank, *weight.shape[1:]).to(dtype)
        tensors[f"{key}.lora_up.weight"] = torch.randn(len(weight), rank, *[1] * (weight.ndim - 2)).to(dtype)
        tensors[f"{key}.alpha"] = torch.tensor(alpha, dtype=dtype)
    save_file(tensors, path, metadata=metadata)
    return tensors


def by_diffusers(path):
    """{module: update} of the UNet that has loaded the file."""
    model = unet()
    state, alphas, metadata = StableDiffusion.lora_state_dict(path, unet_config=model.config, return_lora_metadata=True)
    StableDiffusion.load_lora_into_unet(state, network_alphas=alphas, unet=model, metadata=metadata)
    modules = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    return {name: module.get_delta_weight(*module.active_adapters).double() for name, module in modules.items()}


def update(tensors, name, shape):
    """The update of a layer as kohya, A1111 and ComfyUI compute it, by whichever names its factors have.

    Both factors are flattened; the scaling is alpha / rank, or 1 without an alpha.
    """
    keys = ("lora_down.weight", "lora_up.weight", "alpha", "lora_A.weight", "lora_B.weight")
    down, up, alpha, lora_A, lora_B = (tensors.get(f"{name}.{key}") for key in keys)
    first = (lora_A if down is None else down).flatten(1).double()
    second = (lora_B if up is None else up).flatten(1).double()
    scaling = 1.0 if alpha is None else float(alpha) / len(first)
    return scaling * (second @ first).reshape(shape)


def metadata_of(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_tool_reads_the_dense_truncation_from_kohya_s_file(dtype, tmp_path):
    """It is computed in float32, and each factor is rounded once. A layer without an alpha has its rank for one.

    It gets the alpha of all others, because diffusers would give it that.
    """
    before = kohya(tmp_path / "a.safetensors", dtype)
    del before["lora_unet_time_embedding_linear_1.alpha"]
    save_file(before, tmp_path / "a.safetensors")
    reports = {r.layer: r for r in squeeze(tmp_path / "a.safetensors", tmp_path / "b.safetensors", budget="40%")}
    after = load_file(tmp_path / "b.safetensors")
    read = by_diffusers(tmp_path / "b.safetensors")
    assert after.keys() - before.keys() == {"lora_unet_time_embedding_linear_1.alpha"}
    assert {value.dtype for value in after.values()} == {dtype}
    assert len({float(value) for key, value in after.items() if key.endswith(".alpha")}) == 1
    assert len(read) == len(reports) == len(after) // 3
    assert len({report.rank_after for report in reports.values()}) > 1
    rounding = max(1e-6, 1.5 * torch.finfo(dtype).eps)
    for module, theirs in read.items():
        name = f"lora_unet_{module.replace('.', '_')}"
        old = update(before, name, theirs.shape)
        report = reports[name]
        best = truncation(old, report.rank_after)
        for new in (theirs, update(after, name, theirs.shape)):
            assert (new - best).norm() <= rounding * old.norm()
        assert report.predicted_error == pytest.approx(float((old - best).norm()), abs=1e-4)
        assert report.rank_after < report.rank_before or torch.allclose(best, old)


def diffusers_file(folder, *, metadata):
    """What diffusers saves of an adapter of unlike ranks and alphas; without metadata alpha has to be the rank."""
    model = unet()
    options = {"lora_alpha": 12, "rank_pattern": {"to_k": 2, "conv1": 5}, "alpha_pattern": {"to_v": 3}}
    options = options if metadata else {"lora_alpha": 6}
    targets = ["to_q", "to_k", "to_v", "proj_in", "conv1"]
    model.add_adapter(LoraConfig(r=6, target_modules=targets, init_lora_weights=False, **options))
    more = {"unet_lora_adapter_metadata": model.peft_config["default"].to_dict()} if metadata else {}
    StableDiffusion.save_lora_weights(folder, unet_lora_layers=get_peft_model_state_dict(model), **more)
    return folder / "pytorch_lora_weights.safetensors"


@pytest.mark.parametrize(("metadata", "target"), [(True, {"rank": 2}), (False, {"energy": 0.8})], ids=str)
def test_diffusers_file_is_right_with_its_metadata_and_without(metadata, target, tmp_path):
    """Without them, as for ComfyUI, alpha is the rank: so it is in the metadata, too."""
    source = diffusers_file(tmp_path, metadata=metadata)
    out = tmp_path / "new" / "b.safetensors"
    before = by_diffusers(source)
    reports = {report.layer: report for report in squeeze(source, out, **target)}
    after = by_diffusers(out)
    tensors = load_file(out)
    assert before.keys() == after.keys() == {name.removeprefix("unet.") for name in reports}
    assert (metadata_of(out) == {"format": "pt"}) == (not metadata)
    save_file(tensors, tmp_path / "bare.safetensors")
    bare = by_diffusers(tmp_path / "bare.safetensors")
    for name, old in before.items():
        best = truncation(old, reports[f"unet.{name}"].rank_after)
        for new in (after[name], bare[name], update(tensors, f"unet.{name}", old.shape)):
            assert (new - best).norm() <= 1e-6 * old.norm()


def test_layers_at_their_rank_keep_their_bits_and_metadata_lose_what_is_stale(tmp_path):
    stale = {"ss_network_dim": "6", "ss_network_args": '{"conv_dim": "4"}', "sshs_model_hash": "0" * 64}
    kept = {"modelspec.title": "mine", "ss_tag_frequency": '{"a": {"gr\u00fcn \\"x\\"": 3}}'}
    before = kohya(tmp_path / "a.safetensors", torch.float16, alphas=[2], ranks=[2], metadata=kept | stale)
    squeeze(tmp_path / "a.safetensors", tmp_path / "b.safetensors", rank=2)
    after = load_file(tmp_path / "b.safetensors")
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert metadata_of(tmp_path / "b.safetensors") == kept


COPIED = {
    "dora.lora_down.weight": (6, 9), "dora.lora_up.weight": (8, 6), "dora.alpha": (), "dora.dora_scale": (8, 1),
    "loha.hada_w1_a": (8, 6), "loha.hada_w1_b": (6, 9), "loha.alpha": (), "lokr.lokr_w1": (2, 2),
    "cp.lora_down.weight": (6, 9, 1, 1), "cp.lora_mid.weight": (6, 6, 3, 3), "cp.lora_up.weight": (8, 6, 1, 1),
    "peft.lora_A.weight": (6, 9), "peft.lora_B.weight": (8, 6), "peft.lora_magnitude_vector": (8,),
    "bias.lora_A.weight": (6, 9), "bias.lora_B.weight": (8, 6), "bias.lora_B.bias": (8,),
    "norm.diff": (8,), "wan.diff_b": (8,), "emb_params": (3, 9),
}  # fmt: skip


def test_what_is_no_plain_layer_is_copied_and_named(tmp_path, launch):
    tensors = {key: torch.randn(shape) for key, shape in COPIED.items()}
    wan = {"wan.lora_down.weight": torch.randn(6, 9), "wan.lora_up.weight": torch.randn(8, 6)}
    save_file(tensors | wan, tmp_path / "a.safetensors")
    code, said, _ = launch("squeeze", tmp_path / "a.safetensors", "--rank", 2, "--out", tmp_path / "b.safetensors")
    after = load_file(tmp_path / "b.safetensors")
    assert code == 0
    assert all(torch.equal(after[key], value) for key, value in tensors.items())
    assert after.keys() == (tensors | wan).keys()
    assert after["wan.lora_down.weight"].shape == (2, 9)
    copied = next(line for line in said.splitlines() if line.startswith("copied"))
    assert f"{len(tensors)} tensors" in copied
    assert all(kind in copied for kind in ("dora_scale", "hada_w1_a", "lokr_w1", "lora_mid"))


PLAIN = {"x.lora_down.weight": torch.ones(4, 6), "x.lora_up.weight": torch.ones(5, 4), "x.alpha": torch.tensor(2.0)}
# Files that are around name the first factor in these ways, and the second with B or up.
NAMED = [
    "lora_te1_a_b.lora_down.weight",
    "transformer.a.b.lora_A.weight",
    "diffusion_model.a.b.lora_A.default.weight",
    "unet.a.to_q.lora.down.weight",
    "a.processor.to_q_lora.down.weight",
    "text_encoder.a.fc1.lora_linear_layer.down.weight",
    "transformer.a.lora_A",
]


def test_names_are_kept_and_not_understood(tmp_path):
    tensors = {name: torch.randn(4, 6) for name in NAMED}
    tensors |= {name.replace("down", "up").replace("lora_A", "lora_B"): torch.randn(5, 4) for name in NAMED}
    save_file(tensors, tmp_path / "a.safetensors")
    squeeze(tmp_path / "a.safetensors", tmp_path / "b.safetensors", rank=1)
    after = load_file(tmp_path / "b.safetensors")
    assert after.keys() == tensors.keys()
    assert {(*value.shape,) for value in after.values()} == {(1, 6), (5, 1)}
    assert [(layer.rank, layer.scaling) for layer in inspect(tmp_path / "a.safetensors")] == [(4, 1.0)] * len(NAMED)


def tensors(**changes):
    """Those of ``PLAIN`` with others by the end of their names; None takes one out."""
    ends = {"down": "x.lora_down.weight", "up": "x.lora_up.weight", "alpha": "x.alpha"}
    return {k: v for k, v in (PLAIN | {ends[end]: v for end, v in changes.items()}).items() if v is not None}


UNET = {"unet.x.lora_A.weight": torch.ones(4, 6), "unet.x.lora_B.weight": torch.ones(5, 4)}
HOSTILE = {
    "up without down": (tensors(down=None), {}, "'x' lacks one of its two factors"),
    "empty": (tensors(down=torch.ones(0, 6), up=torch.ones(5, 0)), {}, r"got \[0, 6\]"),
    "alpha 0": (tensors(alpha=torch.tensor(0.0)), {}, "'x' must have a number other than 0 for alpha, got"),
    "alpha that its dtype loses": (tensors(alpha=torch.tensor(6e-8).half()), {}, "the one alpha .* other than 0"),
    "two alphas": (tensors(alpha=torch.ones(2)), {}, "other than 0 for alpha, got"),
    "alpha twice": (
        UNET | {"unet.x.alpha": torch.tensor(2.0)},
        {"lora_adapter_metadata": '{"unet.peft_type": "LORA", "unet.r": 4, "unet.lora_alpha": 8}'}, "has alpha twice",
    ),
    "no LoRA": ({"x.weight": torch.ones(3)}, {}, r"holds no plain LoRA layers; its tensors are \['weight'\]"),
    "deep": (UNET, {"lora_adapter_metadata": "[" * 100_000}, "cannot be read"),
    "too large for its dtype": (
        tensors(up=torch.full((5, 4), 6e4).half(), down=torch.full((4, 6), 6e4).half(), alpha=torch.tensor(8.0)),
        {}, "'x' is too large for torch.float16",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", HOSTILE)
def test_a_hostile_file_ends_in_one_line_and_leaves_nothing(fault, tmp_path, launch):
    content, metadata, said = HOSTILE[fault]
    save_file(content, tmp_path / "a.safetensors", metadata=metadata)
    code, _, message = launch("squeeze", tmp_path / "a.safetensors", "--rank", 1, "--out", tmp_path / "b.safetensors")
    assert (code, message.count("\n")) == (2, 1)
    assert re.search(said, message)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_what_the_command_cannot_take_is_said_in_one_line(tmp_path, launch):
    save_file(PLAIN, "a.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(struct.pack("<Q", 2**63) + b"{}" * 100)
    (tmp_path / "there.safetensors").write_text("mine")
    (tmp_path / "a.ckpt").write_text("pickled")
    save_file(PLAIN, "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text("{}")
    for said, arguments in {
        "out must be a new file, 'there.safetensors' exists (--out)": [
            "a.safetensors",
            "--rank",
            1,
            "--out",
            "there.safetensors",
        ],
        "NAME.safetensors, got 'folder'": ["a.safetensors", "--rank", 1, "--out", "folder"],
        "'none.safetensors' cannot be read: No such file": ["none.safetensors", "--rank", 1, "--out", "b.safetensors"],
        "in its folder; give the folder": ["adapter_model.safetensors", "--rank", 1, "--out", "b.safetensors"],
        "must be a .safetensors file": ["a.ckpt", "--rank", 1, "--out", "b.safetensors"],
        "'broken.safetensors' cannot be read": ["broken.safetensors", "--rank", 1, "--out", "b.safetensors"],
    }.items():
        code, _, message = launch("squeeze", *arguments)
        assert (code, message.count("\n"), said in message) == (2, 1, True), message
    assert (tmp_path / "there.safetensors").read_text() == "mine"
    assert len([*tmp_path.iterdir()]) == 6


def test_a_file_in_fewer_bits_is_the_same_to_every_tool_and_float8_is_read(tmp_path):
    before = kohya(tmp_path / "a.safetensors")
    done = squeeze(tmp_path / "a.safetensors", tmp_path / "b.safetensors", dtype=torch.bfloat16)
    sizes = [sum(value.nbytes for value in load_file(tmp_path / f"{name}.safetensors").values()) for name in "ab"]
    assert sizes[1] < 0.51 * sizes[0]
    assert 0.001 < done.rounding.whole < 0.005
    modules = {f"lora_unet_{name.replace('.', '_')}": module for name, module in unet().named_modules()}
    read = by_diffusers(tmp_path / "b.safetensors")
    for name, found in read.items():
        key = f"lora_unet_{name.replace('.', '_')}"
        expected = update(before, key, modules[key].weight.shape)
        error = float((found.detach() - expected).norm() / expected.norm())
        assert error < 0.006
        # A convolution's filters count as a matrix, so the norms agree.
        assert done.rounding.layers[key] == pytest.approx(error, rel=0.05)
    with pytest.raises(ConfigurationError, match=r"float32 or torch\.bfloat16 for a file of diffusers"):
        squeeze(tmp_path / "a.safetensors", tmp_path / "c.safetensors", dtype=torch.float8_e4m3fn)
    small = {key: value if "alpha" in key else value.to(torch.float8_e5m2) for key, value in before.items()}
    save_file(small, tmp_path / "d.safetensors")
    assert {layer.layer for layer in inspect(tmp_path / "d.safetensors")} == {report.layer for report in done}
    squeeze(tmp_path / "d.safetensors", tmp_path / "e.safetensors", rank=16)
    after = load_file(tmp_path / "e.safetensors")
    assert {value.dtype for key, value in after.items() if "alpha" not in key} == {torch.bfloat16}
    for key in (key for key in modules if f"{key}.alpha" in small):
        shape = modules[key].weight.shape
        expected = update({name: value.double() for name, value in small.items()}, key, shape)
        assert (update(after, key, shape) - expected).norm() <= 0.006 * expected.norm()
