"""The output of ``dynrank inspect``: a table of an adapter's layers, and a picture of their singular values."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dynrank.adapters.read import read_adapter
from dynrank.adapters.squeeze import LayerSpectrum, inspect
from dynrank.errors import ConfigurationError
from dynrank.output.console import empty_table, print_facts, print_table, shape_of_update
from dynrank.targets import Budget

# Shares of the energy for which the table shows how many directions have them.
SHARES = (0.9, 0.99)
# Shares of the parameters for which --gates shows the rank of each layer.
BUDGETS = (0.5, 0.25)

# {share of the parameters: {layer: rank that it keeps}}.
Kept = Mapping[float, Mapping[str, int]]


def show_adapter(folder: Path, plot: Path | None, examples: Mapping[str, Any] | None) -> None:
    """Print the layers of the adapter in ``folder``, and draw their singular values into ``plot``.

    With ``examples``, the arguments of :class:`dynrank.commands.gates.Gated`, the table also shows the ranks after a
    squeeze by gates.
    """
    layers = inspect(folder)
    kept = dict[float, dict[str, int]]()
    if examples is not None:
        # This slow import loads the training code, which is needed only with gates.
        from dynrank.commands.gates import Gated

        gated = Gated(read_adapter(folder), **examples)
        parameters = sum(layer.parameters for layer in layers)
        for share in BUDGETS:
            directions = gated.kept(Budget(int(share * parameters), by="weight"))
            kept[share] = {name: len(keep) for name, keep in directions.items()}
    print_spectra(layers, kept)
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


def print_spectra(layers: Sequence[LayerSpectrum], kept: Kept) -> None:
    """Print a line per layer, and totals."""
    counts = {f"{share:.0%} energy": [layer.energy_rank(share) for layer in layers] for share in SHARES}
    counts |= {f"rank in {share:.0%}": [ranks[layer.layer] for layer in layers] for share, ranks in kept.items()}
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
