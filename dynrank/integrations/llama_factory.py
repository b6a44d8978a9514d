"""Training by LLaMA-Factory with ranks that change: ``python -m dynrank.integrations.llama_factory lora.yaml``.

It takes what ``llamafactory-cli train`` takes, and the key ``dynrank``. LLaMA-Factory's command has no key for
callbacks; its function ``run_exp`` takes them as an argument. In several processes:
``torchrun --nproc_per_node 2 -m dynrank.integrations.llama_factory lora.yaml``.

Source: LLaMA-Factory 0.9.5, ``llamafactory/train/tuner.py``.
"""

from collections.abc import Mapping
from typing import Any

from llamafactory.hparams import read_args
from llamafactory.train.tuner import run_exp

from dynrank.errors import ConfigurationError
from dynrank.integrations import callback_of


def train(args: Mapping[str, Any] | None = None) -> None:
    """Train as ``run_exp`` does.

    Args:
        args: the contents of LLaMA-Factory's YAML, with the key ``dynrank``: the name of a ``schedule``, its arguments,
            ``rank_map`` and ``kernel``. None: those of the file that the command line names. Without ``dynrank`` all
            layers get one budget of half the rank at a third of the run.

    Raises:
        ConfigurationError: if the run trains no LoRA, or the key ``dynrank`` cannot be used.

    Example::

        train({"finetuning_type": "lora", "lora_rank": 32, "dynrank": {"final_rank": 8}, ...})
    """
    given = read_args(args)
    if not isinstance(given, Mapping):
        raise ConfigurationError(
            f"the first argument must be a YAML or JSON file of LLaMA-Factory, got {given!r}", "args"
        )
    given = dict(given)
    kind = given.get("finetuning_type", "lora")
    if kind != "lora":
        raise ConfigurationError(f"ranks change with finetuning_type: lora, got {kind}", "finetuning_type")
    # 8 is LLaMA-Factory's default.
    callback = callback_of(given.pop("dynrank", None), given.get("lora_rank", 8))
    run_exp(given, callbacks=[callback])


if __name__ == "__main__":
    train()
