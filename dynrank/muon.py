"""Muon for the factors of adapters and AdamW for everything else, as one optimizer.

Muon (Jordan, 2024, https://kellerjordan.github.io/posts/muon/) steps along the orthogonal matrix that is nearest to the
momentum, so that a factor learns in all its directions at one speed. The step's root mean square is that of AdamW's
(Liu et al., arXiv:2502.16982), so its learning rates fit. torch.optim.Muon refuses vectors, and launches some twenty
kernels for every matrix; here factors of one shape are one batch of F, with short side R (the rank) and long side N.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from math import sqrt
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer

from dynrank.errors import ConfigurationError, NotNegative, checked_call
from dynrank.private import foreach_add_, foreach_lerp, foreach_lerp_, foreach_mul_

# The coefficients of torch.optim.Muon: steepest at zero, and not convergent to exactly one.
_A = 3.4445
_B = -4.7750
_C = 2.0315
_ITERATIONS = 5
_EPS = 1e-7
# Root mean square of the elements of a step of AdamW at a rate of one.
_RMS = 0.2


class Muon(Optimizer):
    """Nesterov's momentum made orthogonal for matrices; AdamW for vectors, and for groups with ``use_muon=False``.

    A matrix W with gradient G and momentum M, zero at first, R x N or N x R with R <= N:
    ``M <- momentum M + (1 - momentum) G``, ``U = (1 - momentum) G + momentum M``, and
    ``W <- (1 - lr weight_decay) W - 0.2 sqrt(N) lr (U U^T)^(-1/2) U``.

    ::

        Muon([{"params": dynrank.adapter_parameters(model)}, {"params": head, "lr": 4e-3, "use_muon": False}])

    Args:
        params: parameters or param groups. Embeddings and heads belong in groups with ``use_muon=False``.
        lr: learning rate; a rate that suits AdamW suits Muon.
        weight_decay: decoupled weight decay, by Muon and by AdamW.
        momentum: in [0, 1).
    """

    @checked_call
    def __init__(
        self,
        params: Any,
        lr: NotNegative = 1e-3,
        weight_decay: NotNegative = 0.0,
        momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95,
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "use_muon": True}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if any(isinstance(parameter, DTensor) and _by_muon(parameter, group) for parameter in group["params"]):
            self.param_groups.pop()
            raise ConfigurationError(
                "Muon needs whole matrices, but some are sharded by FSDP2; leave them whole by "
                "dynrank.distributed.sharding.shard_frozen, or set use_muon=False in their param group"
            )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        rest = []
        for group in self.param_groups:
            batches = defaultdict(list)
            others = []
            for parameter in group["params"]:
                if not _by_muon(parameter, group):
                    others.append(parameter)
                elif parameter.grad is not None:
                    batches[(*sorted(parameter.shape), parameter.device, parameter.dtype)].append(parameter)
            for batch in batches.values():
                self._step_batch(batch, group)
            if others:
                rest.append({"params": others, "lr": group["lr"], "weight_decay": group["weight_decay"]})
        if rest:
            # AdamW is made anew each time, so that only this optimizer's state is saved, copied and carried.
            adamw = AdamW(rest)
            adamw.state = self.state
            adamw.step()
        return loss

    def _step_batch(self, factors: Sequence[Tensor], group: dict[str, Any]) -> None:
        """Step factors that have one shape or its transpose."""
        factors = sorted(factors, key=_is_tall)
        gradients: Any = [factor.grad for factor in factors]
        for factor in factors:
            if not self.state[factor]:
                self.state[factor]["momentum_buffer"] = torch.zeros_like(factor)
        momenta = [self.state[factor]["momentum_buffer"] for factor in factors]
        foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        directions = foreach_lerp(gradients, momenta, group["momentum"])
        near_FRN = near_polar_factor(torch.stack([u.mT if _is_tall(u) else u for u in directions]))
        wide = sum(not _is_tall(factor) for factor in factors)
        # The matrices are laid out as the factors are, so that one launch adds all.
        near = [*near_FRN[:wide], *near_FRN[wide:].mT.contiguous()]
        if group["weight_decay"]:
            foreach_mul_(factors, 1 - group["lr"] * group["weight_decay"])
        foreach_add_(factors, near, alpha=-group["lr"] * _RMS * sqrt(near_FRN.shape[-1]))


def near_polar_factor(u_FRN: Tensor) -> Tensor:
    """About ``(U U^T)^(-1/2) U`` of each matrix: singular values become 0.68 to 1.2, or stay small where they are tiny.

    These are torch.optim.Muon's five iterations of Newton and Schulz, ``X <- (a + b G + c G^2) X`` with ``G = X X^T``.
    All of these polynomials are of the first G, so they are multiplied as R x R matrices and meet the long side once.
    In float32 this costs less than torch's way in bfloat16, and the error is at least 40 times smaller.
    """
    x_FRN: Tensor = u_FRN.to(torch.promote_types(u_FRN.dtype, torch.float32))
    x_FRN = x_FRN / x_FRN.norm(dim=(-2, -1), keepdim=True).clamp_min(_EPS)
    gram_FRR = x_FRN @ x_FRN.mT
    identity = torch.eye(gram_FRR.shape[-1], dtype=gram_FRR.dtype, device=gram_FRR.device)
    product_FRR = identity
    for _ in range(_ITERATIONS):
        polynomial_FRR = _A * identity + torch.baddbmm(gram_FRR, gram_FRR, gram_FRR, beta=_B, alpha=_C)
        product_FRR = polynomial_FRR @ product_FRR
        gram_FRR = polynomial_FRR @ gram_FRR @ polynomial_FRR
    return (product_FRR @ x_FRN).to(u_FRN.dtype)


def _by_muon(parameter: Tensor, group: dict[str, Any]) -> bool:
    return bool(group["use_muon"]) and parameter.ndim == 2


def _is_tall(matrix: Tensor) -> bool:
    return matrix.shape[0] > matrix.shape[1]
