"""Folders as finished runs leave them, without the training; and a reader of pages that takes no fault."""

import csv
import json
import math
from html.parser import HTMLParser
from xml.etree.ElementTree import TreeBuilder

import pytest
import torch
from torch import nn

import dynrank

NASTY = "<b>&\"'</b>"
FIELDS = ["step", "layer", "rank_before", "rank_after", "energy_kept", "predicted_error", "reason"]
FIELDS += ["brought", "brought_error"]
VOID = {"meta", "link", "br", "hr", "img", "input"}


def write_run(folder, *, blocks=2, drops=((10, 4), (20, 2)), steps=30, rank=8, undone=(), kinds=("up", NASTY)):
    """A run of ``blocks`` times ``kinds`` layers, which all drop, and a head that keeps its rank.

    Drops are (step, rank from there on), ``undone`` those that were taken back.
    """
    torch.manual_seed(0)
    layers = nn.ModuleList(nn.ModuleDict({kind: nn.Linear(12, 16) for kind in kinds}) for _ in range(blocks))
    model = dynrank.add_lora(nn.ModuleDict({"layers": layers, "head": nn.Linear(12, 16)}), rank=rank, alpha=16)
    names = [name for name, _ in dynrank.lora_layers(model)]
    rows = []
    now = rank
    for step, to in sorted([*drops, *undone]):
        taken_back = (step, to) in undone
        reason = f"undone: val/loss 1 → 2 ({NASTY})" if taken_back else f"fraction {NASTY}"
        brought = {name: [step / 100, 0.05] if "up" in name else ["", ""] for name in names if name != "head"}
        rows += [[step, name, now, to, 0.9, 0.1, reason, *brought[name]] for name in brought]
        now = now if taken_back else to
    for _, layer in dynrank.lora_layers(model):
        nn.init.normal_(layer.lora_B)
    dynrank.resize(model, {name: now for name in names if name != "head"})
    folder.mkdir(parents=True, exist_ok=True)
    dynrank.save_adapter(model, folder / "adapter")
    metrics = [["step", "test/loss", "train/loss", "val/loss"]]
    metrics += [[step, "", 2 * math.exp(-step / steps) + 0.1 * math.sin(step), ""] for step in range(steps)]
    metrics += [[step, "", "", 2 * math.exp(-step / steps)] for step in range(4, steps, max(1, steps // 5))]
    for name, table in (("rank_history", [FIELDS, *rows]), ("metrics", [*metrics, [steps, 1.25, "", ""]])):
        with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(table)
    summary = {
        "test": {"test/loss": 1.25},
        "final_ranks": {name: layer.rank for name, layer in dynrank.lora_layers(model)},
        "changes": [],
        "parameters": {"adapter": 1234, "trainable": 2345, "total": 34567},
        "seconds": 12.0,
        "tokens_per_second": 250.0,
        "peak_memory_bytes": 2**30,
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / ".hydra").mkdir(exist_ok=True)
    config = f"lora:\n  rank: {rank}\nschedule: {{}}\nnote: {json.dumps(NASTY)}\n"
    (folder / ".hydra" / "config.yaml").write_text(config)
    (folder / ".hydra" / "overrides.yaml").write_text(f"- lora.rank={rank}\n- note={NASTY!r}\n")
    return folder


class Page(HTMLParser):
    """A page as a tree, in ``root``; every element must be closed, in order."""

    def __init__(self, text):
        super().__init__()
        self._tree = TreeBuilder()
        self._open = []
        self.feed(text)
        self.close()
        assert not self._open, f"never closed: {self._open}"
        self.root = self._tree.close()

    def handle_starttag(self, tag, attrs):
        self._tree.start(tag, dict(attrs))
        if tag in VOID:
            self._tree.end(tag)
        else:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag, f"</{tag}> does not close the last element"
        self._tree.end(tag)

    def handle_data(self, data):
        self._tree.data(data)

    def texts(self, path):
        return ["".join(element.itertext()) for element in self.root.iterfind(f".//{path}")]

    def tables(self):
        """Caption -> rows, the headings first."""
        found = [("".join(table.find("caption").itertext()), table.iter("tr")) for table in self.root.iter("table")]
        return {caption: [["".join(cell.itertext()) for cell in row] for row in rows] for caption, rows in found}

    def facts(self):
        """Name -> value of what stands at the top."""
        return dict(zip(self.texts("dt"), self.texts("dd"), strict=True))

    def table(self, start):
        return next(rows for caption, rows in self.tables().items() if caption.startswith(start))


@pytest.fixture(scope="session")
def run_folder():
    return write_run


@pytest.fixture(scope="session")
def nasty():
    return NASTY


@pytest.fixture(scope="session")
def page_of():
    """Reads a page's file."""
    return lambda file: Page(file.read_text(encoding="utf-8"))
