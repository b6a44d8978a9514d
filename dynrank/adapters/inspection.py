"""The singular values of each layer of a stored adapter; neither a model nor PEFT is needed."""

from dataclasses import dataclass
from pathlib import Path

import torch

from dynrank.adapters.read import open_stored
from dynrank.adapters.stored import StoredLayer, one_thread
from dynrank.linalg import effective_rank, energy_rank


@dataclass(frozen=True)
class LayerSpectrum(StoredLayer):
    """A layer of a stored adapter and the singular values of its update.

    Attributes:
        layer: name of the layer in the model.
        singular_values: singular values of the update (scaling included), descending, one for each direction.
    """

    layer: str
    singular_values: tuple[float, ...]

    def energy_rank(self, share: float) -> int:
        """How many directions keep ``share`` of the energy (sum of squared singular values); 0 for a zero update."""
        return energy_rank(torch.tensor(self.singular_values), share) if any(self.singular_values) else 0

    @property
    def effective_rank(self) -> float:
        """Effective rank of the singular values (Roy and Vetterli, 2007); 0 for a zero update."""
        return effective_rank(torch.tensor(self.singular_values)) if any(self.singular_values) else 0.0


def inspect_adapter(path: str | Path) -> list[LayerSpectrum]:
    """The layers of a LoRA, ordered by name, from a PEFT adapter's folder or a file; one is in memory at a time."""
    with open_stored(path) as adapter, one_thread():
        spectra = []
        for name, stored in adapter.layers.items():
            values = tuple(adapter.singular_values(name).tolist())
            spectra.append(LayerSpectrum(**vars(stored), layer=name, singular_values=values))
        return spectra
