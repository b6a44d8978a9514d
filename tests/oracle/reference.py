"""A training run whose ranks change, as ../shared/maths.md has it: dense, naive, in float64, and without dynrank.

A layer computes ``y = x W^T + b + s (x A^T) B^T``. Only growth is not computed here: its random rows are taken from the run
that is judged, and checked. ``Rule`` says which directions a cut drops; another rule derives from it, as gates do.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

# Whether a cut also balances the layers of the pool that keep their rank, and moves their moments.
BALANCE_ALL = False
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

    def maps(self):
        """(from_A, from_B, singular values): from_A @ A and B @ from_B are the balanced factors of all directions."""
        u, s, vh = torch.linalg.svd(self.B.detach() @ self.A.detach())
        if s[0] == 0:
            return torch.eye(self.rank).double(), torch.eye(self.rank).double(), s[: self.rank]
        u, s, v = u[:, : self.rank], s[: self.rank], vh[: self.rank].T
        root = s.clamp_min(1e-300).sqrt()
        return (u / root).T @ self.B.detach(), self.A.detach() @ (v / root), s

    def bounds(self, last):
        """(lowest, highest) next rank."""
        if self.pinned:
            return self.rank, self.rank
        return self.final_rank or 1, (last and self.final_rank) or min(self.weight.shape)


class Rule:
    """By weight: the smallest direction is dropped first, per parameter where layers share a pool."""

    def __init__(self):
        self.steps = 0

    def observe(self, run, batches):
        """Called in every step of the window after backward, before the optimizer's step."""
        self.steps += 1

    def prices(self, run):
        return [
            ((layer.scaling * s.item()) ** 2 / layer.width, name, i)
            for name, layer in run.pool().items()
            for i, s in enumerate(layer.maps()[2])
        ]

    def drops(self, run, least):
        """[(layer, direction)] in the order of dropping, until every layer has ``least[layer]`` directions left."""
        left, gone = {name: layer.rank for name, layer in run.pool().items()}, []
        for _, name, i in sorted(self.prices(run), key=lambda price: (price[0], -price[2])):
            if left[name] > least[name]:
                left[name] -= 1
                gone.append((name, i))
        return gone

    def share_out(self, run, pool, low, top):
        """Ranks from ``low`` up to ``top``: the step that is worth most comes first, if it fits into the pool."""
        ranks, ended = dict(low), set()
        now = {name: layer.rank for name, layer in run.pool().items()}
        steps = []
        for name, _ in self.drops(run, dict.fromkeys(now, 1)):
            steps.append((name, now[name]))
            now[name] -= 1
        for name, rank in reversed(steps):
            if low[name] < rank <= top[name] and name not in ended:
                taken = {**ranks, name: rank}
                if sum(r * run.layers[n].width for n, r in taken.items()) > pool:
                    ended.add(name)
                else:
                    ranks = taken
        return ranks


class Run:
    """``case`` describes the run, ``stages`` its schedule; ``grown(layer, step)`` is A of the judged run after a growth."""

    def __init__(self, case, stages, layers, head, grown, window_rule, epsilon):
        self.case, self.stages, self.layers, self.head = case, stages, layers, head
        self.grown, self.window_rule, self.epsilon = grown, window_rule, epsilon
        self.next, self.pending, self.window, self.factor = 0, None, None, 1.0
        self.best, self.stale, self.trace = None, 0, []
        factors = [p for layer in layers.values() for p in (layer.A, layer.B)]
        self.optimizer = case.make_optimizer([{"params": factors}, {"params": [*head]}] if head else factors)

    def pool(self):
        return {name: layer for name, layer in sorted(self.layers.items()) if not layer.pinned}

    def output(self, x, cores=None):
        def call(name, x):
            if name == "head":
                return F.linear(x, *self.head)
            layer = self.layers[name]
            z = x @ layer.A.T
            if cores and name in cores:
                z = torch.einsum("n...r,nqr->n...q", z, cores[name])
            return F.linear(x, layer.weight, layer.bias) + layer.scaling * z @ layer.B.T

        return self.case.network(call, x)

    def validate(self):
        with torch.no_grad():
            x, y = self.case.validation()
            return self.case.loss(self.output(x), y).item()

    def go(self):
        """Fills ``trace``: for each step (ranks, products, loss), as they are in its forward; then those of the end."""
        for step in range(self.case.total):
            self.advance(step)
            self.record(self.step(step))
            if (step + 1) % self.case.every == 0:
                self.validated(self.validate())
        self.advance(self.case.total, ended=True)
        self.record(0.0)

    def step(self, step):
        """One optimizer step; its loss, and in ``now`` the ranks and products before it."""
        self.now = self.state()
        batches, parameters = self.case.batches(step), [p for g in self.optimizer.param_groups for p in g["params"]]
        self.optimizer.zero_grad()
        loss = sum(self.case.loss(self.output(x), y) for x, y in batches) / len(batches)
        loss.backward()
        if self.window is not None:
            self.window.observe(self, batches)
        if self.case.clip:
            nn.utils.clip_grad_norm_(parameters, self.case.clip)
        for group, factor in zip(self.optimizer.param_groups, (self.factor, 1.0), strict=False):
            group["lr"] = self.case.lr * self.case.decay(step) * factor
        self.optimizer.step()
        return loss.item()

    def state(self):
        products = {n: layer.scaling * (layer.B @ layer.A).detach() for n, layer in self.layers.items()}
        return {n: layer.rank for n, layer in self.layers.items()}, products

    def record(self, loss):
        self.trace.append((*(self.now if len(self.trace) < self.case.total else self.state()), loss))

    # When

    def validated(self, value):
        stage = self.stages[self.next] if self.next < len(self.stages) and self.pending is None else None
        if stage is None or stage.plateau is None:
            return
        if self.best is None or self.best - value > stage.plateau["min_delta"] * abs(self.best):
            self.best, self.stale = value, 0
        else:
            self.stale += 1
            if self.stale >= stage.plateau["patience"]:
                self.pending = self.next

    def advance(self, step, ended=False):
        due = [i for i, s in enumerate(self.stages) if i >= self.next and s.planned is not None and s.planned <= step]
        if due and (self.pending is None or self.pending < due[-1]):
            self.pending = due[-1]
        if not ended:
            self.open_window(step)
        if self.pending is not None and (ended or self.ready(step)):
            self.change(step)
            self.open_window(step)

    def open_window(self, step):
        """Gates are measured in the ``window`` steps before a planned change, and since the last change."""
        planned = {s.planned: i for i, s in enumerate(self.stages) if i >= self.next and s.planned is not None}
        for at, i in planned.items():
            if self.pending is None and self.window is None and at - self.stages[i].window <= step < at:
                self.window = self.window_rule() if self.measures(i) else None

    def measures(self, i):
        stage = self.stages[i]
        return stage.by_gates and (stage.kind == "budget" or self.ranks(i, Rule()) != self.state()[0])

    def ready(self, step):
        stage = self.stages[self.pending]
        if not self.measures(self.pending):
            return True
        self.window = self.window or self.window_rule()
        soon = any(later.planned is not None and later.planned <= step + 1 for later in self.stages[self.pending + 1 :])
        come = stage.planned is not None and stage.planned <= step
        return soon or come or self.window.steps >= stage.window

    # To what

    def ranks(self, i, rule):
        stage, last = self.stages[i], i == len(self.stages) - 1
        bounds = {name: layer.bounds(last) for name, layer in self.layers.items()}
        if stage.kind == "budget":
            return self.budget(stage, rule, bounds)
        wanted = {}
        for name, layer in self.layers.items():
            r, (low, high) = layer.rank, bounds[name]
            if stage.kind == "towards":
                new = round(r * ((layer.final_rank or stage.to) / r) ** (1 / stage.changes_left))
            elif stage.kind == "energy":
                energy = layer.maps()[2].square().cumsum(0)
                new = max(stage.lowest, 1 + int((energy < stage.to * energy[-1] * (1 - 1e-10)).sum()))
            else:
                new = stage.to
            grown = max(r, min(new, high))
            wanted[name] = grown if stage.kind == "grow" else min(r, max(low, min(new, high)))
        return wanted

    def budget(self, stage, rule, bounds):
        now = {name: layer.rank for name, layer in self.layers.items()}
        width = {name: layer.width for name, layer in self.layers.items()}
        size = sum(now[n] * width[n] for n in now)
        if stage.size == "final_rank":
            end = min(size, sum(max(low, min(high, stage.to)) * width[n] for n, (low, high) in bounds.items()))
        else:
            end = {"parameters": stage.to, "bytes": stage.to // 4, "share": math.floor(stage.to * size + 1e-9)}[stage.size]
        if stage.changes_left > 1:
            end = math.floor(size * (end / size) ** (1 / stage.changes_left) + 1e-6)
        low, top = {}, {}
        for name, layer in self.layers.items():
            least, most = max(stage.lowest, bounds[name][0]), min(bounds[name][1], layer.highest or stage.highest or 99)
            fixed = layer.rank <= least or bounds[name][0] == bounds[name][1]
            low[name] = min(layer.rank, max(bounds[name][0], min(layer.rank, bounds[name][1]))) if fixed else least
            top[name] = low[name] if fixed else min(layer.rank, max(least, most))
        return rule.share_out(self, end, low, top)

    # The change

    def change(self, step):
        stage, index = self.stages[self.pending], self.pending
        rule = self.window if self.measures(index) and self.window and self.window.steps else Rule()
        before, after = {n: layer.rank for n, layer in self.layers.items()}, self.ranks(index, rule)
        self.next, self.pending, self.window, self.best, self.stale = index + 1, None, None, None, 0
        if after == before:
            return
        value, old = self.validate() if stage.max_regression is not None else None, {}
        dropped = rule.drops(self, {name: min(after[name], before[name]) for name in self.pool()})
        for name, layer in self.pool().items():
            if after[name] != before[name] or (BALANCE_ALL and stage.kind != "grow"):
                kept = [i for i in range(layer.rank) if (name, i) not in dropped]
                new, maps = self.grow(name, after[name], step) if after[name] > layer.rank else self.cut(layer, kept)
                old[name] = layer.A.data, layer.B.data, maps
                layer.A.data, layer.B.data = new
        if value is not None and not self.validate() - value <= stage.max_regression * abs(value):
            for name, (a, b, _) in old.items():
                self.layers[name].A.data, self.layers[name].B.data = a, b
            return
        for name, (a, b, (from_A, from_B)) in old.items():
            layer = self.layers[name]
            self.move(layer.A, stage.reset, from_A, from_B.T, b.T, layer.B.data.T, lambda t: t)
            self.move(layer.B, stage.reset, from_B.T, from_A, a, layer.A.data, lambda t: t.T)
        mean = sum(before.values()) / sum(after.values())
        self.factor *= math.sqrt(mean) if stage.rate == "sqrt" else stage.rate

    def cut(self, layer, kept):
        from_A, from_B, s = layer.maps()
        if s[0] > 0 and s[kept[-1]] <= max(layer.weight.shape) * self.epsilon * s[0]:
            raise Undetermined("a direction beyond the numerical rank is kept")
        from_A, from_B = from_A[kept], from_B[:, kept]
        return (from_A @ layer.A.data, layer.B.data @ from_B), (from_A, from_B)

    def grow(self, name, rank, step):
        layer = self.layers[name]
        old, new = layer.A.data, self.grown(name, step)[layer.rank :].double()
        norms, identity = old.norm(dim=1).sort().values, torch.eye(rank, layer.rank).double()
        middle = norms[(len(norms) - 1) // 2] * (1 - 1e-5), norms[len(norms) // 2] * (1 + 1e-5)
        assert ((new.norm(dim=1) >= middle[0]) & (new.norm(dim=1) <= middle[1])).all(), "new rows have another norm"
        overlap = F.normalize(new) @ F.normalize(torch.cat([old, new])).T
        assert (overlap - torch.eye(rank)[layer.rank :]).abs().max() < 1e-5, "new rows are not orthogonal"
        columns = torch.cat([layer.B.data, torch.zeros(len(layer.B), rank - layer.rank).double()], dim=1)
        return (torch.cat([old, new]), columns), (identity, identity.T)

    def move(self, parameter, reset, by, gradient_by, other, new_other, rows):
        """Moments by the maps (new rank, old rank) of the parameter and of its gradient; ``rows`` puts the rank first."""
        state = self.optimizer.state.get(parameter, {})
        if reset:
            state.clear()
        for key, value in state.items():
            kind = KINDS.get(f"{type(self.optimizer).__name__}.{key}", KINDS.get(key))
            if kind is None or value is None:
                continue
            v = rows(value)
            if kind != "square":
                state[key] = rows((gradient_by if kind == "gradient" else by) @ v)
                continue
            moved, new = gradient_by.square() @ v, gradient_by.abs().sum(1) == 0
            moved[new] = 2.5 * moved[~new].mean(0)
            b, new_b = other.norm(dim=1).max(), new_other.norm(dim=1).max()
            bound = v.max() * (max(1.0, (new_b / b).item() ** 2) if b > 0 else 1.0)
            state[key] = rows(moved.clamp_max(bound))
