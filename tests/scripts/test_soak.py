"""The soak in miniature, and its arithmetic."""

import numpy as np
import pytest


@pytest.fixture(scope="module")
def soak(script):
    return script("soak")


def test_short_soak_changes_ranks_and_leaves_no_handle_open(soak, tiny_bert, tmp_path):
    overrides = ["task.limit=80", f"task.model={tiny_bert}"]
    samples = soak.soak(overrides, minutes=1, steps=40, every=5, folder=tmp_path)
    assert [sample.step for sample in samples] == list(range(10, 41, 10))
    # The samples lie between the changes at 5 and 10, at 15 and 20, and so on.
    assert {sample.rank for sample in samples} == {16}
    changes = (tmp_path / "history.csv").read_text().splitlines()[1:]
    assert len({line.split(",")[0] for line in changes}) == 7
    assert len({sample.handles for sample in samples[1:]}) == 1
    assert len(soak.table(samples).splitlines()) == 5


def test_slope_and_its_error_are_those_of_numpy(soak):
    generator = np.random.default_rng(0)
    x = np.sort(generator.uniform(0, 10, 12))
    y = 3 + 0.2 * x + generator.normal(0, 0.5, 12)
    (rate, _), covariance = np.polyfit(x, y, 1, cov=True)
    assert soak.slope(list(x), list(y)) == pytest.approx((rate, covariance[0, 0] ** 0.5))


@pytest.mark.parametrize(("leak", "handles", "level"), [(0.0, 0, True), (0.05, 0, False), (0.0, 1, False)])
def test_verdict_tells_a_leak_from_noise(soak, leak, handles, level):
    noise = np.random.default_rng(1).normal(0, 5, 400)
    samples = [
        soak.Sample(step, step / 100, 16, 1000 + noise[step // 10 - 1] + leak * step, 20 + handles * (step > 3000))
        for step in range(10, 4001, 10)
    ]
    text, found = soak.verdict(samples, 50)
    assert found is level
    assert ("NOT" in text) is not level


def test_no_verdict_without_rounds(soak):
    samples = [soak.Sample(step, step / 100, 16, 1000.0, 20) for step in range(10, 400, 10)]
    assert soak.verdict(samples, 50)[0].startswith("no verdict")
