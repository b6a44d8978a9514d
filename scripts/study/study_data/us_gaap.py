"""Line items of companies' financial reports with their sections, from the package edgartools.

A JSON file of the package (MIT) describes the US-GAAP tags in 32,240 reports to the SEC: the standard items of a tag,
and their section of the statement. Only this file is read. The package itself, which needs pandas and more, is never
imported.
"""

import json
import random
import re
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dynrank.app.tasks.data.splits import Rows
from dynrank.errors import ConfigurationError, checked_call

_FILE = Path("xbrl", "standardization", "gaap_mappings.json")
_INSTALL = "pip install --no-deps edgartools==5.62.1"
# A cash-flow item without a section has a standard item that names the section after these words.
_CASH_FLOW = "Net Cash from "
# The fewest items of a section that is used.
_MIN_ITEMS = 50
# Shares of each section.
_TEST = 0.2
_VAL = 0.1
_WORD_STARTS = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|(?<=[a-z])(?=[0-9])")


@checked_call
def line_items(seed: int) -> Rows:
    """Line items as prompts and their sections as answers, by split: 70, 10 and 20% of each section, at random.

    Sections with at least 50 items are used. Tags that the package maps to several items, IFRS tags, and items without
    a section are left out. Of texts that differ only by case, spaces and digits, one is kept; if their sections differ,
    none. ``seed`` is that of the splits.
    """
    by_key: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for tag, entry in _mappings().items():
        section = _section(tag, entry)
        if section is not None:
            text = _WORD_STARTS.sub(" ", tag).lower()
            by_key[re.sub("[^a-z]", "", text)].append((text, section))
    by_section: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for _, same in sorted(by_key.items()):
        if len({section for _, section in same}) == 1:
            by_section[same[0][1]].append(min(same))
    draw = random.Random(seed)
    parts: dict[str, list[tuple[str, str]]] = {"train": [], "val": [], "test": []}
    for _, items in sorted(by_section.items()):
        if len(items) >= _MIN_ITEMS:
            draw.shuffle(items)
            test = round(len(items) * _TEST)
            val = test + round(len(items) * _VAL)
            parts["test"] += items[:test]
            parts["val"] += items[test:val]
            parts["train"] += items[val:]
    if not parts["train"]:
        raise ConfigurationError(f"the installed edgartools holds its mappings in another form: {_INSTALL}")
    for part in parts.values():
        # After this line, a few items in a row are from different sections.
        draw.shuffle(part)
    return {
        split: [{"prompt": f"Line item: {text}\nSection:", "answer": f" {section}"} for text, section in part]
        for split, part in parts.items()
    }


def _mappings() -> dict[str, Any]:
    spec = find_spec("edgar")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigurationError(f"data=us_gaap needs the package edgartools: {_INSTALL}")
    file = Path(spec.submodule_search_locations[0], _FILE)
    try:
        mappings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{str(file)!r} cannot be read ({error}): {_INSTALL}") from None
    return mappings if isinstance(mappings, dict) else {}


def _section(tag: str, entry: Any) -> str | None:
    if not tag.isalnum() or not isinstance(entry, dict) or len(entry.get("standard_tags") or ()) != 1:
        # Such an item is about the file, is "ifrs:…" or "ifrs-full_…", or has several meanings.
        return None
    item: str = entry.get("display_name") or ""
    section: str | None = entry.get("section")
    return section or (item.removeprefix(_CASH_FLOW) if item.startswith(_CASH_FLOW) else None)
