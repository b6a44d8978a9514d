"""The output of ``dynrank inspect`` and ``dynrank squeeze``: an adapter's layers, before and after."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dynrank.adapters.read import open_stored, weights_file
from dynrank.adapters.squeeze import LayerSpectrum, inspect, squeeze
from dynrank.app.console import print_facts
from dynrank.errors import ConfigurationError
from dynrank.output.console import empty_table, print_table, shape_of_update

# Shares of the energy for which the table shows how many directions have them.
SHARES = (0.9, 0.99)


def show_adapter(folder: Path, plot: Path | None) -> None:
    """Print the layers of the adapter in ``folder``, and draw their singular values into ``plot``."""
    layers = inspect(folder)
    print_spectra(layers)
    if plot is not None:
        # matplotlib is an optional dependency.
        from dynrank.plot import spectra

        figure = spectra(layers)
        try:
            figure.savefig(plot)
        # matplotlib raises a ValueError for an unknown format.
        except (OSError, ValueError) as error:
            raise ConfigurationError(f"cannot write --plot {str(plot)!r}: {error}") from None
        print_facts({"plot": plot})


def print_spectra(layers: Sequence[LayerSpectrum]) -> None:
    """Print a line per layer, and totals."""
    counts = {f"{share:.0%} energy": [layer.energy_rank(share) for layer in layers] for share in SHARES}
    headings = ["layer", "d_out x d_in", "rank", "alpha", "scaling", "sigma max", "sigma min", *counts]
    table = empty_table("LoRA layers of the adapter", *headings, "effective rank", "parameters")
    for layer, *own in zip(layers, *counts.values(), strict=True):
        table.add_row(
            layer.layer,
            shape_of_update(layer.experts, *layer.shape),
            str(layer.rank),
            f"{layer.alpha:g}",
            f"{layer.scaling:g}",
            f"{layer.singular_values[0]:.3g}",
            f"{layer.singular_values[-1]:.3g}",
            *map(str, own),
            f"{layer.effective_rank:.1f}",
            f"{layer.parameters:,}",
        )
    table.add_section()
    columns = [layer.rank for layer in layers], *counts.values()
    rank, *others = (f"{sum(column) / len(layers):.1f} (mean)" for column in columns)
    effective = f"{sum(layer.effective_rank for layer in layers) / len(layers):.1f} (mean)"
    total = f"{sum(layer.parameters for layer in layers):,}"
    table.add_row(f"{len(layers)} layers", "", rank, "", "", "", "", *others, effective, total)
    print_table(table)


def print_squeeze(source: Path, out: Path, **options: Any) -> None:
    """Squeeze the adapter in ``source`` into ``out`` with ``options`` of ``squeeze``, and print the result."""
    layers = squeeze(source, out, **options)
    print_table(layers.table())
    with open_stored(source) as adapter:
        before = sum(layer.parameters for layer in adapter.layers.values())
        others = adapter.others
    after = sum(layer.rank_after * layer.params_per_rank for layer in layers)
    facts = {"parameters": f"{before:,} → {after:,} ({after / before:.1%})"}
    if layers.rounding is not None:
        facts["rounding"] = str(layers.rounding)
    files = (source, out)
    if not source.is_file():
        files = (weights_file(source), weights_file(out))
    elif others:
        kinds = sorted({key.removesuffix(".weight").rpartition(".")[2] for key in others})
        facts["copied"] = f"{len(others)} tensors of layers that are not plain LoRA: {', '.join(kinds)}"
    sizes = " → ".join(f"{file.stat().st_size / 1e6:.2f} MB" for file in files)
    print_facts({**facts, "files": f"{out}, {sizes}"})
