"""Moving averages of a model's weights (EMA, SWA) through a change of its ranks.

A change is linear in each factor: ``A' = T_a A`` and ``B' = B T_b``. An average is linear, too. So the same maps turn
the average of the old factors into the average that the run would have had in the new coordinates. A separate
truncation of the average would keep more of its function at that moment, but in other coordinates than the model's:
the next update would then average numbers that do not belong together.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from dynrank.errors import ConfigurationError
from dynrank.layers.base import RankedLayer
from dynrank.layers.finding import lora_layers
from dynrank.linalg import RankChange, joined, split


def averaged_layers(
    averages: Iterable[nn.Module], layers: Mapping[str, RankedLayer]
) -> list[tuple[nn.Module, dict[str, RankedLayer]]]:
    """(model, its LoRA layers by name) of each average; an average is a model, or torch's AveragedModel of one."""
    found = []
    for average in averages:
        module: nn.Module = average.module if isinstance(average, AveragedModel) else average
        own = dict(lora_layers(module))
        wrong = sorted(own.keys() ^ layers.keys())
        wrong += [name for name in own.keys() & layers.keys() if own[name].rank != layers[name].rank]
        if wrong:
            raise ConfigurationError(
                f"an average must have the model's LoRA layers at the same ranks, {wrong[:3]} differ; make the average "
                "from the model as it is now, and pass it to every dynrank.resize (averages)"
            )
        found.append((module, own))
    return found


@torch.no_grad()
def moved_average(layer: RankedLayer, change: RankChange) -> tuple[Tensor, Tensor]:
    """lora_A and lora_B of the averaged ``layer`` after ``change``, in their own dtypes and on their own device.

    In a new direction the row of lora_A is that of the model.
    """
    device, count = layer.lora_A.device, layer.num_products
    from_A, from_B, rows = (t.to(device) for t in (change.from_A, change.from_B, change.lora_A))
    is_new = from_A.eq(0).all(dim=-1, keepdim=True)
    old_A, old_B = split(layer.lora_A.double(), count, 0), split(layer.lora_B.double(), count, 1)
    lora_A = joined(torch.where(is_new, split(rows.double(), count, 0), from_A @ old_A), 0)
    lora_B = joined(from_B.mT @ old_B, 1)
    return lora_A.to(layer.lora_A.dtype), lora_B.to(layer.lora_B.dtype)
