"""The plugin for axolotl: ``plugins: [dynrank.integrations.axolotl.RankPlugin]`` in the YAML of a run.

Source: axolotl 0.19, ``axolotl/integrations/base.py``.
"""

from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel

from dynrank.callbacks import RankTrainerCallback
from dynrank.errors import ConfigurationError
from dynrank.integrations import callback_of


class RankArgs(BaseModel):
    """The key that the plugin adds to axolotl's YAML: a schedule's name, its arguments, ``rank_map`` and ``kernel``."""

    dynrank: dict[str, Any] | None = None


class RankPlugin(BasePlugin):  # type: ignore[misc]
    """Changes the ranks of an axolotl run with ``adapter: lora`` or ``qlora``.

    Without the key ``dynrank`` all layers get one budget of half the rank at a third of the run.

    Example::

        plugins: [dynrank.integrations.axolotl.RankPlugin]
        dynrank: {schedule: early_budget, final_rank: 8, rank_map: {o_proj: {pinned: true}}}
        adapter: lora
        lora_r: 32
    """

    def get_input_args(self) -> str:
        return f"{RankArgs.__module__}.{RankArgs.__qualname__}"

    def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list[RankTrainerCallback]:
        """The callback; axolotl passes it to the Trainer's constructor.

        Raises:
            ConfigurationError: if the run trains no LoRA, or the key ``dynrank`` cannot be used.
        """
        if cfg.adapter not in ("lora", "qlora"):
            raise ConfigurationError(f"RankPlugin needs adapter: lora or qlora, got adapter: {cfg.adapter}", "adapter")
        return [callback_of(cfg.dynrank, cfg.lora_r)]
