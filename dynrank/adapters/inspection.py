"""What ``dynrank inspect`` says of a stored PEFT adapter: how much of each layer's rank is in use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.table import Table

from dynrank.adapters.config import alpha_of
from dynrank.adapters.stored import StoredAdapter, one_thread
from dynrank.errors import ConfigurationError
from dynrank.linalg import effective_rank, energy_rank, singular_values
from dynrank.output.change_table import layer_kinds
from dynrank.output.console import table_console

__all__ = ["LayerSpectrum", "check_plot", "inspect_adapter", "plot_inspection", "print_inspection"]

_FORMATS = (".png", ".pdf", ".svg")


@dataclass(frozen=True)
class LayerSpectrum:
    """A layer of a stored adapter.

    Attributes:
        layer: its name in the model.
        shape: (d_out, d_in) of its update.
        alpha: by the adapter's settings.
        scaling: factor of ``lora_B @ lora_A``.
        singular_values: of the update (scaling included), descending, one for each direction.
    """

    layer: str
    shape: tuple[int, int]
    alpha: float
    scaling: float
    singular_values: tuple[float, ...]

    @property
    def rank(self) -> int:
        return len(self.singular_values)

    @property
    def parameters(self) -> int:
        return self.rank * sum(self.shape)

    def energy_rank(self, share: float) -> int:
        """Directions that keep ``share`` of the energy (sum of squared singular values); 0 for an update of zero."""
        return energy_rank(torch.tensor(self.singular_values), share) if any(self.singular_values) else 0

    @property
    def effective_rank(self) -> float:
        """Of the singular values (Roy and Vetterli, 2007); 0 for an update of zero."""
        return effective_rank(torch.tensor(self.singular_values)) if any(self.singular_values) else 0.0


def inspect_adapter(folder: str | Path) -> list[LayerSpectrum]:
    """The layers of a PEFT LoRA adapter, by name; one pair of factors is in memory at a time.

    Raises:
        ConfigurationError: if it cannot be used, or a factor holds NaN or inf (it names the layer).
    """
    with StoredAdapter(Path(folder)) as adapter, one_thread():
        return [
            LayerSpectrum(
                layer=name,
                shape=adapter.shape(name),
                alpha=alpha_of(adapter.config, name),
                scaling=adapter.scaling(name),
                singular_values=tuple((singular_values(*adapter.factors(name)) * abs(adapter.scaling(name))).tolist()),
            )
            for name in adapter.ranks
        ]


def print_inspection(layers: Sequence[LayerSpectrum]) -> None:
    """Print a line per layer, and totals."""
    table = Table(title="LoRA layers of the adapter")
    table.add_column("layer", overflow="fold", min_width=20)
    headings = ("d_out x d_in", "rank", "alpha", "scaling", "sigma max", "sigma min", "90% energy", "99% energy")
    for heading in (*headings, "effective rank", "parameters"):
        table.add_column(heading, justify="right", overflow="fold")
    for layer in layers:
        table.add_row(
            layer.layer,
            f"{layer.shape[0]} x {layer.shape[1]}",
            str(layer.rank),
            f"{layer.alpha:g}",
            f"{layer.scaling:g}",
            f"{layer.singular_values[0]:.3g}",
            f"{layer.singular_values[-1]:.3g}",
            *(str(layer.energy_rank(share)) for share in (0.9, 0.99)),
            f"{layer.effective_rank:.1f}",
            f"{layer.parameters:,}",
        )
    table.add_section()
    sums = [sum(layer.energy_rank(share) for layer in layers) for share in (0.9, 0.99)]
    means = [f"{total / len(layers):.1f} (mean)" for total in (sum(layer.rank for layer in layers), *sums)]
    effective = f"{sum(layer.effective_rank for layer in layers) / len(layers):.1f} (mean)"
    total = f"{sum(layer.parameters for layer in layers):,}"
    table.add_row(f"{len(layers)} layers", "", means[0], "", "", "", "", *means[1:], effective, total)
    table_console().print(table)


def check_plot(file: Path) -> None:
    """Refuse a picture that could not be written.

    Raises:
        ConfigurationError: if matplotlib is missing, or ``file`` has no folder or another kind of name.
    """
    if find_spec("matplotlib") is None:
        raise ConfigurationError("--plot needs matplotlib: pip install 'dynrank[plots]'")
    if file.suffix.lower() not in _FORMATS:
        raise ConfigurationError(f"--plot must end in one of {_FORMATS}, got {str(file)!r}")
    if not file.parent.is_dir() or file.is_dir():
        raise ConfigurationError(f"--plot must be a file in a folder that exists, got {str(file)!r}")


def plot_inspection(layers: Sequence[LayerSpectrum], file: Path) -> None:
    """Draw all spectra, a colour for each kind of layer.

    Raises:
        ConfigurationError: if the picture cannot be written.
    """
    from dynrank.output.plots import plot_spectra  # matplotlib is an extra

    spectra = {layer.layer: layer.singular_values for layer in layers}
    try:
        plot_spectra(spectra, {}, "singular values of the updates", file, layer_kinds(spectra))
    except OSError as error:
        raise ConfigurationError(f"cannot write --plot {str(file)!r}: {error.strerror or error}") from None
