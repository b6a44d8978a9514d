"""What ``dynrank inspect`` shows of an adapter: a table of its layers, and a picture of their spectra."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dynrank.adapters.inspection import LayerSpectrum, inspect_adapter
from dynrank.output.change_table import layer_kinds
from dynrank.output.console import empty_table, print_facts, print_table
from dynrank.output.picture import check_plot, save_plot

__all__ = ["print_spectra", "show_adapter"]

SHARES = (0.9, 0.99)  # of the energy


def show_adapter(folder: Path, plot: Path | None) -> None:
    """Print the layers of the adapter in ``folder``, and draw their singular values into ``plot``.

    Raises:
        ConfigurationError: if the adapter cannot be used, or the picture cannot be written.
    """
    if plot is not None:
        check_plot(plot)
    layers = inspect_adapter(folder)
    print_spectra(layers)
    if plot is not None:
        from dynrank.output.plots import spectra_figure  # matplotlib is an extra

        spectra = {layer.layer: layer.singular_values for layer in layers}
        save_plot(spectra_figure(spectra, {}, "singular values of the updates", layer_kinds(spectra)), plot)
        print_facts({"plot": plot})


def print_spectra(layers: Sequence[LayerSpectrum]) -> None:
    """Print a line per layer, and totals."""
    headings = ["layer", "d_out x d_in", "rank", "alpha", "scaling", "sigma max", "sigma min"]
    headings += [f"{share:.0%} energy" for share in SHARES]
    table = empty_table("LoRA layers of the adapter", *headings, "effective rank", "parameters")
    for layer in layers:
        table.add_row(
            layer.layer,
            f"{layer.shape[0]} x {layer.shape[1]}",
            str(layer.rank),
            f"{layer.alpha:g}",
            f"{layer.scaling:g}",
            f"{layer.singular_values[0]:.3g}",
            f"{layer.singular_values[-1]:.3g}",
            *(str(layer.energy_rank(share)) for share in SHARES),
            f"{layer.effective_rank:.1f}",
            f"{layer.parameters:,}",
        )
    table.add_section()
    ranks = [layer.rank for layer in layers], *([layer.energy_rank(share) for layer in layers] for share in SHARES)
    rank, *energies = (f"{sum(column) / len(layers):.1f} (mean)" for column in ranks)
    effective = f"{sum(layer.effective_rank for layer in layers) / len(layers):.1f} (mean)"
    total = f"{sum(layer.parameters for layer in layers):,}"
    table.add_row(f"{len(layers)} layers", "", rank, "", "", "", "", *energies, effective, total)
    print_table(table)
