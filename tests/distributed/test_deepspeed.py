"""Ranks that change under DeepSpeed's ZeRO 1, 2 and 3, in two processes, beside DDP, where factors change their shapes.

accelerate imports DeepSpeed wherever it is installed, for every program, so scripts/test installs it into a folder of
its own. The suite makes a few of the runs; all that are here where DeepSpeed is installed beside the other packages
(``pip install 'dynrank[deepspeed]'``), and scripts/bench/zero.py has the whole table.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import zero_runs
from ends import found, of_interpreters

APART = Path(sys.prefix) / "deepspeed"
IS_INSTALLED = find_spec("deepspeed") is not None
# More than the suite has time for.
LONG = pytest.mark.skipif(not IS_INSTALLED, reason="pip install 'dynrank[deepspeed]', or scripts/bench/zero.py")
pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not IS_INSTALLED and not APART.is_dir(), reason="scripts/test installs DeepSpeed"),
]


def long(*names):
    return [pytest.param(name, marks=LONG) for name in names]


RUNS = ["by importance"]
READ = ["read by PEFT, PEFT's, a head"]
REFUSED = ["refused, plain loop", "refused, a head, and a raised rate", "refused, growth above the first rank"]
LONG_RUNS = ["accumulated, two cuts", "a cut and growth", "undone by its check", "add_lora", "a head"]
LONG_READ = ["read by PEFT, add_lora's"]
RESUMED = ["resumed, by importance"]
BEST = ["best, before the cut"]
RATES = ["rates by ds.json, 2", "rates by ds.json, 3"]
LONG_REFUSED = sorted({f"refused, {name}" for name in zero_runs.REFUSED} - {*REFUSED})


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """[what process 0 found, what process 1 found], by check."""
    folder = tmp_path_factory.mktemp("deepspeed")
    zero_runs.save_base(folder / "base")
    names = [*RUNS, *READ, *REFUSED]
    if IS_INSTALLED:
        names += [*LONG_RUNS, *LONG_READ, *RESUMED, *BEST, *RATES, *LONG_REFUSED]
    return of_interpreters(Path(zero_runs.__file__), folder, *names, path=str(APART))


@pytest.mark.parametrize("name", [*RUNS, *long(*LONG_RUNS)])
def test_zero_ends_where_a_change_of_shapes_ends(results, name):
    both = found(results, name)
    assert both[0].keys() == {*zero_runs.RUNS[name][1]}
    for result in both:
        for end in result.values():
            assert end["ranks"] == "equal"
            assert end["rate"] == 0
            assert end["loss"] < 2e-6
            assert end["update"] < 2e-5
            assert end["importance"] < 1e-4
            # What a cut has taken away stays exactly zero, in masters and moments.
            assert end["dead"] == 0


@pytest.mark.parametrize("name", long(*RESUMED))
def test_resumed_processes_come_to_the_same_bits(results, name):
    for result in found(results, name):
        for ends in result.values():
            assert ends.keys() == {*zero_runs.SAVED}
            assert all(is_same for is_same, _ in ends.values())
            # The ranks on disk are those before the cut, and of after it.
            assert [ranks == [zero_runs.RANK] for _, ranks in ends.values()] == [True, True, False, False]


@pytest.mark.parametrize("name", [*READ, *long(*LONG_READ)])
def test_peft_reads_what_is_saved(results, name):
    for difference, ranks in found(results, name)[0].values():
        assert difference < 1e-5
        assert len({*ranks.values()}) > 1


@pytest.mark.parametrize("name", long(*BEST))
def test_best_checkpoint_comes_back_with_its_ranks(results, name):
    for result in found(results, name):
        assert {*map(str, result.values())} == {str((4, True, [zero_runs.RANK]))}


@pytest.mark.parametrize("name", long(*RATES))
def test_factor_reaches_the_optimizer_that_steps_under_schedulers_of_deepspeed(results, name):
    for result in found(results, name):
        ratios = {step: ratio for step, ratio in result.items() if ratio is not None}
        assert ratios == {step: pytest.approx(1.0 if step < zero_runs.CHANGE else 2.0) for step in ratios}
        assert len(ratios) > zero_runs.CHANGE


@pytest.mark.parametrize("name", [*REFUSED, *long(*LONG_REFUSED)])
def test_what_was_not_tried_is_refused_by_name(results, name):
    words = "use DDP" if name == "refused, plain loop" else zero_runs.REFUSED[name.removeprefix("refused, ")][2]
    for result in found(results, name):
        assert words in result[""]
