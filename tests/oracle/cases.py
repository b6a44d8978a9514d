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


NO_PLATEAU = {"patience": math.inf, "min_delta": 0.0}


@dataclass
class Stage:
    """A stage as the pages of conf/ and dynrank.schedules describe it."""

    kind: str
    to: float
    planned: float
    plateau: dict
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
            is_best = best is None or best - loss > self.plateau["min_delta"] * abs(best)
            best = loss if is_best else best
            stale = 0 if is_best else stale + 1
        return step >= self.planned or stale >= self.plateau["patience"]


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
    head: bool = False
    one_group: bool = True
    started: bool = True
    optimizer: str = "AdamW"
    lr: float = 0.02
    decaying: str = "none"
    accumulate: int = 1
    batch: int = 4
    clip: float = 0.0
    presets: list = field(default_factory=list)

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

    def scaling(self, name):
        rank = self.ranks()[name]
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

    def stages(self):
        """The stages of all presets, by their documented defaults."""
        return [stage for name, options in self.presets for stage in expanded(name, dict(options), self.total)]


def expanded(name, options, total):
    """The stages of one preset: its arguments are those of the function of that name in dynrank.schedules."""
    how = options.pop("how", {"lr_factor": "sqrt"} if name == "early_budget" else {})
    common = {"rate": how.get("lr_factor", 1.0), "reset": how.get("optimizer_state") == "reset"}
    common |= {"max_regression": how.get("max_regression")}

    def at(fraction):
        return math.ceil(fraction * total - 1e-9)

    when = options.get("trigger") or {"patience": 2, "min_delta": 0.01}
    deadline = options.get("deadline", 0.5 if name == "grow" else 0.75)
    if "fraction" in when:
        common |= {"planned": at(when["fraction"]), "plateau": NO_PLATEAU}
    else:
        common |= {"planned": math.inf if deadline is None else at(deadline), "plateau": when}
    if name == "early_budget":
        size = "share" if "share" in options else "final_rank"
        bounds = {"lowest": options.get("lowest", 1), "highest": options.get("highest")}
        common |= {"planned": at(options.get("at", 0.3333)), "plateau": NO_PLATEAU} | bounds
        return [Stage("budget", options[size], size=size, **common)]
    if name == "rebalance":
        # Every rank is at most this one.
        return [Stage("rank", math.inf, **common | {"planned": at(options["at"]), "plateau": NO_PLATEAU})]
    if name == "energy":
        return [Stage("energy", options["share"], lowest=options.get("lowest", 1), **common)]
    if name == "grow":
        return [Stage("grow", options["final_rank"], **common)]
    if name == "milestones":
        kind = "budget" if options.get("shared") else "rank"
        stages = []
        for rank, time in zip(options["ranks"], options["at"], strict=True):
            planned = time if options.get("unit") == "step" else at(time)
            stages.append(Stage(kind, rank, **common | {"planned": planned, "plateau": NO_PLATEAU}))
        return stages
    kind = "budget" if options.get("shared", True) else "towards"
    if name == "after_convergence":
        drops = options.get("drops", 1)
        return [Stage(kind, options["final_rank"], changes_left=drops - i, **common) for i in range(drops)]
    steps = options.get("steps", 3)
    start = options.get("start", 0.2)
    end = options.get("end", 0.8)
    times = [at(start + (end - start) * i / max(1, steps - 1)) for i in range(steps)]
    common |= {"plateau": NO_PLATEAU}
    return [
        Stage(kind, options["final_rank"], changes_left=steps - i, **common | {"planned": time})
        for i, time in enumerate(times)
    ]


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
    case.presets = draw_presets(draw, case)
    names = [name for name in case.linears() if name != "head"]
    if draw.random() < 0.5:
        case.rules[draw.choice(names)] = {"rank": case.rank + draw.randint(-1, 1)}
    if not case.peft and draw.random() < 0.4:
        name = draw.choice(names)
        rule = draw.choice([{"pinned": True}, {"final_rank": 2}, {"highest": 3}])
        case.rules[name] = case.rules.get(name, {"rank": case.rank}) | rule
    return case


def draw_presets(draw, case):
    """One to three presets whose times and ranks do not contradict each other."""
    # A new adapter takes some steps until all directions that a cut keeps have an update.
    first = 0.2 if case.started else 0.55
    low = draw.randint(1, 2)

    def how(early=False):
        """How a change is made, or nothing for the defaults."""
        if draw.random() < 0.15 and case.started:
            return {}
        made = {"lr_factor": draw.choice([1.0, "sqrt", "sqrt", 1.5])} if draw.random() < 0.6 else {}
        made |= {"optimizer_state": "reset"} if draw.random() < 0.1 else {}
        made |= {"max_regression": draw.choice([0.0, 0.1, 0.5])} if draw.random() < 0.15 else {}
        return {"how": made}

    plateau = {"patience": draw.randint(1, 2), "min_delta": draw.choice([0.01, 0.1, 0.9])}
    by_time = {"fraction": draw.uniform(first, 0.8)}
    trigger = draw.choice([plateau, plateau, by_time]) if case.started else by_time
    kinds = ["early", "early", "converged", "milestones", "anneal", "energy", "grow", "rebalance", "three"]
    kind = draw.choice(kinds)
    size = draw.choice([{"final_rank": low}, {"share": draw.uniform(0.6, 0.9)}])
    size |= {"highest": draw.randint(3, 4)} if draw.random() < 0.3 else {}
    early = ("early_budget", {"at": draw.uniform(first, 0.7), **size, **how()})
    if kind == "early":
        return [early]
    if kind == "rebalance":
        return [("rebalance", {"at": draw.uniform(first, 0.7), **how()})]
    if kind == "converged":
        shared = {"shared": draw.random() < 0.6, "drops": draw.randint(1, 2), "deadline": draw.choice([0.75, 0.9])}
        return [("after_convergence", {"final_rank": low, "trigger": trigger, **shared, **how()})]
    if kind == "milestones":
        at = sorted(draw.sample(range(math.ceil(first * case.total), case.total + 1), 2))
        options = {"ranks": [3, low], "at": at, "unit": "step", "shared": draw.random() < 0.4}
        return [("milestones", options | how())]
    if kind == "anneal":
        options = {"final_rank": low, "steps": draw.randint(2, 3), "start": first, "shared": draw.random() < 0.6}
        return [("anneal", options | how())]
    grown = ("grow", {"final_rank": 7, "trigger": {"fraction": first}})
    if kind == "energy":
        return [("energy", {"share": draw.uniform(0.5, 0.95), "lowest": low, "trigger": trigger})]
    later = ("milestones", {"ranks": [low], "at": [draw.choice([0.9, 1.0])], **how()})
    return [grown, later] if kind == "grow" else [early, later]
