"""A transformer of diffusers changes its ranks in a plain loop, and diffusers reads what it has saved of it.

scripts/diffusers_lora.py does the same with a UNet, see tests/scripts/test_rounds.py.
"""

import torch
from diffusers import FluxTransformer2DModel
from diffusers.loaders import FluxLoraLoaderMixin
from peft import LoraConfig, get_peft_model_state_dict
from trained import drive

import dynrank
from dynrank import Training, adapter_parameters
from dynrank.schedules import early_budget


def flux():
    torch.manual_seed(0)
    sizes = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}
    more = {"joint_attention_dim": 12, "pooled_projection_dim": 12, "axes_dims_rope": [4, 4, 8]}
    return FluxTransformer2DModel(patch_size=1, in_channels=4, **sizes, **more)


def output(model, generator):
    x = torch.randn(8, 9, 4, generator=generator)
    text = torch.ones(8, 2, 12)
    places = {"img_ids": torch.zeros(9, 3), "txt_ids": torch.zeros(2, 3)}
    time = torch.rand(8, generator=generator)
    return x, model(x, text, torch.ones(8, 12), time, **places).sample


def ranks_of(model):
    return {name: layer.rank for name, layer in dynrank.lora_layers(model)}


def test_what_diffusers_saves_of_unlike_ranks_it_loads_with_its_metadata(tmp_path):
    model = flux().requires_grad_(False)
    targets = ["to_q", "to_k", "to_out.0", "proj_mlp"]
    model.add_adapter(LoraConfig(r=6, lora_alpha=12, target_modules=targets))
    optimizer = torch.optim.AdamW(adapter_parameters(model), lr=1e-2)
    generator = torch.Generator().manual_seed(1)

    def loss():
        x, y = output(model, generator)
        return (y - x.flip(1)).square().mean()

    drive(early_budget(3), Training(model, [optimizer]), 18, loss)
    ranks = ranks_of(model)
    assert sum(ranks.values()) < 6 * len(ranks)
    assert len({*ranks.values()}) > 1
    metadata = {"transformer_lora_adapter_metadata": model.peft_config["default"].to_dict()}
    FluxLoraLoaderMixin.save_lora_weights(
        tmp_path, transformer_lora_layers=get_peft_model_state_dict(model), **metadata
    )
    again = flux()
    again.load_lora_adapter(tmp_path, prefix="transformer", weight_name="pytorch_lora_weights.safetensors")
    with torch.no_grad():
        before, after = (output(made, torch.Generator().manual_seed(2))[1] for made in (model, again))
    assert torch.equal(after, before)
    assert ranks_of(again) == ranks
