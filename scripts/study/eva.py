"""PEFT's EVA as an arm of the studies (arXiv:2410.07170)."""

from __future__ import annotations

from peft import EvaConfig, LoraConfig, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.eva import prepare_layer_inputs_fn_language_modeling as tokens_of
from study_bench import SCALING, Setting, Trainee, linear_layers
from torch import Tensor, nn


def eva(setting: Setting, rank: int, lr: float | None = None) -> Trainee:
    """A fresh model with PEFT's LoRA, whose A and ranks follow from the inputs of the layers.

    The ranks are ``rank`` on average and at most twice that (PEFT's rho of 2). They may be 0.
    """
    model = setting.model()
    config = LoraConfig(
        r=rank,
        lora_alpha=round(SCALING * rank),
        target_modules=linear_layers(setting, model),
        modules_to_save=[*setting.heads] or None,
        init_lora_weights="eva",
        eva_config=EvaConfig(rho=2.0),
    )
    wrapped = get_peft_model(model, config).eval()  # type: ignore[arg-type]
    # PEFT takes labels for those of tokens, and those of a classifier are not.
    batches = [{key: value for key, value in batch.items() if key != "labels"} for batch in setting.batches]
    initialize_lora_eva_weights(wrapped, batches, prepare_layer_inputs_fn=_inputs, show_progress_bar=False)
    return setting.trainee(wrapped.train(), lr)


def _inputs(layer_input: tuple[Tensor, ...], tokens: Tensor, name: str) -> Tensor:
    """Rows of a layer's inputs: of the tokens that are no padding, or, in a pooler, all."""
    (inputs,) = layer_input
    # PEFT hashes a view of one dimension.
    return tokens_of(inputs, tokens, name) if inputs.ndim == 3 else inputs.contiguous()


def eva_ranks(model: nn.Module, setting: Setting) -> dict[str, int]:
    """Ranks by layer; 0 where EVA took the adapter away."""
    prefix = "base_model.model."
    layers = {name.removeprefix(prefix): part for name, part in model.named_modules() if isinstance(part, LoraLayer)}
    return {
        name: layers[name].r["default"] if name in layers else 0 for name in linear_layers(setting, setting.model())
    }


def peft_parameters(model: nn.Module) -> int:
    """Numbers in the factors of PEFT's LoRA."""
    return sum(p.numel() for name, p in model.named_parameters() if ".lora_" in name)
