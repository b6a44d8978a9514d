"""The importance of layers, in float64, from the gradients and factors of every step."""

from itertools import pairwise

import dynrank


class ByHand:
    """Gradients and factors of every step, and from them the sums as they are defined."""

    def __init__(self, model):
        self.layers = dict(dynrank.lora_layers(model))
        self.steps = []
        self.thetas = [self._now()]

    def _pairs(self):
        return {name: (layer.lora_A, layer.lora_B) for name, layer in self.layers.items()}

    def _now(self):
        return {name: [p.detach().double().clone() for p in pair] for name, pair in self._pairs().items()}

    def end_step(self):
        self.steps.append(
            {n: [0.0 * p if p.grad is None else p.grad.double().clone() for p in q] for n, q in self._pairs().items()}
        )
        self.thetas.append(self._now())

    def terms(self, name, factors=(0, 1)):
        """-g_{t+1} (theta_{t+1} - theta_t), t = 0, 1, ...; the gradient of step t is taken at theta_t."""
        found = []
        for (old, new), gradient in zip(pairwise(self.thetas), self.steps[1:], strict=False):
            parts = [(gradient[name][i] * (new[name][i] - old[name][i])).sum().item() for i in factors]
            found.append(-sum(parts))
        return found
