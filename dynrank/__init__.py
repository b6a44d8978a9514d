"""dynrank: LoRA adapters whose rank changes while they train. Names load on first use, so importing costs nothing."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dynrank.adapters.load import load_adapter, swap_adapter
    from dynrank.adapters.read import read_adapter
    from dynrank.adapters.save import save_adapter
    from dynrank.change.predict import predict
    from dynrank.change.resize import resize
    from dynrank.errors import ConfigurationError
    from dynrank.layers.finding import lora_layers
    from dynrank.layers.merging import merge
    from dynrank.layers.placing import add_lora
    from dynrank.run.config import compose

__version__ = "0.1.0"

_HOMES = {
    "ConfigurationError": "dynrank.errors",
    "add_lora": "dynrank.layers.placing",
    "compose": "dynrank.run.config",
    "load_adapter": "dynrank.adapters.load",
    "lora_layers": "dynrank.layers.finding",
    "merge": "dynrank.layers.merging",
    "predict": "dynrank.change.predict",
    "read_adapter": "dynrank.adapters.read",
    "resize": "dynrank.change.resize",
    "save_adapter": "dynrank.adapters.save",
    "swap_adapter": "dynrank.adapters.load",
}
__all__ = [
    "ConfigurationError",
    "add_lora",
    "compose",
    "load_adapter",
    "lora_layers",
    "merge",
    "predict",
    "read_adapter",
    "resize",
    "save_adapter",
    "swap_adapter",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'dynrank' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
