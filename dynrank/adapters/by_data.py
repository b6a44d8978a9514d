"""What the loss of examples needs of an adapter: the effect of each direction, and the directions that a cut keeps.

Every direction has a gate, a factor of 1 before it. Let c be the gradient of an example's loss by all gates. Dropping
the directions S changes the mean loss by about ``-sum_S g + 1/2 sum_{S x S} H``; g is the mean of c, and H that of
``n c c^T``, where the loss of an example is the mean of n terms (tokens): if the model's probabilities are right, this
is the Hessian's expected value.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from dynrank.errors import ConfigurationError
from dynrank.layers.base import RankedLayer
from dynrank.linalg import directions_of, split


def effects(layers: Mapping[str, RankedLayer], losses: Iterable[Tensor], scale: float = 1) -> dict[str, Tensor]:
    """{layer: (examples, rank) float64 gradients of the examples' losses by the gates of the layer's directions}.

    A gate multiplies a column b of B, so the gradient by it is the scalar product of b and the gradient by b. Losses
    are multiplied by ``scale`` before the backward pass: without it, small gradients would become zero in float16.
    """
    # For each product, U sqrt(S) of its SVD, and the map from the gradient by B to the gradient by U sqrt(S).
    sides: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for name, layer in layers.items():
        pairs = [(b, directions_of(b, a)) for b, a in layer.products()]
        sides[name] = [(b.detach().double() @ found.from_B, found.from_A.mT) for b, found in pairs]
    rows: dict[str, list[Tensor]] = {name: [] for name in layers}
    for loss in losses:
        factors = [layer.lora_B for layer in layers.values()]
        gradients = torch.autograd.grad(loss * scale, factors, allow_unused=True)
        for (name, layer), gradient in zip(layers.items(), gradients, strict=True):
            if gradient is None or not gradient.isfinite().all():
                what = "no gradient" if gradient is None else "a gradient that is not finite"
                raise ConfigurationError(f"{what} of an example in --data reaches {name!r}; squeeze without --gates")
            row = torch.zeros(layer.rank, dtype=torch.float64)
            parts = split(gradient.double() / scale, layer.num_products, 1)
            for (columns, to_columns), part in zip(sides[name], parts, strict=True):
                row[: columns.shape[1]] += (columns * (part.mT @ to_columns)).sum(0).cpu()
            rows[name].append(row)
    return {name: torch.stack(each) for name, each in rows.items()}


def greedy(
    effects: Mapping[str, Tensor],
    terms: Tensor,
    widths: Mapping[str, int],
    lowest: int,
    pool: int,
) -> dict[str, Tensor]:
    """{layer: the directions to keep, ascending} so that all layers have at most ``pool`` parameters together.

    The direction that adds least to the estimated loss per parameter (``widths``: those of a direction) is dropped
    again and again. Every layer keeps ``lowest`` directions in any case. Of equal candidates the smallest is dropped.
    ``terms`` are the numbers of terms in the examples' losses, (examples,).
    """
    names = sorted(effects)
    counts = [effects[name].shape[1] for name in names]
    slices = dict(zip(names, torch.split_with_sizes(torch.arange(sum(counts)), counts), strict=True))
    owners = [name for name, count in zip(names, counts, strict=True) for _ in range(count)]
    gradients = torch.cat([effects[name] for name in names], dim=1)
    # The Hessian is the mean of the products of these.
    roots = gradients * terms.double().sqrt()[:, None]
    sizes = torch.tensor([widths[name] for name in owners], dtype=torch.float64)
    left = dict(zip(names, counts, strict=True))
    total = int(sizes.sum())
    cost = 0.5 * roots.square().mean(0) - gradients.mean(0)
    kept = torch.ones(len(owners), dtype=torch.bool)
    free = torch.tensor([left[name] > lowest for name in owners])
    while total > pool and free.any():
        prices = torch.where(free, cost / sizes, torch.inf)
        gone = len(owners) - 1 - int(prices.flip(0).argmin())
        name = owners[gone]
        cost += roots.mT @ roots[:, gone] / len(roots)
        kept[gone] = free[gone] = False
        left[name] -= 1
        total -= widths[name]
        if left[name] == lowest:
            free[slices[name]] = False
    return {name: kept[slices[name]].nonzero().flatten() for name in effects}
