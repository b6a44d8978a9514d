"""The output of ``dynrank squeeze``."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from dynrank.adapters.load import swap_adapter
from dynrank.adapters.read import open_adapter, open_stored
from dynrank.adapters.squeeze import squeeze, squeeze_target, write_squeezed
from dynrank.change.resize import LayerReport
from dynrank.errors import ConfigurationError
from dynrank.output.console import print_facts, print_table
from dynrank.output.output_folder import check_free
from dynrank.output.ranks import change_table


def print_squeeze(source: Path, out: Path, examples: Mapping[str, Any] | None, **options: Any) -> None:
    """Squeeze the adapter in ``source`` into ``out`` with ``options`` of ``squeeze``, and print the result.

    ``examples`` are arguments of :class:`dynrank.commands.gates.Gated`, which chooses the directions. If they are None,
    the singular values choose.
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
    from dynrank.commands.gates import Gated

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
