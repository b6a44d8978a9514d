"""AdaLoRA's importance, written out entry by entry as in arXiv:2303.10512, equations 8 to 11."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import dynrank
from dynrank.change.measuring import Sensitivity


class Reference:
    """P diag(lambda) Q with one scalar at a time; the gauge P, Q of the SVD is fixed when it begins."""

    def __init__(self, layer, beta=0.85):
        b, a = self.factors(layer)
        u, s, vh = torch.linalg.svd(b @ a)
        self.s = s[: layer.rank]
        # P = B T_b and Q = T_a A, and P diag(s) Q = B A wherever the factors go
        self.t_b = torch.linalg.lstsq(b, u[:, : layer.rank]).solution
        self.t_a = torch.linalg.lstsq(a.mT, vh[: layer.rank].mT).solution.mT
        self.beta, self.mean, self.spread = beta, {}, {}

    @staticmethod
    def factors(layer):
        return layer.lora_B.detach().clone(), layer.lora_A.detach().clone()

    def step(self, before, layer, gradient):
        """Weights after the step, gradients from before it, as AdaLoRA finds them in .data and .grad.

        Args:
            before: the factors that the gradient was taken at.
            layer: the factors now.
            gradient: of the loss at B A, dense.
        """
        p_then, q_then = before[0] @ self.t_b, self.t_a @ before[1]
        p, q = self.factors(layer)[0] @ self.t_b, self.t_a @ self.factors(layer)[1]
        grad_p, grad_q = gradient @ q_then.mT * self.s, self.s[:, None] * (p_then.mT @ gradient)
        self.shape = p.shape[0], q.shape[1]
        entries = {}
        for i in range(len(self.s)):
            entries[("value", i)] = float(self.s[i] * (p[:, i] @ gradient @ q_then[i]))
            for j in range(len(p)):
                entries[("p", j, i)] = float(p[j, i] * grad_p[j, i])
            for j in range(q.shape[1]):
                entries[("q", i, j)] = float(q[i, j] * grad_q[i, j])
        for key, product in entries.items():
            sensitivity = abs(product)  # equation 8
            mean = self.beta * self.mean.get(key, 0.0) + (1 - self.beta) * sensitivity  # equation 9
            uncertainty = abs(sensitivity - mean)
            self.spread[key] = self.beta * self.spread.get(key, 0.0) + (1 - self.beta) * uncertainty  # equation 10
            self.mean[key] = mean

    def importance(self):
        score = {key: self.mean[key] * self.spread[key] for key in self.mean}  # equation 11
        d_out, d_in = self.shape
        return torch.tensor(
            [
                score[("value", i)]
                + sum(score[("p", j, i)] for j in range(d_out)) / d_out
                + sum(score[("q", i, j)] for j in range(d_in)) / d_in
                for i in range(len(self.s))
            ],
            dtype=torch.float64,
        )


def problem(seed=0):
    torch.manual_seed(seed)
    net = dynrank.add_lora(nn.Sequential(nn.Linear(7, 6)), rank=3, alpha=5, target_modules=["0"], dtype=torch.float64)
    net.double()
    nn.init.normal_(net[0].lora_B)
    return net, torch.randn(20, 7, dtype=torch.float64), torch.randn(20, 6, dtype=torch.float64)


def train(net, x, y, steps, watch):
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        output = net(x)
        output.retain_grad()
        nn.functional.mse_loss(output, y).backward()
        before, gradient = Reference.factors(net[0]), net[0].scaling * output.grad.mT @ x
        optimizer.step()
        watch(before, net[0], gradient)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_sensitivity_equals_the_formula_entry_by_entry(steps):
    net, x, y = problem()
    reference, collected = Reference(net[0]), Sensitivity({"0": net[0]})

    def watch(*step):
        reference.step(*step)
        collected.end_step()

    train(net, x, y, steps, watch)
    assert_close(collected.of("0"), reference.importance(), rtol=1e-8, atol=0)


def test_sensitivity_does_not_depend_on_how_the_product_is_written():
    scores = []
    for mix in (torch.eye(3), torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.5, 0.3], [0.1, 0.0, 1.0]])):
        net, x, y = problem()
        with torch.no_grad():
            net[0].lora_A.copy_(mix.double() @ net[0].lora_A)
            net[0].lora_B.copy_(net[0].lora_B @ mix.double().inverse())
        collected = Sensitivity({"0": net[0]})
        nn.functional.mse_loss(net(x), y).backward()  # no step: the optimizer would see the difference
        collected.end_step()
        scores.append(collected.of("0"))
    assert_close(*scores, rtol=1e-8, atol=0)


def test_sensitivity_of_a_direction_that_the_loss_ignores_is_nothing():
    net, x, _ = problem()
    u, s, vh = torch.linalg.svd(torch.randn(6, 7, dtype=torch.float64), full_matrices=False)
    s = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)
    with torch.no_grad():
        net[0].lora_B.copy_(u[:, :3] * s)
        net[0].lora_A.copy_(vh[:3])
    collected = Sensitivity({"0": net[0]})
    x = x - x @ vh[1:2].mT @ vh[1:2]  # nothing comes in along the second direction, and nothing of it is read
    (net(x) @ u[:, [0, 2]]).square().sum().backward()
    collected.end_step()
    scores = collected.of("0")
    assert scores[1] <= 1e-20 * scores[0]
    assert scores[2] > 1e-6 * scores[0]


def test_sensitivity_without_a_step_is_zero():
    net, _, _ = problem()
    collected = Sensitivity({"0": net[0]})
    collected.end_step()  # no gradients yet
    assert torch.equal(collected.of("0"), torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize("cut", [0, 1, 3])
def test_sensitivity_goes_on_from_its_state(cut, tmp_path):
    net, x, y = problem()
    whole, head, tail = Sensitivity({"0": net[0]}), Sensitivity({"0": net[0]}), []

    def resume(*_):
        whole.end_step()
        head.end_step() if not tail else tail[0].end_step()
        resume.steps += 1
        if resume.steps == cut:
            torch.save(head.state_dict(), tmp_path / "state")
            tail.append(Sensitivity({"0": net[0]}))
            tail[0].load_state_dict(torch.load(tmp_path / "state", weights_only=True))

    resume.steps = 0
    train(net, x, y, 4, resume)
    assert_close((tail or [head])[0].of("0"), whole.of("0"), rtol=0, atol=0)
