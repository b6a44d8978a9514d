"""dynrank: LoRA adapters whose rank changes while they train. Names load on first use, so importing costs nothing."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

# The same names, for type checkers.
if TYPE_CHECKING:
    from dynrank import plot as plot
    from dynrank.adapters.export import export_adapter as export_adapter
    from dynrank.adapters.load import load_adapter as load_adapter
    from dynrank.adapters.load import swap_adapter as swap_adapter
    from dynrank.adapters.read import read_adapter as read_adapter
    from dynrank.adapters.save import save_adapter as save_adapter
    from dynrank.adapters.squeeze import inspect as inspect
    from dynrank.adapters.squeeze import squeeze as squeeze
    from dynrank.app.runs.config import compose as compose
    from dynrank.app.runs.in_python import run as run
    from dynrank.app.runs.report.record import read_run as read_run
    from dynrank.change.resize import resize as resize
    from dynrank.driver.driver import RankDriver as RankDriver
    from dynrank.driver.training import Training as Training
    from dynrank.driver.validation import validating_change as validating_change
    from dynrank.errors import ConfigurationError as ConfigurationError
    from dynrank.layers.finding import adapter_parameters as adapter_parameters
    from dynrank.layers.finding import lora_layers as lora_layers
    from dynrank.layers.peft_kernel import apply_lora_kernel as apply_lora_kernel
    from dynrank.layers.peft_kernel import remove_lora_kernel as remove_lora_kernel
    from dynrank.layers.peft_layers import follow_checkpoint_ranks as follow_checkpoint_ranks
    from dynrank.layers.placing import add_lora as add_lora
    from dynrank.layers.placing import merge as merge
    from dynrank.output.ranks import ranks as ranks

__version__ = "0.5.0"

_HOMES = {
    "ConfigurationError": "dynrank.errors",
    "RankDriver": "dynrank.driver.driver",
    "Training": "dynrank.driver.training",
    "adapter_parameters": "dynrank.layers.finding",
    "add_lora": "dynrank.layers.placing",
    "apply_lora_kernel": "dynrank.layers.peft_kernel",
    "compose": "dynrank.app.runs.config",
    "export_adapter": "dynrank.adapters.export",
    "follow_checkpoint_ranks": "dynrank.layers.peft_layers",
    "load_adapter": "dynrank.adapters.load",
    "inspect": "dynrank.adapters.squeeze",
    "lora_layers": "dynrank.layers.finding",
    "merge": "dynrank.layers.placing",
    "ranks": "dynrank.output.ranks",
    "read_adapter": "dynrank.adapters.read",
    "read_run": "dynrank.app.runs.report.record",
    "remove_lora_kernel": "dynrank.layers.peft_kernel",
    "resize": "dynrank.change.resize",
    "run": "dynrank.app.runs.in_python",
    "save_adapter": "dynrank.adapters.save",
    "squeeze": "dynrank.adapters.squeeze",
    "swap_adapter": "dynrank.adapters.load",
    "validating_change": "dynrank.driver.validation",
}
__all__ = [*_HOMES, "plot"]


def __getattr__(name: str) -> Any:
    if name == "plot":
        return import_module("dynrank.plot")
    if name not in _HOMES:
        raise AttributeError(f"module 'dynrank' has no attribute {name!r}")
    from dynrank.errors import train_packages

    with train_packages(f"dynrank.{name}"):
        value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
