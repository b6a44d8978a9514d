"""PEFT's AdaLoRA as an arm of the studies (arXiv:2303.10512)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peft import AdaLoraConfig, get_peft_model
from study_bench import SCALING, Setting, Trainee, linear_layers
from torch import nn


def adalora(setting: Setting, start: int, target: int, lr: float | None = None) -> Trainee:
    """A fresh model with PEFT's AdaLoRA on every linear layer.

    Its mean rank falls from ``start`` to ``target`` between 0.15 and 0.65 of the run, along a cubic.
    """
    first = round(0.15 * setting.steps)
    last = round(0.65 * setting.steps)
    model = setting.model()
    config = AdaLoraConfig(
        init_r=start,
        target_r=target,
        # PEFT divides alpha by the initial rank.
        lora_alpha=round(SCALING * start),
        tinit=first,
        tfinal=setting.steps - last,
        deltaT=5,
        total_step=setting.steps,
        target_modules=linear_layers(setting, model),
        modules_to_save=[*setting.heads] or None,
    )
    return setting.trainee(get_peft_model(model, config).train(), lr)  # type: ignore[arg-type]


def allocation_of(trainee: Trainee) -> Callable[[int], None]:
    """What AdaLoRA wants done after each step."""
    model: Any = trainee.model
    allocate: Callable[[int], None] = model.base_model.update_and_allocate
    return allocate


def kept_ranks(model: nn.Module) -> dict[str, int]:
    """How many triplets of each layer AdaLoRA has not masked, at least 1; names are those of the plain model."""
    return {
        name.removeprefix("base_model.model.").partition(".lora_E.")[0]: max(1, int((p != 0).sum()))
        for name, p in model.named_parameters()
        if ".lora_E." in name
    }


def kept_parameters(model: nn.Module) -> int:
    """Numbers in the triplets that AdaLoRA has not masked."""
    rows = {name: p for name, p in model.named_parameters() if ".lora_" in name}
    kept = {name: int((p != 0).sum()) for name, p in rows.items() if ".lora_E." in name}
    pairs = {name: (rows[name.replace("_E.", "_B.")], rows[name.replace("_E.", "_A.")]) for name in kept}
    return sum(kept[name] * (lora_B.shape[0] + 1 + lora_A.shape[1]) for name, (lora_B, lora_A) in pairs.items())
