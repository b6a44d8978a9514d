"""The output of ``dynrank squeeze``."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from dynrank.adapters.read import Adapter, open_stored
from dynrank.adapters.squeeze import Squeezed, squeeze
from dynrank.output.console import print_facts, print_table
from dynrank.output.ranks import change_table
from dynrank.targets import Target


def print_squeeze(source: Path, out: Path, examples: Mapping[str, Any] | None, **options: Any) -> None:
    """Squeeze the adapter in ``source`` into ``out`` with ``options`` of ``squeeze``, and print the result.

    ``examples`` are arguments of :class:`dynrank.commands.gates.Gated`, which chooses the directions. If they are None,
    the singular values choose.
    """
    loss: dict[str, object] = {}

    def by_gates(adapter: Adapter, target: Target) -> Squeezed:
        # This slow import loads the training code, which a cut by weight does not need.
        from dynrank.commands.gates import Gated

        gated = Gated(adapter, **examples or {})
        before = gated.loss()
        squeezed = gated.squeeze(adapter, target)
        loss["loss"] = f"{before:.4f} → {gated.loss():.4f}, on the {len(gated.examples)} examples that chose"
        return squeezed

    layers = squeeze(source, out, **options, way=None if examples is None else by_gates)
    print_table(change_table("squeezed adapter", layers, {layer.layer: layer.rank_after for layer in layers}))
    with open_stored(source) as adapter:
        before = sum(layer.parameters for layer in adapter.layers.values())
        others = adapter.others
    after = sum(layer.rank_after * layer.params_per_rank for layer in layers)
    facts = {"parameters": f"{before:,} → {after:,} ({after / before:.1%})", **loss}
    print_facts(facts | (_of_file(source, out, others) if source.is_file() else {"files": out}))


def _of_file(source: Path, out: Path, others: Collection[str]) -> dict[str, object]:
    sizes = " → ".join(f"{file.stat().st_size / 1e6:.1f} MB" for file in (source, out))
    if not others:
        return {"file": f"{out}, {sizes}"}
    kinds = sorted({key.removesuffix(".weight").rpartition(".")[2] for key in others})
    copied = f"{len(others)} tensors of layers that are not plain LoRA: {', '.join(kinds)}"
    return {"copied": copied, "file": f"{out}, {sizes}"}
