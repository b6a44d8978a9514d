"""A training run whose ranks change, as README.md beside it derives it: dense, naive, in float64, without dynrank."""

import math
from dataclasses import dataclass, field, replace
from statistics import stdev

import torch
from torch import nn

# How an entry of an optimizer's state transforms: as the gradient, as its square, or as the parameter.
KINDS = {"exp_avg": "gradient", "exp_avg_sq": "square", "max_exp_avg_sq": "square", "square_avg": "square"}
KINDS |= {"sum": "square", "momentum_buffer": "gradient", "RMSprop.momentum_buffer": "parameter"}


class Undetermined(Exception):
    """From here on the mathematics leaves a choice (a basis of a null space), so there is nothing to compare."""


@dataclass
class Layer:
    """``y = base(x) + s (x A^T) B^T``; ``factors`` are A and B^T, which both have a row for each direction."""

    base: nn.Linear
    factors: list
    scaling: float
    pinned: bool = False
    final_rank: int | None = None
    highest: int | None = None
    lowest: int | None = None
    # The factors before the last update, and by how much each update has lowered the loss.
    past: list = field(default_factory=list)
    falls: list = field(default_factory=list)

    def __call__(self, x):
        a, b = self.factors
        return self.base(x) + self.scaling * (x @ a.T) @ b

    @property
    def rank(self):
        return len(self.factors[0])

    @property
    def product(self):
        a, b = self.factors
        return self.scaling * b.data.T @ a.data

    @property
    def score(self):
        """The importance of the layer, at least 0, and its standard error."""
        error = stdev(self.falls) * math.sqrt(len(self.falls)) if len(self.falls) > 1 else 0.0
        return max(sum(self.falls), 0.0) + error

    def bounds(self, last):
        """(lowest, highest) rank after a stage."""
        if self.pinned:
            return self.rank, self.rank
        most = min(self.base.weight.shape)
        return self.final_rank or self.lowest or 1, last and self.final_rank or min(most, self.highest or most)

    def uniform(self, rank, last):
        """The rank that counts in a pool of ``rank``."""
        if self.pinned:
            return self.rank
        return last and self.final_rank or min(max(rank, self.final_rank or 1), *self.base.weight.shape)

    def maps_to(self, rank):
        """The matrices that turn the factors into balanced ones of the largest directions, or add rows of zeros."""
        if rank > self.rank:
            return [torch.eye(rank, self.rank).double()] * 2
        a, b = self.factors
        u, s, vh = torch.linalg.svd(self.product / self.scaling)
        if s[rank - 1] <= max(self.base.weight.shape) * torch.finfo(s.dtype).eps * s[0]:
            raise Undetermined("a direction beyond the numerical rank is kept")
        root = s[:rank].sqrt()
        return [(u[:, :rank] / root).T @ b.data.T, (vh[:rank].T / root).T @ a.data.T]


class Run:
    """Fills ``trace``: ({layer: (rank, product)}, loss) of each step and the end; ``grown`` gives new rows of A."""

    def __init__(self, case, layers, head, grown):
        self.case = case
        self.stages = list(case.stages)
        self.layers = layers
        self.head = head
        self.grown = grown
        self.trace = []
        self.lr_factor = 1.0
        # Of the validations since the last change.
        self.losses = []
        factors = [factor for layer in layers.values() for factor in layer.factors]
        self.optimizer = case.make_optimizer([{"params": factors}, *([{"params": head.parameters()}] if head else [])])

    def go(self):
        for step in range(self.case.total + 1):
            self.change_if_due(step)
            seen = {name: (layer.rank, layer.product) for name, layer in self.layers.items()}
            self.trace.append((seen, self.step(step) if step < self.case.total else 0.0))
            if (step + 1) % self.case.every == 0:
                self.losses.append(self.loss(self.layers, *self.case.validation()).item())

    def loss(self, layers, x, y):
        modules = layers | {"head": self.head}
        return self.case.loss(self.case.network(lambda name, x: modules[name](x), x), y)

    def step(self, step):
        self.optimizer.zero_grad()
        loss = torch.stack([self.loss(self.layers, *batch) for batch in self.case.batches(step)]).mean()
        loss.backward()
        if self.case.clip:
            nn.utils.clip_grad_norm_([p for g in self.optimizer.param_groups for p in g["params"]], self.case.clip)
        for group, factor in zip(self.optimizer.param_groups, (self.lr_factor, 1.0), strict=False):
            group["lr"] = self.case.lr * self.case.decay(step) * factor
        for layer in self.layers.values():
            terms = [f.grad * (f.data - old) for f, old in zip(layer.factors, layer.past, strict=False)]
            layer.falls += [-sum(term.sum().item() for term in terms)] if terms else []
            layer.past = [factor.detach().clone() for factor in layer.factors]
        self.optimizer.step()
        return loss.item()

    def change_if_due(self, step):
        """The last stage that is due replaces those before it."""
        due = [i for i, stage in enumerate(self.stages) if stage.is_due(step, () if i else self.losses)]
        if due:
            *_, stage = [self.stages.pop(0) for _ in range(due[-1] + 1)]
            self.losses = []
            self.change(stage, step)

    def new_ranks(self, stage):
        bounds = {name: layer.bounds(last=not self.stages) for name, layer in self.layers.items()}
        if stage.kind == "budget":
            return self.budget(stage, bounds)
        ranks = {}
        for name, (low, high) in bounds.items():
            layer = self.layers[name]
            new = stage.to
            if stage.kind == "towards":
                new = round(layer.rank * ((layer.final_rank or stage.to) / layer.rank) ** (1 / stage.changes_left))
            elif stage.kind == "energy":
                energy = torch.linalg.svdvals(layer.product).square().cumsum(0)
                new = max(stage.lowest, 1 + int((energy < stage.to * energy[-1] * (1 - 1e-10)).sum()))
            new = min(new, high)
            ranks[name] = max(layer.rank, new) if stage.kind == "grow" else min(layer.rank, max(low, new))
        return ranks

    def budget(self, stage, bounds):
        """Ranks in proportion to ``score``: the next one up is where a factor of all layers reaches the half first."""
        width = {name: sum(layer.base.weight.shape) for name, layer in self.layers.items()}
        size = sum(layer.rank * width[name] for name, layer in self.layers.items())
        alike = sum(layer.uniform(stage.to, not self.stages) * width[name] for name, layer in self.layers.items())
        end = math.floor(stage.to * size + 1e-9) if stage.size == "share" else min(size, alike)
        end = math.floor(size * (end / size) ** (1 / stage.changes_left) + 1e-6)
        ranks = {n: min(max(stage.lowest, low), high, self.layers[n].rank) for n, (low, high) in bounds.items()}
        cap = {n: min(bounds[n][1], la.rank, stage.highest or la.rank) for n, la in self.layers.items()}
        score = {name: layer.score for name, layer in self.layers.items()}
        score = score if any(score.values()) else dict.fromkeys(score, 1.0)
        rising = {*score}
        while rising := {name for name in rising if score[name] > 0 and ranks[name] < cap[name]}:
            name = min(rising, key=lambda n: ((ranks[n] + 0.5) / score[n], ranks[n], n))
            ranks[name] += 1
            if sum(rank * width[n] for n, rank in ranks.items()) > end:
                ranks[name] -= 1
                rising.remove(name)
        return ranks

    @torch.no_grad()
    def change(self, stage, step):
        ranks = self.new_ranks(stage)
        grows = any(ranks[name] > layer.rank for name, layer in self.layers.items())
        maps = {}
        new = dict(self.layers)
        for name, layer in self.layers.items():
            # Unless a layer grows, those that keep their rank are balanced, too.
            if ranks[name] > layer.rank or not (grows or layer.pinned):
                maps[name] = layer.maps_to(ranks[name])
                factors = [by @ factor.data for by, factor in zip(maps[name], layer.factors, strict=True)]
                if ranks[name] > layer.rank:
                    factors[0][layer.rank :] = self.grown(name, step)[layer.rank :]
                new[name] = replace(layer, factors=factors)
        loss = self.loss(self.layers, *self.case.validation())
        worse = self.loss(new, *self.case.validation()) - loss
        if stage.max_regression is not None and not worse <= stage.max_regression * abs(loss):
            return
        ratio = sum(layer.rank for layer in self.layers.values()) / sum(ranks.values())
        self.lr_factor *= math.sqrt(ratio) if stage.rate == "sqrt" else stage.rate
        for name, layer in self.layers.items():
            layer.past = []
            if name in maps:
                self.put(layer, new[name].factors, maps[name], stage.reset)

    def put(self, layer, new, maps, reset):
        """Moments by the maps of their factor and of its gradient, which grows at most as the other factor does."""
        for i, factor in enumerate(layer.factors):
            state = self.optimizer.state[factor]
            if reset:
                state.clear()
            sizes = [other.norm(dim=1).max() for other in (layer.factors[1 - i], new[1 - i])]
            for key, value in state.items():
                kind = KINDS.get(f"{type(self.optimizer).__name__}.{key}", KINDS.get(key))
                if kind == "square":
                    moved = maps[1 - i].square() @ value
                    is_new = maps[1 - i].abs().sum(1) == 0
                    moved[is_new] = 2.5 * moved[~is_new].mean(0)
                    state[key] = moved.clamp_max(value.max() * max(1.0, (sizes[1] / sizes[0]) ** 2))
                elif kind is not None and value is not None:
                    state[key] = maps[i if kind == "parameter" else 1 - i] @ value
        for factor, value in zip(layer.factors, new, strict=True):
            factor.data = value
