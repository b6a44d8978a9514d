"""The settings of loading a model: the group ``model`` of a configuration, and its only defaults."""

from typing import Literal

from dynrank.errors import Name, validated


@validated("model")
class ModelSettings:
    """The keys of ``model``; training and ``dynrank plan`` read the same ones.

    Attributes:
        dtype: dtype of the frozen base; auto is that of the model's config. The adapter and a new head are float32.
        quantization: packs the linear layers of the base by bitsandbytes: nf4 (QLoRA, arXiv:2305.14314, with quantised
            scales) or int8 (LLM.int8(), arXiv:2208.07339). All other weights have ``dtype``, and nf4 multiplies in it.
        gradient_checkpointing: whether blocks save only their inputs and run again in the backward.
        attention: the implementation in transformers; auto is sdpa if the model supports it, else eager.
        revision: branch, tag or commit on the hub; None is the main branch.
        trust_remote_code: whether to run code that comes with the model's files. Read that code first.
    """

    dtype: Literal["auto", "float32", "bfloat16"] = "float32"
    quantization: Literal["none", "nf4", "int8"] = "none"
    gradient_checkpointing: bool = False
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    revision: Name | None = None
    trust_remote_code: bool = False
