"""The rule "gates" of ../shared/cut.md, by autograd for each example; ``reference.py`` does not know it."""

import torch
from reference import Rule


class Gates(Rule):
    """A direction's price is what the loss rises without it, by gradient and curvature, after earlier drops."""

    def __init__(self, stage):
        super().__init__(stage)
        self.seen = []

    def observe(self, run, batches):
        """The core of each example: the gradient of the step's loss by an identity matrix between A and B."""
        self.steps += 1
        cores, terms = [], 0
        for x, y in batches:
            eyes = {n: torch.eye(layer.rank).double().repeat(len(x), 1, 1) for n, layer in run.pool().items()}
            eyes = {name: eye.requires_grad_() for name, eye in eyes.items()}
            loss = run.case.loss(run.output(x, eyes), y) / len(batches)
            cores.append(torch.autograd.grad(loss, [*eyes.values()]))
            terms += run.case.terms(y)
        joined = [torch.cat(parts) for parts in zip(*cores, strict=True)]
        self.seen.append((dict(zip(run.pool(), joined, strict=True)), self.stage.loss_terms or terms))

    def drops(self, run, least):
        pool, rows = run.pool(), []
        maps = {name: layer.maps() for name, layer in pool.items()}
        gates = [(name, i) for name, layer in pool.items() for i in range(layer.rank)]
        for cores, terms in self.seen:
            c = [torch.einsum("ri,nrq,iq->ni", maps[n][1], core, maps[n][0]) for n, core in cores.items()]
            rows.append((torch.cat(c, dim=1), terms))
        gradient = (sum(c.sum(0) for c, _ in rows) / len(rows)).tolist()
        hessian = (sum(terms * c.T @ c for c, terms in rows) / len(rows)).tolist()
        left, gone = {name: layer.rank for name, layer in pool.items()}, []

        def price(i):
            between = sum(hessian[i][j] for j in gone)
            return (-gradient[i] + hessian[i][i] / 2 + between) / pool[gates[i][0]].width

        while any(left[name] > least[name] for name in left):
            candidates = [i for i, (name, _) in enumerate(gates) if i not in gone and left[name] > least[name]]
            gone.append(min(reversed(candidates), key=price))
            left[gates[gone[-1]][0]] -= 1
        return [gates[i] for i in gone]
