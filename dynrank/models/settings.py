"""How a model is loaded: the group ``model`` of a configuration, whose defaults stand here alone."""

from __future__ import annotations

from typing import Literal

from dynrank.errors import Name, validated


@validated("model")
class ModelSettings:
    """The keys of ``model``; training and ``dynrank plan`` read the same ones.

    Attributes:
        dtype: of the frozen base; auto is what the model's config says. The adapter and a fresh head are float32.
        quantization: packs the linear layers of the base by bitsandbytes: nf4 (QLoRA, arXiv:2305.14314, with its
            scales quantised, too) or int8 (LLM.int8(), arXiv:2208.07339). ``dtype`` is that of the rest, and nf4
            multiplies in it.
        gradient_checkpointing: blocks keep their inputs alone and are computed again in the backward.
        attention: of transformers; auto is sdpa where the model has it, else eager.
        revision: branch, tag or commit on the hub; None is the main branch.
        trust_remote_code: run code that comes with the model's files. Read it before.
    """

    dtype: Literal["auto", "float32", "bfloat16"] = "float32"
    quantization: Literal["none", "nf4", "int8"] = "none"
    gradient_checkpointing: bool = False
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    revision: Name | None = None
    trust_remote_code: bool = False
