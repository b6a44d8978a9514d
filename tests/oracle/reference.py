"""A training run whose ranks change, as ../shared/maths.md has it: dense, naive, in float64, and without dynrank.

A layer computes ``y = x W^T + b + s (x A^T) B^T``. Only growth is not computed here: its random rows are taken from the
run that is judged, and checked. A ``Rule`` says which directions a cut drops; ``reference_gates.py`` has another.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

# Whether a cut also balances the layers of the pool that keep their rank, and moves their moments.
BALANCE_ALL = True
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
        u, s, v = u[:, : self.rank], s[: self.rank], vh[: self.rank].T
        root = s.clamp_min(1e-300).sqrt()
        return (u / root).T @ self.B.data, self.A.data @ (v / root), s


class Rule:
    """By weight: the smallest direction goes first, per parameter where layers share a pool.

    A rule that measures anything overrides ``observe`` and ``drops``; one that finds ranks otherwise, ``share_out``.
    """

    def __init__(self, stage):
        self.steps, self.stage = 0, stage

    def observe(self, run, batches):
        """Called in every step of the window after backward, before the optimizer's step."""
        self.steps += 1

    def drops(self, run, least):
        """[(layer, direction)] in the order of dropping, until every layer has ``least[layer]`` directions left."""
        values = {n: (layer.scaling * layer.maps()[2]).square() / layer.width for n, layer in run.pool().items()}
        every = [(value.item(), -i, name) for name, column in values.items() for i, value in enumerate(column)]
        return [(name, -i) for _, i, name in sorted(every) if -i >= least[name]]

    def share_out(self, run, size, low, top):
        """Ranks from ``low`` to ``top`` of ``size`` parameters: what goes last comes first, as long as it fits."""
        ranks, now, ended = dict(low), dict.fromkeys(low, 1), set()
        for name, _ in reversed(self.drops(run, now)):
            now[name] += 1
            rank = now[name]
            if low[name] < rank <= top[name] and name not in ended:
                if sum(r * run.layers[n].width for n, r in {**ranks, name: rank}.items()) <= size:
                    ranks[name] = rank
                else:
                    ended.add(name)
        return ranks


class Run:
    """``stages`` is the schedule; ``grown(layer, step)`` is A of the judged run; ``window_rule`` makes a Rule."""

    def __init__(self, case, stages, layers, head, grown, window_rule, epsilon):
        self.case, self.stages, self.layers, self.head, self.grown = case, stages, layers, head, grown
        self.window_rule, self.epsilon, self.window, self.factor, self.trace = window_rule, epsilon, None, 1.0, []
        self.next, self.pending, self.best, self.stale = 0, None, None, 0
        factors = [p for layer in layers.values() for p in (layer.A, layer.B)]
        self.optimizer = case.make_optimizer([{"params": factors}, {"params": [*head]}] if head else factors)

    def pool(self):
        return {name: layer for name, layer in sorted(self.layers.items()) if not layer.pinned}

    def output(self, x, between=()):
        """The model's output, with a matrix for each example ``between`` A and B of these layers."""

        def call(name, x):
            if name == "head":
                return F.linear(x, *self.head)
            layer, z = self.layers[name], x @ self.layers[name].A.T
            z = torch.einsum("n...r,nqr->n...q", z, between[name]) if name in between else z
            return F.linear(x, layer.weight, layer.bias) + layer.scaling * z @ layer.B.T

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
        self.advance(self.case.total, ended=True)
        self.trace.append((*self.state(), 0.0))

    def step(self, step):
        batches = self.case.batches(step)
        self.optimizer.zero_grad()
        loss = sum(self.case.loss(self.output(x), y) for x, y in batches) / len(batches)
        loss.backward()
        if self.window is not None:
            self.window.observe(self, batches)
        if self.case.clip:
            nn.utils.clip_grad_norm_([p for g in self.optimizer.param_groups for p in g["params"]], self.case.clip)
        for group, factor in zip(self.optimizer.param_groups, (self.factor, 1.0), strict=False):
            group["lr"] = self.case.lr * self.case.decay(step) * factor
        self.optimizer.step()
        return loss.item()

    def validated(self, value):
        plateau = self.stages[self.next].plateau if self.next < len(self.stages) and self.pending is None else None
        if plateau is not None and (self.best is None or self.best - value > plateau["min_delta"] * abs(self.best)):
            self.best, self.stale = value, 0
        elif plateau is not None:
            self.stale += 1
            self.pending = self.next if self.stale >= plateau["patience"] else None

    def advance(self, step, ended=False):
        """The last stage that is due replaces those before it. A change waits for its window, or for the next one."""
        due = [i for i, stage in enumerate(self.stages) if i >= self.next and stage.planned <= step]
        self.pending = max([*due, *([] if self.pending is None else [self.pending])], default=None)
        if not ended:
            self.open_window(step)
        if self.pending is None:
            return
        stage, later = self.stages[self.pending], self.stages[self.pending + 1 :]
        if self.measures(self.pending) and not ended:
            self.window = self.window or self.window_rule(stage)
            soon = stage.planned <= step or any(s.planned <= step + 1 for s in later)
            if not soon and self.window.steps < stage.window:
                return
        self.change(step)
        self.open_window(step)

    def open_window(self, step):
        for i, stage in enumerate(self.stages):
            open_now = i >= self.next and stage.planned - stage.window <= step < stage.planned
            if open_now and self.pending is None and self.window is None and self.measures(i):
                self.window = self.window_rule(stage)

    def measures(self, i):
        """Whether gates decide anything in the stage."""
        stage, ranks = self.stages[i], self.ranks(i, Rule(self.stages[i]))
        return stage.by_gates and (stage.kind == "budget" or any(r < self.layers[n].rank for n, r in ranks.items()))

    def ranks(self, i, rule):
        stage, wanted = self.stages[i], {}
        bounds = {name: layer.bounds(i == len(self.stages) - 1) for name, layer in self.layers.items()}
        if stage.kind == "budget":
            return self.budget(stage, rule, bounds)
        for name, layer in self.layers.items():
            r, (low, high) = layer.rank, bounds[name]
            energy = layer.maps()[2].square().cumsum(0)
            new = {
                "towards": round(r * ((layer.final_rank or stage.to) / r) ** (1 / stage.changes_left)),
                "energy": max(stage.lowest, 1 + int((energy < stage.to * energy[-1] * (1 - 1e-10)).sum())),
            }.get(stage.kind, stage.to)
            wanted[name] = max(r, min(new, high)) if stage.kind == "grow" else min(r, max(low, min(new, high)))
        return wanted

    def budget(self, stage, rule, bounds):
        width = {name: layer.width for name, layer in self.layers.items()}
        size, low, top = sum(layer.rank * layer.width for layer in self.layers.values()), {}, {}
        alike = sum(max(least, min(most, stage.to)) * width[name] for name, (least, most) in bounds.items())
        end = math.floor(stage.to * size + 1e-9) if stage.size == "share" else min(size, alike)
        end = math.floor(size * (end / size) ** (1 / stage.changes_left) + 1e-6)
        for name, layer in self.layers.items():
            least, most = bounds[name]
            low[name] = min(max(stage.lowest, least), most, layer.rank)
            top[name] = min(layer.rank, max(low[name], min(most, layer.highest or stage.highest or most)))
        return rule.share_out(self, end, low, top)

    def change(self, step):
        index, stage, old, new = self.pending, self.stages[self.pending], {}, {}
        rule = self.window if self.measures(index) and self.window and self.window.steps else Rule(stage)
        before, after = self.state()[0], self.ranks(index, rule)
        self.next, self.pending, self.window, self.best, self.stale = index + 1, None, None, None, 0
        if after == before:
            return
        value = self.validate()
        dropped = rule.drops(self, {name: min(after[name], before[name]) for name in before})
        for name, layer in self.pool().items():
            if after[name] > before[name]:
                new[name] = self.grow(layer, self.grown(name, step).double())
            elif after[name] < before[name] or (BALANCE_ALL and stage.kind != "grow"):
                new[name] = self.cut(layer, [i for i in range(layer.rank) if (name, i) not in dropped])
        for name, (a, b, *_) in new.items():
            old[name] = self.layers[name].A.data, self.layers[name].B.data
            self.layers[name].A.data, self.layers[name].B.data = a, b
        if stage.max_regression is not None and not self.validate() - value <= stage.max_regression * abs(value):
            for name, (a, b) in old.items():
                self.layers[name].A.data, self.layers[name].B.data = a, b
            return
        for name, (a, b, from_A, from_B) in new.items():
            layer, (old_a, old_b) = self.layers[name], old[name]
            self.move(layer.A, stage.reset, from_A, from_B.T, old_b.T, b.T, lambda t: t)
            self.move(layer.B, stage.reset, from_B.T, from_A, old_a, a, lambda t: t.T)
        self.factor *= math.sqrt(sum(before.values()) / sum(after.values())) if stage.rate == "sqrt" else stage.rate

    def cut(self, layer, kept):
        from_A, from_B, s = layer.maps()
        if s[0] > 0 and s[kept[-1]] <= max(layer.weight.shape) * self.epsilon * s[0]:
            raise Undetermined("a direction beyond the numerical rank is kept")
        return from_A[kept] @ layer.A.data, layer.B.data @ from_B[:, kept], from_A[kept], from_B[:, kept]

    def grow(self, layer, grown):
        """Columns of zeros, and the new rows of ``grown``: outside of the old rows, and of their median norm."""
        count, old, norms = layer.rank, layer.A.data, grown[: layer.rank].norm(dim=1).sort().values
        rows, low, high = grown[count:], norms[(count - 1) // 2] * (1 - 1e-5), norms[count // 2] * (1 + 1e-5)
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
                moved, new = gradient_by.square() @ rows(value), gradient_by.abs().sum(1) == 0
                moved[new] = 2.5 * moved[~new].mean(0)
                b, new_b = other.norm(dim=1).max(), new_other.norm(dim=1).max()
                state[key] = rows(moved.clamp_max(value.max() * (max(1.0, (new_b / b).item() ** 2) if b > 0 else 1.0)))
            elif kind is not None and value is not None:
                state[key] = rows((gradient_by if kind == "gradient" else by) @ rows(value))
