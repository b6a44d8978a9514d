"""The state of a layer that a target sees, and the base class of all targets.

A shrinking target never raises a rank and a growing one never lowers a rank; both respect the layer's bounds.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from dynrank.errors import described
from dynrank.linalg import OfShape

UNBOUNDED = 2**31


@dataclass(frozen=True, repr=False)
class LayerState(OfShape):
    """The state of one layer.

    Attributes:
        rank: its rank now.
        d_out, d_in: its shape.
        lowest, highest: bounds of its next rank, those of the rank map included. In a pinned layer both are the rank
            itself; in the last stage both are the layer's own final rank, if it has one.
        final_rank: the final rank in the rank map; None if it has none.
        values: (rank,) descending, the singular values of the update (scaling included); None unless the target
            ``needs`` them.
        importance: the score by which a pool is shared: the decrease of the loss by the layer's updates, at least 0,
            plus its standard error; None if unknown, or unless the target ``needs`` it.
        num_products: how many products of this shape and rank the layer stacks; 1 in a plain layer.

    >>> layer = LayerState(16, d_out=64, d_in=32, lowest=4)
    >>> layer.params_per_rank, layer.shrunk(2), layer.shrunk(20)
    (96, 4, 16)
    """

    rank: int
    d_out: int = UNBOUNDED
    d_in: int = UNBOUNDED
    lowest: int = 1
    highest: int = UNBOUNDED
    final_rank: int | None = None
    values: Tensor | None = field(default=None, repr=False)
    num_products: int = 1
    importance: float | None = None

    __repr__ = described

    def shrunk(self, rank: int) -> int:
        """``rank`` clipped to the bounds, and never above the rank now."""
        return min(self.rank, max(self.lowest, min(self.highest, rank)))

    def grown(self, rank: int) -> int:
        """``rank`` clipped to the bounds, and never below the rank now."""
        return max(self.rank, min(self.highest, max(self.lowest, rank)))

    def uniform(self, rank: int) -> int:
        """The rank by which the layer counts in the pool of ``rank``: its own where it has one, pinned or final.

        Bounds of the rank map do not count: they move parameters between layers, and the pool stays.
        """
        if self.lowest == self.highest:
            return self.lowest
        return min(self.max_rank, max(self.final_rank or 1, rank))


class Target(ABC):
    """The rank that each layer should change to. Subclasses write :meth:`ranks`, and ``needs`` if they read more.

    Attributes:
        needs: "values" if the target reads ``LayerState.values``, "importance" if it reads ``LayerState.importance``.

    >>> class Half(Target):
    ...     def ranks(self, layers):
    ...         return {name: layer.shrunk(layer.rank // 2) for name, layer in layers.items()}
    >>> Half().ranks({"q_proj": LayerState(rank=16)})
    {'q_proj': 8}
    """

    def __repr__(self) -> str:
        """A call with the attributes, as checkpoints compare it; without an address, which differs in each process."""
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in vars(self).items())})"

    @property
    def needs(self) -> tuple[str, ...]:
        return ()

    @abstractmethod
    def ranks(self, layers: Mapping[str, LayerState]) -> dict[str, int]:
        """The next rank of every layer."""
