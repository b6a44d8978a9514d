"""The output of ``dynrank inspect`` and ``dynrank squeeze``: an adapter's layers, before and after."""

from pathlib import Path
from typing import Any

from dynrank.adapters.read import open_stored, weights_file
from dynrank.adapters.squeeze import inspect, squeeze
from dynrank.app.console import print_facts
from dynrank.errors import ConfigurationError
from dynrank.output.console import empty_table, print_table, shape_of_update


def show_adapter(folder: Path, plot: Path | None) -> None:
    """Print a line for each layer of the adapter in ``folder``, and draw their singular values into ``plot``."""
    layers = inspect(folder)
    headings = ["layer", "d_out x d_in", "rank", "alpha", "scaling", "sigma max", "sigma min", "90% energy"]
    table = empty_table("LoRA layers of the adapter", *headings, "99% energy", "effective rank", "parameters")
    for layer in layers:
        table.add_row(
            layer.layer,
            shape_of_update(layer.experts, *layer.shape),
            str(layer.rank),
            f"{layer.alpha:g}",
            f"{layer.scaling:g}",
            f"{layer.singular_values[0]:.3g}",
            f"{layer.singular_values[-1]:.3g}",
            # How many directions have such a share of the energy.
            *(str(layer.energy_rank(share)) for share in (0.9, 0.99)),
            f"{layer.effective_rank:.1f}",
            f"{layer.parameters:,}",
        )
    table.caption = f"{len(layers)} layers, {sum(layer.parameters for layer in layers):,} parameters"
    print_table(table)
    if plot is not None:
        # matplotlib is an optional dependency.
        from dynrank.plot import spectra

        try:
            spectra(layers).savefig(plot)
        # matplotlib raises a ValueError for an unknown format.
        except (OSError, ValueError) as error:
            raise ConfigurationError(f"cannot write --plot {str(plot)!r}: {error}") from None
        print_facts({"plot": plot})


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
