"""What a run says that goes on from an adapter (``lora.from``): its ranks, and whether the base may be another."""

from pathlib import Path

from lightning.pytorch import LightningModule
from omegaconf import DictConfig

from dynrank.adapters.base import read_base
from dynrank.adapters.read import Adapter
from dynrank.app.models.names import stored_source
from dynrank.callbacks import RankScheduler
from dynrank.layers.finding import lora_layers
from dynrank.output.console import span


def start_facts(
    config: DictConfig, adapter: Adapter, module: LightningModule, scheduler: RankScheduler
) -> dict[str, str]:
    """The adapter and the ranks from which a run goes on, what becomes of them, and the name of another base.

    An adapter that knows the weights of its base has been compared with those of the run; any other only names it.
    """
    said = f"the adapter {config.lora['from']}, at rank {span([layer.rank for _, layer in lora_layers(module)])}"
    if not scheduler.driver.stages:
        said += "; the ranks stay, as no schedule was chosen that changes them (schedule=early_budget does)"
    else:
        said += f", which the schedule {config.schedule._target_.rpartition('.')[2]} changes"
    base = adapter.config.base_model_name_or_path
    # A task of your own need not name its model.
    model = config.task.get("model")
    known = not base or read_base(Path(adapter.source)).fingerprints
    if known or model in (None, base, stored_source(str(base))):
        return {"goes on from": said}
    return {"goes on from": said, "another base": f"the adapter names {base}, and the run has task.model={model}"}
