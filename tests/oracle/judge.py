"""The comparison of a run with its reference, step by step."""

import math

import torch
import torch.nn.functional as F
from reference import Layer, Run, Undetermined
from runs import traced
from torch import nn

# Largest difference of a loss, or of a product relative to its largest element, that rounding explains in a stable run.
TOLERANCE = 1e-8


def reference_run(case, trace, noise=0.0):
    """(the trace of the reference, why it ended early); ``noise`` is relative, in all factors at the start."""
    draw = torch.Generator().manual_seed(0)
    layers = {}
    head = None
    for name, (linear, a, b) in case.modules().items():
        if name == "head":
            head = linear
            continue
        factors = [f * (1 + noise * torch.randn(f.shape, generator=draw).double()) for f in (a, b.T)]
        rule = {key: value for key, value in case.rules.get(name, {}).items() if key != "rank"}
        factors = [nn.Parameter(factor) for factor in factors]
        layers[name] = Layer(linear.requires_grad_(False), factors, case.scaling(name), **rule)
    run = Run(case, layers, head, lambda name, step: grown(trace, name, step))
    try:
        run.go()
    except Undetermined as reason:
        return run.trace, str(reason)
    return run.trace, ""


def grown(trace, name, step):
    """A after the growth before ``step``: its new rows are outside of the old ones, and of their median norm."""
    count = len(trace.factors[step - 1][name])
    a = trace.factors[step][name]
    norms = a.norm(dim=1)
    low, high = norms[:count].sort().values[[(count - 1) // 2, count // 2]]
    assert ((norms[count:] > low * (1 - 1e-5)) & (norms[count:] < high * (1 + 1e-5))).all(), (
        "new rows have another norm"
    )
    overlap = F.normalize(a[count:]) @ F.normalize(a).T - torch.eye(len(a))[count:]
    assert overlap.numel() == 0 or overlap.abs().max() < 1e-5, "new rows are not orthogonal"
    return a


def difference(step, other):
    """The largest relative difference of the losses and products of two steps; infinite if ranks differ."""
    found, loss = step
    expected, other_loss = other
    parts = [abs(loss - other_loss) / max(1.0, abs(other_loss))]
    for name, (rank, product) in expected.items():
        same = found[name][0] == rank
        parts.append(((found[name][1] - product).abs().max() / product.abs().max().clamp_min(1e-3)).item())
        parts += [] if same else [math.inf]
    return max(parts)


def judged(case):
    """(fault or "", what could not be compared and why)"""
    trace = traced(case)
    assert [*trace.steps] == [*range(case.total + 1)], [*trace.steps]
    expected, ended = reference_run(case, trace)
    chaos = None
    for step, other in enumerate(expected):
        found = difference(trace.steps[step], other)
        if found <= TOLERANCE:
            continue
        chaos = chaos or reference_run(case, trace, noise=1e-13)[0]
        spread = difference(chaos[step], other) if step < len(chaos) else math.inf
        if found <= 100 * spread:
            return "", "rounding grows to as much"
        ranks, wanted = ({name: rank for name, (rank, _) in seen.items()} for seen, _ in (trace.steps[step], other))
        return f"step {step}: ranks {ranks}, expected {wanted}; off by {found:.2g}, noise makes {spread:.2g}", ended
    return "", ended
