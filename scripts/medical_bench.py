"""What the studies share: MiniLM on medical_terms, a training loop that any adapter can go through, their results."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from hydra.utils import instantiate
from torch import Tensor, nn

from dynrank import add_lora, compose, lora_layers
from dynrank.change.gates import Gates
from dynrank.change.predict import spectra
from dynrank.errors import ConfigurationError
from dynrank.models.pretrained import load_classifier
from dynrank.run.config import plain
from dynrank.targets import Budget, LayerState
from dynrank.tasks.optimizers import make_optimizer

RESULTS = Path(__file__).resolve().parent / "results"
BATCH = 32
HEAD = "classifier"  # trained whole, at its own rate
SCALING = 2.0  # of every adapter in every arm, whatever its rank

Batch = Mapping[str, Tensor]


class Setting:
    """Data and model of the default task for one seed: splits, order of batches, head and dropout follow from it.

    ``overrides`` are further values of the configuration, such as task.limit=80.
    """

    def __init__(self, seed: int, steps: int, overrides: Sequence[str] = ()) -> None:
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.config = compose([f"seed={seed}", f"task.batch_size={BATCH}", *overrides])
        self.seed, self.steps = seed, steps
        task = instantiate(self.config.task, _convert_="all")
        task.setup("fit")
        self.labels = len(task.labels)
        loader = task.train_dataloader()
        self.batches: list[Batch] = list(islice(chain.from_iterable(repeat(loader)), steps))
        self.val: list[Batch] = list(task.val_dataloader()[0])
        self.test: list[Batch] = list(task.test_dataloader()[0])

    def classifier(self) -> nn.Module:
        """The pre-trained encoder with a fresh head, in training mode."""
        torch.manual_seed(self.seed)
        return load_classifier(self.config.task.model, self.labels).train()

    def trainee(self, model: nn.Module, lr: float | None = None) -> Trainee:
        """``model`` with the default optimizer for its trainable parameters; ``lr`` replaces the adapter's rate."""
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        head = [p for name, p in trainable.items() if HEAD in name.split(".")]
        adapter = [p for name, p in trainable.items() if HEAD not in name.split(".")]
        options = plain(self.config.optimizer) | ({} if lr is None else {"lr": lr})
        made: Any = make_optimizer(adapter, head, self.steps, **options)
        return Trainee(self, model, made["optimizer"], made["lr_scheduler"]["scheduler"])


class Diverged(ArithmeticError):
    """The training loss is not a number any more."""


@dataclass
class Trainee:
    """A model in training: a deep copy goes on from the same state, with the same batches and dropout."""

    setting: Setting
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Any
    done: int = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Trainee:
        parts = deepcopy((self.model, self.optimizer, self.scheduler), memo)
        return Trainee(self.setting, *parts, done=self.done)

    def train(self, until: int, after_step: Callable[[int], None] | None = None) -> None:
        """Make optimizer steps up to ``until``; ``after_step`` is called with their number, gradients still there."""
        self.model.train()
        while self.done < until:
            torch.manual_seed(self.setting.seed * 1_000_003 + self.done)
            loss = self.model(**self.setting.batches[self.done]).loss  # PEFT's AdaLoRA adds its regularisation here
            if not loss.isfinite():
                raise Diverged(f"the loss is {float(loss)} at step {self.done}")
            loss.backward()
            self.optimizer.step()
            self.scheduler.step()
            self.done += 1
            if after_step is not None:
                after_step(self.done)
            self.optimizer.zero_grad()

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> tuple[float, float]:
        """(cross-entropy, accuracy), mean over examples."""
        self.model.eval()
        loss = right = count = 0.0
        for batch in batches:
            logits = self.model(**{key: value for key, value in batch.items() if key != "labels"}).logits
            loss += float(F.cross_entropy(logits, batch["labels"], reduction="sum"))
            right += float((logits.argmax(-1) == batch["labels"]).sum())
            count += len(logits)
        return loss / count, right / count


def adapted(setting: Setting, rank: int, lr: float | None = None, rank_map: Any = None) -> Trainee:
    """A fresh model with an adapter of ``rank`` on every linear layer of the encoder; ``rank_map`` has others."""
    model = setting.classifier()
    add_lora(model, rank=rank, alpha=SCALING * rank, modules_to_save=[HEAD], rank_map=rank_map)
    for _, layer in lora_layers(model):
        layer.scaling = SCALING
    return setting.trainee(model, lr)


def adapter_parameters(model: nn.Module) -> int:
    """Numbers in the LoRA factors."""
    return sum(p.numel() for _, layer in lora_layers(model) for p in (layer.lora_A, layer.lora_B))


def budget_ranks(model: nn.Module, budget: Budget, gates: Gates) -> dict[str, int]:
    """Ranks by layer that share out ``budget`` by what the gates say."""
    layers = dict(lora_layers(model))
    found = spectra(layers, gates)
    shapes = {name: (layer.lora_B.shape[0], layer.lora_A.shape[1]) for name, layer in layers.items()}
    states = {n: LayerState(layer.rank, *shapes[n], values=found[n]) for n, layer in layers.items()}
    return budget.ranks(states)


class Table:
    """Rows of a study in a CSV file that grows as the study runs; what it holds already is not run again.

    Args:
        file: made with its first row.
        fields: names of the columns.
        keys: those that tell a row from the others.
    """

    def __init__(self, file: Path, fields: Sequence[str], keys: Sequence[str]) -> None:
        self.file, self.fields, self.keys = file, list(fields), list(keys)
        self.rows: list[dict[str, str]] = []
        if file.exists():
            with file.open(newline="", encoding="utf-8") as text:
                self.rows = list(csv.DictReader(text))
            if self.rows and list(self.rows[0]) != self.fields:
                raise ConfigurationError(
                    f"{file} holds the columns {list(self.rows[0])}, not {self.fields}; move it away, or set --out"
                )

    def find(self, *key: object) -> dict[str, str] | None:
        """The row of this key, if there is one."""
        wanted = [str(value) for value in key]
        return next((row for row in self.rows if [row[name] for name in self.keys] == wanted), None)

    def lacks(self, *key: object) -> bool:
        return self.find(*key) is None

    def add(self, row: Mapping[str, object]) -> None:
        self.rows.append({name: _text(row[name]) for name in self.fields})
        self.file.parent.mkdir(parents=True, exist_ok=True)
        part = self.file.with_suffix(".part")
        with part.open("w", newline="", encoding="utf-8") as text:
            writer = csv.DictWriter(text, self.fields)
            writer.writeheader()
            writer.writerows(self.rows)
        part.replace(self.file)


def values(rows: Iterable[Mapping[str, str]], column: str, **where: object) -> list[float]:
    """The numbers of ``column`` in the rows that hold ``where``, in their order."""
    return [float(row[column]) for row in rows if all(row[name] == str(value) for name, value in where.items())]


def _text(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
