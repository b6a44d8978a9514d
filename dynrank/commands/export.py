"""The output of ``dynrank export``: what was written, its memory in the server, and the command that serves it."""

from pathlib import Path
from typing import Any

from dynrank.adapters.export import export_adapter
from dynrank.output.console import print_facts
from dynrank.output.ranks import slot_line

# Bytes of a number in a slot, the memory that a server reserves for an adapter, in bfloat16.
BYTES = 2


def print_export(source: Path, out: Path, **options: Any) -> None:
    """Export an adapter, and print the result; ``options`` are those of :func:`export_adapter`."""
    done = export_adapter(source, out, **options)
    ranks = {name: layer.rank for name, layer in done.layers.items()}
    facts: dict[str, object] = {"layers": f"{len(ranks)}, {sum(ranks.values()) / len(ranks):.1f} ranks on average"}
    if done.rank is not None:
        width = sum(layer.width for layer in done.layers.values())
        own = sum(layer.parameters for layer in done.layers.values())
        facts["ranks"] = slot_line(ranks) if options["to"] == "vllm" else f"{done.rank} in every layer"
        facts["a slot"] = f"{_mib(width * done.rank)} in bfloat16; at the layers' own ranks {_mib(own)}"
    print_facts({**facts, "files": f"{done.out}, {done.bytes / 1e6:.2f} MB", "serve": done.line})


def _mib(numbers: int) -> str:
    return f"{numbers * BYTES / 2**20:.2f} MiB"
