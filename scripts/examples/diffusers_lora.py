"""A LoRA on a UNet of diffusers whose ranks are cut while it learns, with pictures before, after and at the end.

A small UNet learns scikit-learn's handwritten digits (1,797 images of 8 x 8) by denoising, with the digit as the
condition. Then its weights are frozen. A LoRA of rank 16, made by ``unet.add_adapter``, learns the same digits lying on
their side. At a third of the run it is cut to the parameters of rank 4. diffusers saves it, and a new UNet loads it.
Run: .venv/bin/python scripts/examples/diffusers_lora.py --out FOLDER [--base-steps N] [--steps N]
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from peft import LoraConfig, get_peft_model_state_dict
from sklearn.datasets import load_digits
from torch import Tensor

from dynrank import RankDriver, Training, adapter_parameters, lora_layers
from dynrank.schedules import early_budget
from dynrank.triggers import Run

FILE = "pytorch_lora_weights.safetensors"
NOISE = DDPMScheduler(num_train_timesteps=1000)
RANK = 16
FINAL_RANK = 4
BATCH = 32
HELD_BACK = 197


def main() -> None:
    """Train, cut, save, load, and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--base-steps", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=600)
    options = parser.parse_args()
    torch.manual_seed(0)
    images, numbers = digits()
    unet = new_unet()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=2e-3)
    for _ in range(options.base_steps):
        loss_of(unet, *batch(images, numbers)).backward()
        optimizer.step()
        optimizer.zero_grad()
    unet.requires_grad_(False)
    base = {name: value.clone() for name, value in unet.state_dict().items()}

    turned = images.rot90(1, (2, 3))
    rows = {"the UNet alone": samples(unet)}
    losses = {"the UNet alone": test_loss(unet, turned, numbers)}
    layers = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2"]
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=layers))
    optimizer = torch.optim.AdamW(adapter_parameters(unet), lr=2e-3)
    driver = RankDriver(early_budget(FINAL_RANK))
    loop = Training(unet, [optimizer])
    driver.start(loop, Run(total_steps=options.steps))
    start = time.perf_counter()
    while loop.step < options.steps:
        before = (samples(unet), test_loss(unet, turned, numbers)) if loop.step == options.steps // 3 else None
        changes = len(driver.history)
        driver.advance(loop)
        if before is not None:
            rows["before the cut"], losses["before the cut"] = before
        if len(driver.history) > changes:
            rows["after the cut"] = samples(unet)
            losses["after the cut"] = test_loss(unet, turned, numbers)
        loss_of(unet, *batch(turned, numbers)).backward()
        optimizer.step()
        loop.step += 1
        driver.end_step(loop)
        optimizer.zero_grad()
    driver.finish(loop)
    seconds = time.perf_counter() - start
    rows["at the end"] = samples(unet)
    losses["at the end"] = test_loss(unet, turned, numbers)
    for name, loss in losses.items():
        print(f"{name:<16} loss {loss:.4f} on {HELD_BACK} digits held back")
    ranks = [layer.rank for _, layer in lora_layers(unet)]
    print(f"{'ranks':<16} {RANK} -> {min(ranks)}-{max(ranks)} in {len(ranks)} layers, {seconds:.0f} s")

    StableDiffusionLoraLoaderMixin.save_lora_weights(
        options.out,
        unet_lora_layers=get_peft_model_state_dict(unet),
        unet_lora_adapter_metadata=unet.peft_config["default"].to_dict(),
    )
    again = new_unet()
    again.load_state_dict({name.replace(".base_layer", ""): value for name, value in base.items()})
    again.load_lora_adapter(options.out, prefix="unet", weight_name=FILE)
    print(f"{'loaded again':<16} differs by {(samples(again) - rows['at the end']).abs().max():.1e}")
    draw(rows, options.out / "digits.png")


def digits() -> tuple[Tensor, Tensor]:
    """Images (N, 1, 8, 8) from -1 to 1, and their numbers (N,), in a random order that is always the same."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    return images[order], torch.tensor(data.target)[order]


def new_unet() -> UNet2DConditionModel:
    """Which attends to one vector, the number that it is to draw."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=10,
        attention_head_dim=8,
        norm_num_groups=8,
    )


def batch(images: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Random examples, none of those that are held back."""
    chosen = torch.randint(HELD_BACK, len(images), (BATCH,))
    return images[chosen], numbers[chosen]


def loss_of(unet: UNet2DConditionModel, images: Tensor, numbers: Tensor) -> Tensor:
    """The mean squared error of the noise that the UNet finds in the images."""
    noise = torch.randn(images.shape)
    times = torch.randint(1000, (len(images),))
    noisy = NOISE.add_noise(images, noise, times)
    return F.mse_loss(unet(noisy, times, F.one_hot(numbers, 10).float()[:, None]).sample, noise)


@torch.no_grad()
def test_loss(unet: UNet2DConditionModel, images: Tensor, numbers: Tensor) -> float:
    """The loss of what is held back, with the same noise whenever it is asked."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return sum(float(loss_of(unet, images[:HELD_BACK], numbers[:HELD_BACK])) for _ in range(8)) / 8


@torch.no_grad()
def samples(unet: UNet2DConditionModel) -> Tensor:
    """What the UNet draws of the same noise as 0 to 9, (10, 1, 8, 8)."""
    scheduler = DDIMScheduler(num_train_timesteps=1000)
    scheduler.set_timesteps(25)
    image = torch.randn(10, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    for step in scheduler.timesteps:
        image = scheduler.step(unet(image, step, torch.eye(10)[:, None]).sample, step, image).prev_sample
    return image


def draw(rows: dict[str, Tensor], path: Path) -> None:
    """Each row of digits beside its name."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(rows), 1, figsize=(7, 0.9 * len(rows)), layout="constrained")
    for axis, (name, images) in zip(axes, rows.items(), strict=True):
        axis.imshow(
            F.pad(images[:, 0], (1, 1, 1, 1), value=-1).permute(1, 0, 2).flatten(1), cmap="gray", vmin=-1, vmax=1
        )
        axis.set_ylabel(name, rotation=0, ha="right", va="center")
        axis.set(xticks=[], yticks=[])
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
