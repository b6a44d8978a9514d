"""dynrank: LoRA adapters whose rank changes while they train. Names load on first use, so importing costs nothing."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dynrank.adapter import save_adapter
    from dynrank.adapter_fit import read_adapter
    from dynrank.adapter_loading import load_adapter, swap_adapter
    from dynrank.config import compose
    from dynrank.errors import ConfigurationError
    from dynrank.layers.inject import add_lora, lora_layers, merge
    from dynrank.resizing import predict, resize

__version__ = "0.1.0"

_HOMES = {
    "ConfigurationError": "dynrank.errors",
    "add_lora": "dynrank.layers.inject",
    "compose": "dynrank.config",
    "load_adapter": "dynrank.adapter_loading",
    "lora_layers": "dynrank.layers.inject",
    "merge": "dynrank.layers.inject",
    "predict": "dynrank.resizing",
    "read_adapter": "dynrank.adapter_fit",
    "resize": "dynrank.resizing",
    "save_adapter": "dynrank.adapter",
    "swap_adapter": "dynrank.adapter_loading",
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
