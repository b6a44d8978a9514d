"""The output of ``dynrank squeeze``, and the squeeze by gates."""

from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from dynrank.adapters.read import Adapter, open_stored
from dynrank.adapters.squeeze import Squeezed, squeeze_adapter
from dynrank.change.greedy import ByWeight
from dynrank.change.resize import report_of, resize
from dynrank.layers.base import params_per_rank
from dynrank.layers.finding import lora_layers
from dynrank.output.console import print_facts, print_table
from dynrank.output.ranks import change_table
from dynrank.targets import Target


def print_squeeze(source: Path, out: Path, examples: Mapping[str, Any] | None, **options: Any) -> None:
    """Squeeze the adapter in ``source`` into ``out`` with ``options`` of ``squeeze_adapter``, and print the result.

    ``examples`` are arguments of :class:`dynrank.commands.gates.WatchedAdapter`, whose gates choose the directions. If
    they are None, the singular values choose.
    """
    loss: dict[str, object] = {}
    way = partial(_by_gates, examples=examples, facts=loss) if examples is not None else None
    layers = squeeze_adapter(source, out, **options, way=way)
    print_table(change_table("squeezed adapter", layers, {layer.layer: layer.rank_after for layer in layers}))
    with open_stored(source) as adapter:
        before, others = sum(layer.parameters for layer in adapter.layers.values()), adapter.others
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


def _by_gates(adapter: Adapter, target: Target, *, examples: Mapping[str, Any], facts: dict[str, object]) -> Squeezed:
    """Squeeze to the directions that the loss of the examples needs; ``facts`` gets the loss before and after."""
    # This slow import loads the training code, which a cut by weight does not need.
    from dynrank.commands.gates import WatchedAdapter

    watched = WatchedAdapter(adapter, **examples)
    layers, before = dict(lora_layers(watched.model)), watched.loss()
    values = ByWeight(layers).values()
    ranks = watched.ranks(target)
    changed = {report.layer: report for report in resize(watched.model, ranks, gates=watched.gates)}
    facts["chosen by"] = watched.gates.seen
    facts["loss"] = f"{before:.4f} → {watched.loss():.4f}, on the examples that chose the directions"
    factors, reports = {}, []
    for name, layer in layers.items():
        lora_B, lora_A = adapter.factors(name)
        if name in changed:
            lora_A, lora_B = layer.lora_A.detach().to(lora_A), layer.lora_B.detach().to(lora_B)
        factors[name] = lora_A, lora_B, layer.scaling
        reports.append(changed.get(name) or report_of(name, layer.rank, values[name], params_per_rank(layer)))
    return factors, reports
