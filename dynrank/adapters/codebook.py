"""Numbers as codes of a few bits: the index of a level in a codebook, and a scale for every 64 numbers of a row.

The levels are those of NF4, of QLoRA (arXiv:2305.14314, appendix E). The scale of a group is its least-squares one, in
float16. Nothing is trained or calibrated.
Shape suffixes: N = rows, W = numbers in a row, G = groups of a row, K = levels.
"""

from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP = 64
# The levels of NF4, for numbers whose largest is 1.
NF4_LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
# Starting scales of a group, as shares of its largest number; the best one after the rounds is kept. A negative one
# mirrors the levels, of which NF4's are not symmetric.
_STARTS = (0.6, 0.7, 0.8, 0.9, 1.0, -0.6, -0.7, -0.8, -0.9, -1.0)
# Each round takes the least-squares scale of the present codes, and then the codes of that scale.
_ROUNDS = 4


@torch.no_grad()
def encode(values_NW: Tensor, levels_K: Tensor) -> tuple[Tensor, Tensor]:
    """(codes (N, W) uint8, scales (N, G) float16) of rows of numbers; a group never spans two rows."""
    width = values_NW.shape[1]
    groups = ceil(width / GROUP)
    values = F.pad(values_NW.float(), (0, groups * GROUP - width)).reshape(-1, GROUP).contiguous()
    # Numbers beyond the end of a row have no code; not every codebook has a level for zero.
    real = torch.arange(groups * GROUP).view(groups, GROUP).lt(width).repeat(len(values_NW), 1)
    edges = (levels_K[1:] + levels_K[:-1]) / 2
    largest = values.abs().amax(1)
    best = torch.full_like(largest, torch.inf)
    scales = torch.zeros_like(largest, dtype=torch.float16)
    codes = torch.zeros_like(values, dtype=torch.uint8)
    for start in _STARTS:
        scale = largest * start
        for step in range(_ROUNDS + 1):
            scale_16 = scale.to(torch.float16)
            # With a scale of zero any code means zero.
            divisor = torch.where(scale_16 == 0, torch.inf, scale_16.float())
            code = torch.bucketize(values / divisor[:, None], edges)
            level = levels_K[code] * real
            if step < _ROUNDS:
                scale = (values * level).sum(1) / level.square().sum(1).clamp(min=1e-30)
        error = (values - scale_16.float()[:, None] * level).square().sum(1)
        better = error < best
        best = torch.where(better, error, best)
        scales = torch.where(better, scale_16, scales)
        codes = torch.where(better[:, None], code.to(torch.uint8), codes)
    return codes.view(len(values_NW), -1)[:, :width].contiguous(), scales.view(len(values_NW), groups)


def decode(codes_NW: Tensor, scales_NG: Tensor, levels_K: Tensor) -> Tensor:
    """(N, W) float32: the numbers of :func:`encode`, rounded."""
    width = codes_NW.shape[1]
    scales = scales_NG.float().repeat_interleave(GROUP, dim=1)[:, :width]
    return levels_K[codes_NW.int()] * scales
