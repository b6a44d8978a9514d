"""The output of ``dynrank inspect`` and ``dynrank squeeze``: an adapter's layers, before and after."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from dynrank.adapters.load import swap_adapter
from dynrank.adapters.read import open_adapter, open_stored, read_adapter
from dynrank.adapters.squeeze import LayerSpectrum, inspect, squeeze, squeeze_target, write_squeezed
from dynrank.app.console import print_facts
from dynrank.change.reports import LayerReport
from dynrank.errors import ConfigurationError
from dynrank.output.console import empty_table, print_table, shape_of_update
from dynrank.output.output_folder import check_free
from dynrank.output.ranks import change_table
from dynrank.targets import Budget

# Shares of the energy for which the table shows how many directions have them.
SHARES = (0.9, 0.99)
# Shares of the parameters for which --gates shows the rank of each layer.
BUDGETS = (0.5, 0.25)

# {share of the parameters: {layer: rank that it keeps}}.
Kept = Mapping[float, Mapping[str, int]]


def show_adapter(folder: Path, plot: Path | None, examples: Mapping[str, Any] | None) -> None:
    """Print the layers of the adapter in ``folder``, and draw their singular values into ``plot``.

    With ``examples``, the arguments of :class:`dynrank.app.commands.gates.Gated`, the table also shows the ranks after
    a squeeze by gates.
    """
    layers = inspect(folder)
    kept = dict[float, dict[str, int]]()
    if examples is not None:
        # This slow import loads the training code, which is needed only with gates.
        from dynrank.app.commands.gates import Gated

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


def print_squeeze(source: Path, out: Path, examples: Mapping[str, Any] | None, **options: Any) -> None:
    """Squeeze the adapter in ``source`` into ``out`` with ``options`` of ``squeeze``, and print the result.

    ``examples`` are arguments of :class:`dynrank.app.commands.gates.Gated`, which chooses the directions. If they are
    None, the singular values choose.
    """
    loss: dict[str, object] = {}
    if examples is None:
        layers = squeeze(source, out, **options)
    else:
        layers, loss["loss"] = _squeeze_by_gates(source, out, examples, **options)
    print_table(change_table("squeezed adapter", layers, {layer.layer: layer.rank_after for layer in layers}))
    with open_stored(source) as adapter:
        before = sum(layer.parameters for layer in adapter.layers.values())
        others = adapter.others
    after = sum(layer.rank_after * layer.params_per_rank for layer in layers)
    facts = {"parameters": f"{before:,} → {after:,} ({after / before:.1%})", **loss}
    print_facts(facts | (_of_file(source, out, others) if source.is_file() else {"files": out}))


def _squeeze_by_gates(
    source: Path, out: Path, examples: Mapping[str, Any], *, rank: int | None, energy: float | None, budget: str | None
) -> tuple[list[LayerReport], str]:
    """(a report for each layer, what became of the loss of the examples)."""
    if energy is not None:
        raise ConfigurationError(
            f"--gates takes --rank or --budget, got --energy {energy}, a share of squared singular values"
        )
    if source.is_file():
        raise ConfigurationError(f"--gates takes the folder of a PEFT adapter, got the file {str(source)!r}")
    check_free(out, source)
    # This slow import loads the training code, which a cut by weight does not need.
    from dynrank.app.commands.gates import Gated

    with open_adapter(source) as adapter:
        target = squeeze_target(adapter, rank, energy, budget)
        gated = Gated(adapter, **examples)
        before = gated.loss()
        layers = write_squeezed(adapter, gated.kept(target), out)
    swap_adapter(gated.model, out)
    return layers, f"{before:.4f} → {gated.loss():.4f}, on the {len(gated.examples)} examples that chose"


def _of_file(source: Path, out: Path, others: Collection[str]) -> dict[str, object]:
    sizes = " → ".join(f"{file.stat().st_size / 1e6:.1f} MB" for file in (source, out))
    if not others:
        return {"file": f"{out}, {sizes}"}
    kinds = sorted({key.removesuffix(".weight").rpartition(".")[2] for key in others})
    copied = f"{len(others)} tensors of layers that are not plain LoRA: {', '.join(kinds)}"
    return {"copied": copied, "file": f"{out}, {sizes}"}
