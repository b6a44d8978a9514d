"""An adapter as a file of 4 bits, which every function of dynrank reads as it lies, and back to PEFT's file."""

from pathlib import Path

import torch

from dynrank.adapters.config import adapter_folder
from dynrank.adapters.precision import Rounding
from dynrank.adapters.read import Adapter, open_adapter
from dynrank.adapters.sidecar_files import new_adapter_folder
from dynrank.adapters.stored import Factors
from dynrank.adapters.write import rewrite_adapter


def pack(source: str | Path, out: str | Path) -> Rounding:
    """Write the adapter in ``source`` to ``out`` in 4 bits: codes of NF4 (arXiv:2305.14314) with a scale for every 64.

    Directions are balanced first, so the update changes by about 12%. Nothing is trained or calibrated. Heads
    (modules_to_save) are in bfloat16. PEFT reads the adapter after :func:`unpack`; everything in dynrank reads it as
    it lies. ``out`` is written whole or not at all.

    Args:
        source: folder of a PEFT LoRA adapter, or of the run that made it.
        out: new or empty folder.

    Returns:
        How far the packed updates are from those of ``source``.

    Raises:
        ConfigurationError: if the adapter cannot be used, or ``out`` is not free or cannot be written.
    """
    source = adapter_folder(Path(source))
    with open_adapter(source) as adapter, new_adapter_folder(Path(out), source) as folder:
        lost = rewrite_adapter(folder, adapter, _factors(adapter), packs=True)
    assert lost is not None
    return lost


def unpack(source: str | Path, out: str | Path) -> None:
    """Write the packed adapter in ``source`` to ``out`` as PEFT's files in float32, with the same updates.

    Arguments and errors are those of :func:`pack`.
    """
    source = adapter_folder(Path(source))
    with open_adapter(source) as adapter, new_adapter_folder(Path(out), source) as folder:
        rewrite_adapter(folder, adapter, _factors(adapter), torch.float32)


def _factors(adapter: Adapter) -> dict[str, Factors]:
    return {name: (*adapter.factors(name)[::-1], layer.scaling) for name, layer in adapter.layers.items()}
