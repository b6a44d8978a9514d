"""README.md of an adapter: its base, its training, its results, and how to use it."""

import re
from pathlib import Path
from typing import Any

from dynrank import __version__
from dynrank.adapters.sidecar_files import label_names
from dynrank.layers.finding import lora_layers
from dynrank.models.names import public_name
from dynrank.output.layer_kinds import layer_kinds
from dynrank.output.slots import slot_rank
from dynrank.output.whole_file import whole_file
from dynrank.private import source_of
from dynrank.run.report.templates import template
from dynrank.run.summary import Summary


def write_card(folder: Path, model: Any, summary: Summary, steps: int, command: str | None) -> None:
    """Write README.md into the adapter's ``folder``; ``command`` trains such an adapter, None if it is not known."""
    base = public_name(source_of(model))
    ranks: dict[str, list[int]] = {}
    layers = {name: layer.rank for name, layer in lora_layers(model)}
    for name, kind in layer_kinds(layers).items():
        ranks.setdefault(kind, []).append(layers[name])
    page = template("card.md.jinja").render(
        base=base,
        on_hub=bool(re.fullmatch(r"[\w.-]+/[\w.-]+", base)) and not Path(base).exists(),
        kind=type(model).__name__,
        labels=label_names(model),
        ranks=ranks,
        slot=slot_rank(max(layers.values())),
        summary=summary,
        steps=steps,
        command=command,
        version=__version__,
    )
    with whole_file(folder / "README.md") as part:
        part.write_text(page, encoding="utf-8")
