"""What the arms of the study share: tasks, a training loop for any adapter, and the table of results."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from hydra.utils import instantiate
from pretrain_small import MODELS
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dynrank import RankDriver, Training, __version__, add_lora, compose, lora_layers
from dynrank.app.models.pretrained import head_names, load_causal_lm, load_classifier
from dynrank.app.runs.config import plain
from dynrank.app.tasks.adapter_module import IGNORED
from dynrank.app.tasks.classification import Classification
from dynrank.app.tasks.optimizers import make_optimizer
from dynrank.change.directions import LayerDirections
from dynrank.errors import ConfigurationError
from dynrank.importance.importance import LayerImportance
from dynrank.layers.ranked_layer import RankedLayer
from dynrank.linalg import energy_rank
from dynrank.schedules import Stage
from dynrank.targets import Budget, LayerState
from dynrank.triggers import Run

HERE = Path(__file__).resolve().parent
# Each version has its own.
RESULTS = HERE / "results" / __version__.rpartition(".")[0]
# The scaling of every adapter in every arm, whatever its rank.
SCALING = 2.0

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Work:
    """What a study trains on, and for how long.

    Attributes:
        steps: optimizer steps of a run.
        rates: learning rates that every arm is tried at.
        overrides: values of the configuration, task and batch size among them.
    """

    steps: int
    rates: tuple[float, ...]
    overrides: tuple[str, ...]


_HEADERS = ("task=text", f"task.model={MODELS / 'llama'}", "task.packed=false", "task.max_length=64")
_HEADERS += ("task.data={_target_:study_headers.cpp_headers,_partial_:true,seed:${seed}}", "task.val_examples=400")
_HEADERS += ("model.dtype=bfloat16", "model.attention=eager")
_PYTHON = tuple(part.replace("cpp_headers", "python_code") for part in _HEADERS)
_LM = ("optimizer.warmup_steps=8", "model.dtype=bfloat16")
TASKS = {
    "medical_terms": Work(240, (5e-4, 1e-3, 2e-3), ("task=medical_terms", "task.batch_size=32")),
    # Six times the steps on 600 terms, with 600 for validation and for test, so that a high rank overfits.
    "few_medical_terms": Work(1440, (5e-4, 1e-3), ("task=medical_terms", "task.batch_size=32", "task.limit=600")),
    "financial_terms": Work(96, (1e-3, 2e-3, 4e-3), ("task=financial_terms", "task.batch_size=16", *_LM)),
    # The model of pretrain_small.py, which has read English and Python, learns C++.
    "cpp_headers": Work(1000, (1e-3, 2e-3, 4e-3), _HEADERS),
    # So does a task to which no rule was tuned.
    "python_code": Work(1000, (1e-3, 2e-3, 4e-3), _PYTHON),
    "code_completion": Work(96, (1e-3, 2e-3, 4e-3), ("task=code_completion", "task.batch_size=4", *_LM)),
}


class Setting:
    """Data and model of a task for one seed: splits, order of batches, head and dropout follow from it.

    ``overrides`` are values of the configuration, such as task=medical_terms or task.limit=80.
    """

    def __init__(self, seed: int, steps: int, overrides: Sequence[str] = ()) -> None:
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.config = compose([f"seed={seed}", *overrides], folder=HERE / "conf")
        self.seed = seed
        self.steps = steps
        # Names of the heads of the model that was made last.
        self.heads: set[str] = set()
        self.task = instantiate(self.config.task, _convert_="all")
        self.task.setup("fit")
        examples = self.task.examples["train"]
        drawn = drawn_batches(list(examples["length"]), self.task.batch_size, self.task.seed, steps)
        self.batches: list[Batch] = list(DataLoader(examples, batch_sampler=drawn, collate_fn=self.task.collate))
        self.val: list[Batch] = list(self.task.val_dataloader()[0])
        self.test: list[Batch] = list(self.task.test_dataloader()[0])

    def model(self) -> nn.Module:
        """The pre-trained model in training mode, a classifier with a fresh head."""
        torch.manual_seed(self.seed)
        name = self.task.model
        settings = self.task.settings
        if isinstance(self.task, Classification):
            model = load_classifier(name, len(self.task.labels), settings=settings)
        else:
            model = load_causal_lm(name, settings=settings)
        self.heads = set(head_names(model))
        return model.train()

    def trainee(self, model: nn.Module, lr: float | None = None) -> Trainee:
        """``model`` with an optimizer for its trainable parameters: the configuration's, but for ``lr``."""
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        head = [p for name, p in trainable.items() if self.heads.intersection(name.split("."))]
        adapter = [p for name, p in trainable.items() if self.heads.isdisjoint(name.split("."))]
        options = plain(self.config.optimizer) | ({} if lr is None else {"lr": lr})
        made: Any = make_optimizer(adapter, head, self.steps, **options)
        return Trainee(self, model, made["optimizer"], made["lr_scheduler"]["scheduler"])


def drawn_batches(lengths: Sequence[int], batch_size: int, seed: int, count: int) -> list[list[int]]:
    """The first ``count`` batches of the study: indices that are drawn with replacement, as in all of its rows.

    Epochs would let the training loss fall at the start of each pass over the data. Ten batches at a time are sorted by
    length, which saves padding.
    """
    batches = list[list[int]]()
    for chunk in range(-(-count // 10)):
        (state,) = np.random.SeedSequence((seed % 2**64, chunk)).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(state))
        picks = torch.randint(len(lengths), (10 * batch_size,), generator=generator).tolist()
        picks.sort(key=lambda i: lengths[i])
        parts = [picks[i : i + batch_size] for i in range(0, len(picks), batch_size)]
        batches += [parts[i] for i in torch.randperm(10, generator=generator).tolist()]
    return batches[:count]


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
    # The highest norm of all gradients.
    clip: float | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Trainee:
        parts = deepcopy((self.model, self.optimizer, self.scheduler), memo)
        return Trainee(self.setting, *parts, done=self.done, clip=self.clip)

    def train(self, until: int, after_step: Callable[[int], None] | None = None) -> None:
        """Make optimizer steps up to ``until``; ``after_step`` is called with their number, gradients still there."""
        self.model.train()
        while self.done < until:
            torch.manual_seed(self.setting.seed * 1_000_003 + self.done)
            # PEFT's AdaLoRA adds its regularisation to this loss.
            loss = self.model(**self.setting.batches[self.done]).loss
            if not loss.isfinite():
                raise Diverged(f"the loss is {loss.item()} at step {self.done}")
            loss.backward()
            if self.clip is not None:
                nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
            self.optimizer.step()
            self.scheduler.step()
            self.done += 1
            if after_step is not None:
                after_step(self.done)
            self.optimizer.zero_grad()

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> tuple[float, float]:
        """(cross-entropy, accuracy), means over examples, of a language model over the tokens that are learned."""
        self.model.eval()
        loss = right = count = 0.0
        for batch in batches:
            logits = self.model(**{key: value for key, value in batch.items() if key != "labels"}).logits
            labels = batch["labels"]
            if logits.ndim == 3:
                logits = logits[:, :-1]
                labels = labels[:, 1:]
            counted = labels != IGNORED
            loss += float(F.cross_entropy(logits[counted].float(), labels[counted], reduction="sum"))
            right += float((logits[counted].argmax(-1) == labels[counted]).sum())
            count += int(counted.sum())
        return loss / count, right / count


class _Loop(Training):
    """A trainee, as a schedule of ranks sees it."""

    def __init__(self, trainee: Trainee) -> None:
        super().__init__(trainee.model, [trainee.optimizer], step=trainee.done)
        self._trainee = trainee

    def validate(self) -> Mapping[str, float]:
        return {"val/loss": self._trainee.evaluate(self._trainee.setting.val)[0]}


def follow(trainee: Trainee, schedule: Sequence[Stage]) -> float:
    """Train to the end under a schedule of ranks; the relative rise of the validation loss by a change after that."""
    driver = RankDriver(schedule)
    loop = _Loop(trainee)
    steps = trainee.setting.steps

    def end_step(done: int) -> None:
        loop.step = done
        driver.end_step(loop)

    driver.start(loop, Run(total_steps=steps))
    while trainee.done < steps:
        driver.advance(loop)
        trainee.train(trainee.done + 1, end_step)
    before = loop.validate()["val/loss"]
    driver.finish(loop)
    return loop.validate()["val/loss"] / before - 1


def adapted(setting: Setting, rank: int, lr: float | None = None, rank_map: Any = None) -> Trainee:
    """A fresh model with an adapter of ``rank`` on every linear layer of the body; ``rank_map`` has others."""
    model = setting.model()
    add_lora(model, rank=rank, alpha=SCALING * rank, modules_to_save=[*setting.heads], rank_map=rank_map)
    for _, layer in lora_layers(model):
        layer.scaling = SCALING
    return setting.trainee(model, lr)


def adapter_parameters(model: nn.Module) -> int:
    """Numbers in the LoRA factors."""
    return sum(p.numel() for _, layer in lora_layers(model) for p in (layer.lora_A, layer.lora_B))


def budget_ranks(
    layers: Mapping[str, RankedLayer],
    rank: int,
    highest: int | None = None,
    brought: Mapping[str, LayerImportance] | None = None,
    parameters: int | None = None,
    caps: Mapping[str, int] = {},
) -> dict[str, int]:
    """Ranks by layer that share out the parameters of ``rank``, or these, by importance, or by weight.

    No layer exceeds ``highest``, nor its own number of ``caps``.
    """
    shapes = {name: (layer.lora_B.shape[0], layer.lora_A.shape[1]) for name, layer in layers.items()}
    if brought is None:
        found = LayerDirections(layers).values()
        states = {n: LayerState(layer.rank, *shapes[n], values=found[n]) for n, layer in layers.items()}
        return Budget(final_rank=rank, highest=highest, by="weight").ranks(states)
    scores = {name: of.score for name, of in brought.items()}
    states = {
        name: LayerState(layer.rank, *shapes[name], importance=scores[name], highest=caps.get(name, layer.rank))
        for name, layer in layers.items()
    }
    pool = dict(parameters=parameters) if parameters else dict(final_rank=rank)
    return Budget(**pool, highest=highest).ranks(states)


def used_ranks(layers: Mapping[str, RankedLayer], share: float) -> dict[str, int]:
    """How many directions of each layer's update have ``share`` of its energy, the sum of squared singular values."""
    return {name: energy_rank(values, share) for name, values in LayerDirections(layers).values().items()}


def linear_layers(setting: Setting, model: nn.Module) -> list[str]:
    """Names of the layers of a plain model that adapters go to."""
    kept = {*setting.heads, "lm_head"}
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in kept]


def gora_ranks(setting: Setting, rank: int, batches: int = 8, highest: int = 16) -> dict[str, int]:
    """Ranks by layer in proportion to ``mean |W * dL/dW|`` before the first step (GoRA, arXiv:2502.12171, section 3.2).

    They have about the parameters of ``rank`` in every layer, and are 1 to ``highest``.
    """
    model = setting.model().eval()
    weights: Any = {name: model.get_submodule(name).weight for name in linear_layers(setting, model)}
    for batch in setting.batches[:batches]:
        model(**batch).loss.backward()
    importance = {name: float((w.detach() * w.grad).float().abs().mean()) for name, w in weights.items()}
    sizes = {name: sum(w.shape) for name, w in weights.items()}
    pool = rank * sum(sizes.values())
    total = sum(importance.values())
    # Bisect a factor, since ranks that reach their bounds leave more to the others.
    low = 0.0
    high = 1e3
    for _ in range(60):
        factor = (low + high) / 2
        shares = {name: factor * pool * part / total / sizes[name] for name, part in importance.items()}
        ranks = {name: max(1, min(highest, round(share))) for name, share in shares.items()}
        low, high = (factor, high) if sum(ranks[name] * sizes[name] for name in ranks) <= pool else (low, factor)
    return ranks


def kept_adapter(folder: Path, row: Mapping[str, object]) -> Path:
    """Where the finished adapter of a row is kept."""
    return folder / " ".join(_text(row[name]) for name in ("task", "seed", "arm", "lr"))


class Table:
    """Rows of a study in a CSV file that grows as the study runs; what it holds already is not run again.

    Args:
        file: made with its first row.
        fields: names of the columns.
        keys: those that tell a row from the others.
    """

    def __init__(self, file: Path, fields: Sequence[str], keys: Sequence[str]) -> None:
        self.file = file
        self.fields = list(fields)
        self.keys = list(keys)
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
        with self.file.open("a", newline="", encoding="utf-8") as text:
            writer = csv.DictWriter(text, self.fields)
            if text.tell() == 0:
                writer.writeheader()
            writer.writerow(self.rows[-1])


def values(rows: Iterable[Mapping[str, str]], column: str, **where: object) -> list[float]:
    """The numbers of ``column`` in the rows that hold ``where``, in their order."""
    return [float(row[column]) for row in rows if all(row[name] == str(value) for name, value in where.items())]


def with_error(numbers: Sequence[float]) -> str:
    """Mean and standard error."""
    error = f" ± {stdev(numbers) / len(numbers) ** 0.5:.3f}" if len(numbers) > 1 and all(map(isfinite, numbers)) else ""
    return f"{mean(numbers):+.3f}{error}".replace("-", "−")


def _text(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def start(main: Callable[[], None]) -> None:
    """Run a study, which goes on where Ctrl-C has ended it."""
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted: start it again to go on")
        raise SystemExit(130) from None
