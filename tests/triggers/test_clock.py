"""Times that are known before a run, by hand."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynrank.errors import ConfigurationError
from dynrank.triggers import At, Run


@pytest.mark.parametrize(
    ("time", "steps", "reason"),
    [
        (At(step=130), 130, "step 130"),
        (At(epoch=3), 21, "epoch 3"),
        (At(fraction=0.0), 0, "fraction 0"),
        # Half a step is rounded up, because a trigger never fires before its time.
        (At(fraction=0.005), 1, "fraction 0.005"),
        (At(fraction=1), 100, "fraction 1"),
    ],
)
def test_at_in_steps(time, steps, reason):
    assert time.in_steps(Run(total_steps=100, steps_per_epoch=7)) == steps
    assert time.reason == reason


@given(st.integers(0, 100), st.integers(1, 10**6))
def test_at_fraction_is_the_first_step_at_or_after_the_exact_share(percent, total):
    exact = Fraction(percent, 100) * total
    assert At(fraction=percent / 100).in_steps(Run(total)) == -(-exact.numerator // exact.denominator)


@pytest.mark.parametrize("options", [{}, {"step": 1, "epoch": 1}, {"step": 0, "fraction": 0.0}])
def test_at_is_one_of_three(options):
    with pytest.raises(ConfigurationError, match="one of step, epoch and fraction"):
        At(**options)


def test_at_needs_a_length_only_where_it_counts_in_it():
    unknown = Run(total_steps=None)
    assert At(step=7).in_steps(unknown) == 7
    with pytest.raises(ConfigurationError, match="give step instead$"):
        At(epoch=1).in_steps(unknown)
    with pytest.raises(ConfigurationError, match="set max_steps"):
        At(fraction=0.5).in_steps(unknown)
