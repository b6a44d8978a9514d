"""Random runs: a small model, its data, an optimizer and a schedule, all from one seed. Nothing here knows dynrank."""

import math
import random
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

OPTIMIZERS = {
    "AdamW": ({"weight_decay": 0.1}, 0.02),
    "Adam": ({"amsgrad": True}, 0.02),
    "SGD": ({"momentum": 0.9}, 0.1),
    "SGD ": ({"momentum": 0.8, "nesterov": True, "weight_decay": 0.01}, 0.1),
    "RMSprop": ({"momentum": 0.5}, 0.005),
    "Adagrad": ({}, 0.05),
    "NAdam": ({}, 0.01),
    "RAdam": ({}, 0.02),
}


@dataclass
class Stage:
    """A stage at the step ``planned``, or before it, if the loss is on a plateau."""

    kind: str
    to: float
    planned: float
    patience: float = math.inf
    min_delta: float = 0.0
    size: str = "final_rank"
    changes_left: int = 1
    lowest: int = 1
    highest: int | None = None
    rate: float | str = 1.0
    reset: bool = False
    max_regression: float | None = None

    def is_due(self, step, losses):
        """Whether it is planned, or so many of ``losses`` (those since the last change) in a row are not a new best."""
        best = None
        stale = 0
        for loss in losses:
            is_best = best is None or best - loss > self.min_delta * abs(best)
            best = loss if is_best else best
            stale = 0 if is_best else stale + 1
        return step >= self.planned or stale >= self.patience


@dataclass
class Case:
    seed: int
    driver: str
    total: int = 16
    every: int = 4
    resume: int | None = None
    peft: bool = False
    shape: str = "chain"
    widths: tuple = (8, 10, 8)
    rank: int = 4
    alpha: float = 4.0
    rslora: bool = False
    rules: dict = field(default_factory=dict)
    # Whether the schedule has the rules, as it must for PEFT's layers, and not add_lora.
    steered: bool = False
    head: bool = False
    one_group: bool = True
    started: bool = True
    optimizer: str = "AdamW"
    lr: float = 0.02
    decaying: str = "none"
    accumulate: int = 1
    batch: int = 4
    clip: float = 0.0
    stages: list = field(default_factory=list)

    # The model

    def linears(self):
        """{name: (d_in, d_out)}"""
        first, middle, last = self.widths
        inner = ["q", "k", "v"] if self.shape == "branches" else ["up", "down"]
        shapes = {name: (first if name in "qkv" or name == "up" else middle, middle) for name in inner}
        return shapes | {"out": (middle, last)} | ({"head": (last, 5)} if self.head else {})

    def network(self, call, x):
        """The model's output; ``call(name, x)`` is the layer of this name."""
        if self.shape == "branches":
            x = call("q", x) * torch.tanh(call("k", x)) + call("v", x)
        elif self.shape == "shared":
            x = torch.tanh(call("up", x))
            x = x + torch.tanh(call("down", x)) + 0.5 * call("down", x.sin())
        else:
            x = torch.tanh(call("up", x))
            x = x + F.gelu(call("down", x))
        x = call("out", torch.tanh(x))
        return call("head", torch.tanh(x)) if self.head else x

    def modules(self):
        """{name: (linear module, A, B)} at the start."""
        draw = self.generator(0)
        made = {}
        for name, (i, o) in self.linears().items():
            r = self.ranks().get(name, 1)
            linear = nn.Linear(i, o)
            w, b, a = (torch.randn(*size, generator=draw).double() / i**0.5 for size in ((o, i), (o,), (r, i)))
            linear.weight.data = w
            linear.bias.data = b
            made[name] = linear, a, torch.randn(o, r, generator=draw).double() * (0.3 if self.started else 0.0)
        return made

    def ranks(self):
        return {name: self.rules.get(name, {}).get("rank", self.rank) for name in self.linears() if name != "head"}

    def bounds(self):
        """The rules without starting ranks, for the schedule's rank map."""
        if not self.steered:
            return {}
        bounds = {name: {key: rule[key] for key in rule if key != "rank"} for name, rule in self.rules.items()}
        return {name: rule for name, rule in bounds.items() if rule}

    def scaling(self, name):
        # A rank of its own gives a layer another scaling in PEFT, and the same one in dynrank.
        rank = self.ranks()[name] if self.peft else self.rank
        return self.alpha / (math.sqrt(rank) if self.rslora else rank)

    # The data

    def generator(self, number):
        return torch.Generator().manual_seed(1000 * self.seed + number)

    def batches(self, step):
        """The batches of a step, several if gradients are accumulated."""
        return [self.examples(self.batch, 2 + step * self.accumulate + i) for i in range(self.accumulate)]

    def validation(self):
        return self.examples(8, 1)

    @property
    def is_language(self):
        return self.shape == "shared"

    def examples(self, count, number):
        positions = [] if self.shape == "chain" else [3]
        x = torch.randn(count, *positions, self.widths[0], generator=self.generator(number)).double()
        classes = 5 if self.head else self.widths[2]
        truth = torch.randn(self.widths[0], classes, generator=self.generator(999)).double()
        y = (x @ truth).tanh()
        if not self.is_language:
            return x, y
        # Some positions have no label, and the first has one always.
        y = y.argmax(-1)
        y[:, 1:][torch.rand(count, 2, generator=self.generator(number)) < 0.4] = -100
        return x, y

    def loss(self, output, y):
        return F.cross_entropy(output.flatten(0, 1), y.flatten()) if self.is_language else F.smooth_l1_loss(output, y)

    # Training

    def make_optimizer(self, groups):
        options, _ = OPTIMIZERS[self.optimizer]
        return getattr(torch.optim, self.optimizer.strip())(groups, lr=self.lr, **options)

    def decay(self, step):
        return {"none": 1.0, "linear": 1 - 0.8 * step / self.total, "cosine": 0.6 + 0.4 * math.cos(step)}[self.decaying]


def make_case(seed):
    """A random case; the same seed makes the same one."""
    draw = random.Random(seed)
    driver = draw.choice(["plain"] * 5 + ["lightning"] * 3 + ["trainer"] * 2)
    case = Case(seed, driver, total=draw.randint(8, 16), every=draw.randint(2, 5), started=draw.random() < 0.7)
    case.peft = draw.random() < 0.3
    case.shape = draw.choice(["chain", "branches", "shared"])
    case.widths = tuple(draw.randint(7, 12) for _ in range(3))
    case.rank = draw.randint(3, 6)
    case.alpha = draw.choice([2.0, 4.0, 7.5])
    case.rslora = draw.random() < 0.2
    case.head = draw.random() < 0.4
    case.one_group = draw.random() < 0.5
    case.optimizer = draw.choice([*OPTIMIZERS])
    case.lr = OPTIMIZERS[case.optimizer][1] * draw.choice([0.3, 1.0])
    case.decaying = draw.choice(["none", "linear", "cosine"])
    case.accumulate = draw.choice([1, 1, 2])
    case.batch = draw.randint(1, 6)
    case.clip = draw.choice([0.0, 0.0, 0.5])
    case.resume = draw.choice([None, draw.randint(1, case.total - 1)])
    case.stages = draw_stages(draw, case)
    names = [name for name in case.linears() if name != "head"]
    if draw.random() < 0.5:
        case.rules[draw.choice(names)] = {"rank": case.rank + draw.randint(-1, 1)}
    if draw.random() < 0.4:
        name = draw.choice(names)
        rules = [{"pinned": True}, {"final_rank": 2}, {"highest": 3}]
        # A pool of rank 1 does not suffice for more.
        rules += [{"lowest": 2}, {"lowest": 2, "highest": 3}] if all(stage.to != 1 for stage in case.stages) else []
        case.rules[name] = case.rules.get(name, {"rank": case.rank}) | draw.choice(rules)
    case.steered = case.peft or draw.random() < 0.5
    return case


def draw_stages(draw, case):
    """One to three stages whose times and ranks do not contradict each other."""
    # A new adapter takes some steps until all directions that a cut keeps have an update.
    first = 0.2 if case.started else 0.55
    low = draw.randint(1, 2)

    def at(fraction):
        return math.ceil(fraction * case.total - 1e-9)

    def how():
        """How a change is made, where it is not by the defaults."""
        made = {"rate": draw.choice([1.0, 1.0, "sqrt", "sqrt", 1.5])}
        made |= {"reset": True} if draw.random() < 0.1 else {}
        # At 0 rounding would decide about a stage that only balances.
        made |= {"max_regression": draw.choice([1e-6, 0.1, 0.5])} if draw.random() < 0.15 else {}
        return made

    plateau = {"patience": draw.randint(1, 2), "min_delta": draw.choice([0.01, 0.1, 0.9])}
    planned = at(draw.uniform(first, 0.8))
    watches = case.started and draw.random() < 0.6

    def due(deadline):
        return {"planned": at(deadline), **plateau} if watches else {"planned": planned}

    size = draw.choice([{"to": low}, {"to": draw.uniform(0.6, 0.9), "size": "share"}])
    size |= {"highest": draw.randint(3, 4)} if draw.random() < 0.3 else {}
    early = Stage("budget", planned=at(draw.uniform(first, 0.7)), **size, **how())
    later = Stage("rank", low, at(draw.choice([0.9, 1.0])), **how())
    kind = draw.choice(["early", "early", "converged", "milestones", "anneal", "energy", "grow", "rebalance", "three"])
    if kind == "early":
        return [early]
    if kind == "rebalance":
        # Every rank is at most this one.
        return [Stage("rank", math.inf, early.planned, **how())]
    if kind == "converged":
        to = draw.choice(["budget", "towards"])
        common = due(draw.choice([0.75, 0.9])) | how()
        return [Stage(to, low, changes_left=left, **common) for left in (2, 1)[draw.randint(0, 1) :]]
    if kind == "milestones":
        times = sorted(draw.sample(range(at(first), case.total + 1), 2))
        to = draw.choice(["budget", "rank"])
        common = how()
        return [Stage(to, rank, time, **common) for rank, time in zip([3, low], times, strict=True)]
    if kind == "anneal":
        steps = draw.randint(2, 3)
        to = draw.choice(["budget", "towards"])
        common = how()
        times = [at(first + (0.8 - first) * i / (steps - 1)) for i in range(steps)]
        return [Stage(to, low, time, changes_left=steps - i, **common) for i, time in enumerate(times)]
    if kind == "energy":
        return [Stage("energy", draw.uniform(0.5, 0.95), lowest=low, **due(0.75))]
    return [Stage("grow", 7, at(first)), later] if kind == "grow" else [early, later]
