"""Folders as finished runs leave them, without the training; and what stands on the page of a run."""

import csv
import json
import math
from xml.etree import ElementTree

import torch
from torch import nn

import dynrank

NASTY = "<b>&\"'</b>"
FIELDS = ["step", "layer", "rank_before", "rank_after", "importance", "importance_error"]
FIELDS += ["energy_kept", "predicted_error", "reason"]
STEPS = 30


def write_run(folder, *, drops=((10, 4), (20, 2)), undone=(), **summary):
    """A run of two times two layers, which all drop from rank 8, and a head that keeps its rank.

    Drops are (step, rank from there on), ``undone`` those that were taken back; ``summary`` is more of summary.json.
    """
    torch.manual_seed(0)
    layers = nn.ModuleList(nn.ModuleDict({kind: nn.Linear(12, 16) for kind in ("up", NASTY)}) for _ in range(2))
    model = dynrank.add_lora(nn.ModuleDict({"layers": layers, "head": nn.Linear(12, 16)}), rank=8, alpha=16)
    names = [name for name, _ in dynrank.lora_layers(model)]
    rows = []
    changes = []
    now = 8
    for step, to in sorted([*drops, *undone]):
        taken_back = (step, to) in undone
        reason = f"undone: val/loss 1 → 2 ({NASTY})" if taken_back else f"fraction {NASTY}"
        changes.append({"step": step, "reason": reason, "undone": taken_back})
        importance = {name: [step / 100, 0.05] if "up" in name else ["", ""] for name in names if name != "head"}
        rows += [[step, name, now, to, *importance[name], 0.9, 0.1, reason] for name in importance]
        now = now if taken_back else to
    for _, layer in dynrank.lora_layers(model):
        nn.init.normal_(layer.lora_B)
    dynrank.resize(model, {name: now for name in names if name != "head"}, optimizers=())
    folder.mkdir(parents=True, exist_ok=True)
    dynrank.save_adapter(model, folder / "adapter")
    metrics = [["step", "test/loss", "train/loss", "val/loss"]]
    metrics += [[step, "", 2 * math.exp(-step / STEPS) + 0.1 * math.sin(step), ""] for step in range(STEPS)]
    metrics += [[step, "", "", 2 * math.exp(-step / STEPS)] for step in range(4, STEPS, 6)]
    for name, table in (("rank_history", [FIELDS, *rows]), ("metrics", [*metrics, [STEPS, 1.25, "", ""]])):
        with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(table)
    ended = {
        "test": {"test/loss": 1.25},
        "final_ranks": {name: layer.rank for name, layer in dynrank.lora_layers(model)},
        "changes": changes,
        "parameters": {"adapter": 1234, "trainable": 2345, "total": 34567},
        "seconds": 12.0,
        "tokens_per_second": 250.0,
        "peak_memory_bytes": 2**30,
        "steps": STEPS,
    }
    (folder / "summary.json").write_text(json.dumps(ended | summary))
    (folder / ".hydra").mkdir(exist_ok=True)
    config = f"lora:\n  rank: 8\nschedule: {{}}\nnote: {json.dumps(NASTY)}\n"
    (folder / ".hydra" / "config.yaml").write_text(config)
    (folder / ".hydra" / "overrides.yaml").write_text(f"- lora.rank=8\n- note={NASTY!r}\n")
    return folder


class Page:
    """A page in ``root``, which a parser of XML takes: every element is closed, in order."""

    def __init__(self, file):
        self.root = ElementTree.fromstring(file.read_text(encoding="utf-8"))

    def texts(self, path):
        return ["".join(element.itertext()) for element in self.root.iterfind(f".//{path}")]

    def table(self, start):
        """The rows of the table whose caption begins so, the headings first."""
        (table,) = [t for t in self.root.iter("table") if "".join(t.find("caption").itertext()).startswith(start)]
        return [["".join(cell.itertext()) for cell in row] for row in table.iter("tr")]
