"""diffusers' models change their ranks in a plain loop, and diffusers reads what it has saved of them."""

import pytest
import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from diffusers.loaders import FluxLoraLoaderMixin, StableDiffusionLoraLoaderMixin
from peft import LoraConfig, get_peft_model_state_dict
from trained import drive

import dynrank
from dynrank import Training, adapter_parameters
from dynrank.schedules import anneal, early_budget

FILE = "pytorch_lora_weights.safetensors"


def unet():
    torch.manual_seed(0)
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    sizes = {"block_out_channels": (16,), "cross_attention_dim": 12, "attention_head_dim": 4, "norm_num_groups": 4}
    return UNet2DConditionModel(8, 3, 3, layers_per_block=1, **blocks, **sizes)


def flux():
    torch.manual_seed(0)
    sizes = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}
    more = {"joint_attention_dim": 12, "pooled_projection_dim": 12, "axes_dims_rope": [4, 4, 8]}
    return FluxTransformer2DModel(patch_size=1, in_channels=4, **sizes, **more)


def unet_output(model, generator):
    x = torch.randn(8, 3, 8, 8, generator=generator)
    return x, model(x, torch.randint(1000, (8,), generator=generator), torch.ones(8, 2, 12)).sample


def flux_output(model, generator):
    x = torch.randn(8, 9, 4, generator=generator)
    text = torch.ones(8, 2, 12)
    places = {"img_ids": torch.zeros(9, 3), "txt_ids": torch.zeros(2, 3)}
    time = torch.rand(8, generator=generator)
    return x, model(x, text, torch.ones(8, 12), time, **places).sample


# Each has a model, its output, who saves it, what it is called there, and its layers.
KINDS = {
    "UNet": (unet, unet_output, StableDiffusionLoraLoaderMixin, "unet", ["to_q", "to_out.0", "conv1", "proj_in"]),
    "Flux": (flux, flux_output, FluxLoraLoaderMixin, "transformer", ["to_q", "to_k", "to_out.0", "proj_mlp"]),
}  # fmt: skip
SCHEDULES = {"anneal": lambda: anneal(2, steps=2), "early_budget": lambda: early_budget(3)}


def trained(kind, schedule):
    make, output, _, _, layers = KINDS[kind]
    model = make()
    generator = torch.Generator().manual_seed(1)
    model.requires_grad_(False).add_adapter(LoraConfig(r=6, lora_alpha=12, target_modules=layers))
    optimizer = torch.optim.AdamW(adapter_parameters(model), lr=1e-2)

    def loss():
        x, y = output(model, generator)
        return (y - x.flip(1)).square().mean()

    return model, drive(SCHEDULES[schedule](), Training(model, [optimizer]), 18, loss)


@pytest.mark.filterwarnings("ignore:.*few examples:UserWarning")
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", KINDS)
def test_what_diffusers_saves_of_unlike_ranks_it_loads_with_its_metadata(kind, schedule, tmp_path):
    make, output, saver, name, _ = KINDS[kind]
    model, driver = trained(kind, schedule)
    ranks = {layer: ranked.rank for layer, ranked in dynrank.lora_layers(model)}
    assert driver.history
    assert sum(ranks.values()) < 6 * len(ranks)
    assert schedule == "anneal" or len({*ranks.values()}) > 1
    saver.save_lora_weights(
        tmp_path,
        **{f"{name}_lora_layers": get_peft_model_state_dict(model)},
        **{f"{name}_lora_adapter_metadata": model.peft_config["default"].to_dict()},
    )
    with torch.no_grad():
        before = output(model, torch.Generator().manual_seed(2))[1]
        again = make()
        again.load_lora_adapter(tmp_path, prefix=name, weight_name=FILE)
        assert torch.equal(output(again, torch.Generator().manual_seed(2))[1], before)
        assert {layer: ranked.rank for layer, ranked in dynrank.lora_layers(again)} == ranks
