"""A training run whose ranks change, as ../shared/maths.md has it: dense, naive, in float64, and without dynrank.

A layer computes ``y = x W^T + b + s (x A^T) B^T``. Only growth is not computed here: its random rows are taken from the
run that is judged, and checked.
"""

import math
from dataclasses import dataclass
from statistics import stdev

import torch
import torch.nn.functional as F
from torch import nn

# How an entry of an optimizer's state transforms: as the gradient, as its square, or as the parameter.
KINDS = {"exp_avg": "gradient", "exp_avg_sq": "square", "max_exp_avg_sq": "square", "square_avg": "square"}
KINDS |= {"sum": "square", "momentum_buffer": "gradient", "RMSprop.momentum_buffer": "parameter"}


class Undetermined(Exception):
    """From here on the mathematics leaves a choice (a basis of a null space), so there is nothing to compare."""


@dataclass
class Layer:
    weight: torch.Tensor
    bias: torch.Tensor
    A: nn.Parameter
    B: nn.Parameter
    scaling: float
    pinned: bool = False
    final_rank: int | None = None
    highest: int | None = None

    @property
    def rank(self):
        return len(self.A)

    @property
    def width(self):
        return sum(self.weight.shape)

    def bounds(self, last):
        """(lowest, highest) rank after a stage."""
        most = min(self.weight.shape)
        return (self.rank, self.rank) if self.pinned else (self.final_rank or 1, last and self.final_rank or most)

    def maps(self):
        """(from_A, from_B, singular values): from_A @ A and B @ from_B are the balanced factors of all directions."""
        u, s, vh = torch.linalg.svd(self.B.data @ self.A.data)
        if s[0] == 0:
            return torch.eye(self.rank).double(), torch.eye(self.rank).double(), s[: self.rank]
        u = u[:, : self.rank]
        s = s[: self.rank]
        v = vh[: self.rank].T
        root = s.clamp_min(1e-300).sqrt()
        return (u / root).T @ self.B.data, self.A.data @ (v / root), s


class Run:
    """``stages`` is the schedule; ``grown(layer, step)`` is A of the judged run."""

    def __init__(self, case, stages, layers, head, grown, epsilon):
        self.case = case
        self.stages = stages
        self.layers = layers
        self.head = head
        self.grown = grown
        self.epsilon = epsilon
        self.factor = 1.0
        self.trace = []
        # By layer: the terms of what it has brought, and its factors after each step since the last change.
        self.terms = {name: [] for name in layers}
        self.thetas = []
        self.next = 0
        self.pending = None
        self.best = None
        self.stale = 0
        factors = [p for layer in layers.values() for p in (layer.A, layer.B)]
        self.optimizer = case.make_optimizer([{"params": factors}, {"params": [*head]}] if head else factors)

    def pool(self):
        return {name: layer for name, layer in sorted(self.layers.items()) if not layer.pinned}

    def output(self, x):
        def call(name, x):
            if name == "head":
                return F.linear(x, *self.head)
            layer = self.layers[name]
            return F.linear(x, layer.weight, layer.bias) + layer.scaling * (x @ layer.A.T) @ layer.B.T

        return self.case.network(call, x)

    def validate(self):
        x, y = self.case.validation()
        return self.case.loss(self.output(x), y).item()

    def state(self):
        products = {name: layer.scaling * layer.B.data @ layer.A.data for name, layer in self.layers.items()}
        return {name: layer.rank for name, layer in self.layers.items()}, products

    def go(self):
        """Fills ``trace``: for each step (ranks, products, loss) as they are in its forward; then those of the end."""
        for step in range(self.case.total):
            self.advance(step)
            self.trace.append((*self.state(), self.step(step)))
            if (step + 1) % self.case.every == 0:
                self.validated(self.validate())
        self.advance(self.case.total)
        self.trace.append((*self.state(), 0.0))

    def step(self, step):
        batches = self.case.batches(step)
        self.optimizer.zero_grad()
        loss = sum(self.case.loss(self.output(x), y) for x, y in batches) / len(batches)
        loss.backward()
        if self.case.clip:
            nn.utils.clip_grad_norm_([p for g in self.optimizer.param_groups for p in g["params"]], self.case.clip)
        for group, factor in zip(self.optimizer.param_groups, (self.factor, 1.0), strict=False):
            group["lr"] = self.case.lr * self.case.decay(step) * factor
        self.measure()
        self.optimizer.step()
        return loss.item()

    def measure(self):
        """Minus the gradient of this step times the update of the step before, in each layer."""
        self.thetas.append({n: [p.detach().clone() for p in (la.A, la.B)] for n, la in self.layers.items()})
        if len(self.thetas) > 1:
            for name, layer in self.layers.items():
                before = self.thetas[-2][name]
                now = self.thetas[-1][name]
                moved = zip((layer.A, layer.B), before, now, strict=True)
                self.terms[name].append(-sum((p.grad * (new - old)).sum().item() for p, old, new in moved))

    def worth(self, name):
        """What the layer has brought, at least 0, and its standard error."""
        terms = self.terms[name]
        error = stdev(terms) * len(terms) ** 0.5 if len(terms) > 1 else 0.0
        return max(sum(terms), 0.0) + error

    def share_out(self, size, low, top):
        """Ranks in proportion to ``worth``: the next one up is where a factor of all layers reaches the half first."""
        ranks = dict(low)
        ended = set()
        worth = {name: self.worth(name) for name in low}
        worth = worth if any(worth.values()) else dict.fromkeys(worth, 1.0)
        while True:
            open_ones = [n for n, w in worth.items() if w > 0 and ranks[n] < top[n] and n not in ended]
            if not open_ones:
                return ranks
            name = min(open_ones, key=lambda n: ((ranks[n] + 0.5) / worth[n], ranks[n], n))
            more = {**ranks, name: ranks[name] + 1}
            if sum(rank * self.layers[n].width for n, rank in more.items()) <= size:
                ranks = more
            else:
                ended.add(name)

    def validated(self, value):
        plateau = self.stages[self.next].plateau if self.next < len(self.stages) and self.pending is None else None
        if plateau is not None and (self.best is None or self.best - value > plateau["min_delta"] * abs(self.best)):
            self.best = value
            self.stale = 0
        elif plateau is not None:
            self.stale += 1
            self.pending = self.next if self.stale >= plateau["patience"] else None

    def advance(self, step):
        """The last stage that is due replaces those before it."""
        due = [i for i, stage in enumerate(self.stages) if i >= self.next and stage.planned <= step]
        self.pending = max([*due, *([] if self.pending is None else [self.pending])], default=None)
        if self.pending is not None:
            self.change(step)

    def ranks(self, i):
        stage = self.stages[i]
        wanted = {}
        bounds = {name: layer.bounds(i == len(self.stages) - 1) for name, layer in self.layers.items()}
        if stage.kind == "budget":
            return self.budget(stage, bounds)
        for name, layer in self.layers.items():
            r = layer.rank
            low, high = bounds[name]
            energy = layer.maps()[2].square().cumsum(0)
            new = {
                "towards": round(r * ((layer.final_rank or stage.to) / r) ** (1 / stage.changes_left)),
                "energy": max(stage.lowest, 1 + int((energy < stage.to * energy[-1] * (1 - 1e-10)).sum())),
            }.get(stage.kind, stage.to)
            wanted[name] = max(r, min(new, high)) if stage.kind == "grow" else min(r, max(low, min(new, high)))
        return wanted

    def budget(self, stage, bounds):
        width = {name: layer.width for name, layer in self.layers.items()}
        size = sum(layer.rank * layer.width for layer in self.layers.values())
        low = {}
        top = {}
        alike = sum(max(least, min(most, stage.to)) * width[name] for name, (least, most) in bounds.items())
        end = math.floor(stage.to * size + 1e-9) if stage.size == "share" else min(size, alike)
        end = math.floor(size * (end / size) ** (1 / stage.changes_left) + 1e-6)
        for name, layer in self.layers.items():
            least, most = bounds[name]
            low[name] = min(max(stage.lowest, least), most, layer.rank)
            top[name] = min(layer.rank, max(low[name], min(most, layer.highest or stage.highest or most)))
        return self.share_out(end, low, top)

    def change(self, step):
        index = self.pending
        stage = self.stages[self.pending]
        old = {}
        new = {}
        before = self.state()[0]
        after = self.ranks(index)
        self.next = index + 1
        self.pending = None
        self.best = None
        self.stale = 0
        if after == before:
            return
        value = self.validate()
        for name, layer in self.pool().items():
            if after[name] > before[name]:
                new[name] = self.grow(layer, self.grown(name, step).double())
            elif stage.kind != "grow":
                # The layers that keep their rank are balanced, too.
                new[name] = self.cut(layer, [*range(after[name])])
        for name, (a, b, *_) in new.items():
            old[name] = self.layers[name].A.data, self.layers[name].B.data
            self.layers[name].A.data = a
            self.layers[name].B.data = b
        if stage.max_regression is not None and not self.validate() - value <= stage.max_regression * abs(value):
            for name, (a, b) in old.items():
                self.layers[name].A.data = a
                self.layers[name].B.data = b
            return
        for name, (a, b, from_A, from_B) in new.items():
            layer = self.layers[name]
            old_a, old_b = old[name]
            self.move(layer.A, stage.reset, from_A, from_B.T, old_b.T, b.T, lambda t: t)
            self.move(layer.B, stage.reset, from_B.T, from_A, old_a, a, lambda t: t.T)
        self.thetas = []
        self.factor *= math.sqrt(sum(before.values()) / sum(after.values())) if stage.rate == "sqrt" else stage.rate

    def cut(self, layer, kept):
        from_A, from_B, s = layer.maps()
        if s[0] > 0 and s[kept[-1]] <= max(layer.weight.shape) * self.epsilon * s[0]:
            raise Undetermined("a direction beyond the numerical rank is kept")
        return from_A[kept] @ layer.A.data, layer.B.data @ from_B[:, kept], from_A[kept], from_B[:, kept]

    def grow(self, layer, grown):
        """Columns of zeros, and the new rows of ``grown``: outside of the old rows, and of their median norm."""
        count = layer.rank
        old = layer.A.data
        norms = grown[: layer.rank].norm(dim=1).sort().values
        rows = grown[count:]
        low = norms[(count - 1) // 2] * (1 - 1e-5)
        high = norms[count // 2] * (1 + 1e-5)
        assert ((rows.norm(dim=1) >= low) & (rows.norm(dim=1) <= high)).all(), "new rows have another norm"
        overlap = F.normalize(rows) @ F.normalize(grown).T - torch.eye(len(grown))[count:]
        assert overlap.abs().max() < 1e-5, "new rows are not orthogonal"
        identity = torch.eye(len(grown), count).double()
        return torch.cat([old, rows]), F.pad(layer.B.data, (0, len(rows))), identity, identity.T

    def move(self, parameter, reset, by, gradient_by, other, new_other, rows):
        """Moments by the maps of the parameter and of its gradient; ``rows`` makes the rank the first dimension."""
        state = self.optimizer.state.get(parameter, {})
        if reset:
            state.clear()
        for key, value in state.items():
            kind = KINDS.get(f"{type(self.optimizer).__name__}.{key}", KINDS.get(key))
            if kind == "square":
                moved = gradient_by.square() @ rows(value)
                new = gradient_by.abs().sum(1) == 0
                moved[new] = 2.5 * moved[~new].mean(0)
                b = other.norm(dim=1).max()
                new_b = new_other.norm(dim=1).max()
                state[key] = rows(moved.clamp_max(value.max() * (max(1.0, (new_b / b).item() ** 2) if b > 0 else 1.0)))
            elif kind is not None and value is not None:
                state[key] = rows((gradient_by if kind == "gradient" else by) @ rows(value))
