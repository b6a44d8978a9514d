"""The comparison of a run with its reference, step by step."""

import torch
from reference import Layer, Run, Undetermined
from runs import traced
from torch import nn

# Largest difference of a loss, or of a product relative to its largest element, that rounding explains in a stable run.
TOLERANCE = 1e-8


def reference_run(case, grown, noise=0.0):
    """(the trace of the reference, why it ended early); ``noise`` is relative, in all factors at the start."""
    draw = torch.Generator().manual_seed(0)
    layers = {}
    head = ()
    for name, (weight, bias, *factors) in case.tensors().items():
        if name == "head":
            head = nn.Parameter(weight.clone()), nn.Parameter(bias.clone())
            continue
        factors = [f * (1 + noise * torch.randn(f.shape, generator=draw).double()) for f in factors]
        rule = {key: value for key, value in case.rules.get(name, {}).items() if key != "rank"}
        layers[name] = Layer(weight, bias, *map(nn.Parameter, factors), case.scaling(name), **rule)
    run = Run(case, case.stages(), layers, head, grown, torch.finfo(torch.float64).eps)
    try:
        run.go()
    except Undetermined as reason:
        return run.trace, str(reason)
    return run.trace, ""


def difference(one, other):
    """(whether ranks differ, the largest relative difference of losses and products) of two steps."""
    if one[0] != other[0]:
        return True, float("inf")
    parts = [abs(one[2] - other[2]) / max(1.0, abs(other[2]))]
    for name, product in other[1].items():
        parts.append(((one[1][name] - product).abs().max() / product.abs().max().clamp_min(1e-3)).item())
    return False, max(parts)


def judged(case):
    """(fault or "", what could not be compared and why)"""
    trace = traced(case)
    expected, ended = reference_run(case, lambda name, step: trace.factors[step][name])
    chaos = None
    assert [*trace.steps] == [*range(case.total + 1)], [*trace.steps]
    for step, other in enumerate(expected):
        other_ranks, found = difference(trace.steps[step], other)
        if found <= TOLERANCE:
            continue
        if chaos is None:
            chaos, _ = reference_run(case, lambda name, step: trace.factors[step][name], noise=1e-13)
        apart, spread = difference(chaos[step], other) if step < len(chaos) else (True, float("inf"))
        if apart or found <= 100 * spread:
            return "", "rounding grows to as much"
        if other_ranks:
            return f"step {step}: ranks {trace.steps[step][0]}, expected {other[0]}", ended
        return f"step {step}: off by {found:.2g}, where noise makes {spread:.2g}", ended
    return "", ended
