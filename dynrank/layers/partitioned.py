"""What lower rooms ask about a parameter that DeepSpeed's ZeRO-3 has parted among processes, and left empty."""

import torch
from torch import nn


def is_partitioned(parameter: nn.Parameter) -> bool:
    """Whether ZeRO-3 has parted ``parameter``, which may be whole for a moment."""
    return hasattr(parameter, "ds_id")


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """The shape of ``parameter``, also if ZeRO-3 has left an empty tensor."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))
