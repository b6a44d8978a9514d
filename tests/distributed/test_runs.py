"""Two real processes on gloo: they end with exactly the same weights, those of one process with both batches."""

import functools
import itertools

import lightning
import pytest
import torch
from distributed_runs import CROSSED, CROSSINGS, RESUMED, RUNS, fit, outcome, saved, saving
from ends import assert_resumed, assert_same_bits, found, of_pair
from torch.testing import assert_close
from wrapped_loops import LOADED, WAYS, ended

from dynrank.callbacks.lightning.strategies import check_strategy
from dynrank.errors import ConfigurationError

# Lightning gives advice about small data and logging.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where runs leave their checkpoints; the one of one process is made."""
    folder = tmp_path_factory.mktemp("job")
    run, name = CROSSED["one process"]
    fit(run, **saving(folder / name))
    return folder


@pytest.fixture(scope="module")
def results(folder):
    """[what process 0 found, what process 1 found], by check; see distributed_runs.main."""
    return of_pair("import sys, distributed_runs; distributed_runs.main(sys.argv[1])", folder)


@functools.cache
def alone(name):
    """What one process comes to."""
    return outcome(*fit(RUNS[name] if name in RUNS else RESUMED[name][0]))


@pytest.mark.parametrize("name", [*RUNS, *RESUMED])
def test_two_processes_come_to_what_one_does_with_both_batches(results, name):
    first, second = found(results, f"resume {name}" if name in RESUMED else name)
    if name in RESUMED:
        first, second = first["whole"], second["whole"]
    assert_same_bits(first, second)
    assert bool(first["shards"]) == name.startswith("fsdp2")
    expected = alone(name)
    assert first["events"] == expected["events"]
    assert first["events"]
    # PEFT adds a batch's updates up in the weights of all experts, which rounds more.
    assert_close(first["weights"], expected["weights"], rtol=0, atol=2e-5 if name == "ddp, peft, experts" else 1e-6)
    assert_close(first["predicted"], expected["predicted"], rtol=1e-4, atol=1e-6)
    assert_close(first["importance"], expected["importance"], rtol=1e-3, atol=1e-6)


def test_best_weights_are_those_of_the_mean_over_processes(results):
    """The metric of process 0 falls, and that of process 1 rises faster."""
    first, second = found(results, "best of own scores")
    assert first == second
    assert first == (20, 20.0)


@pytest.mark.parametrize("name", RESUMED)
def test_resumed_processes_come_to_the_same_bits(results, name):
    assert_resumed(found(results, f"resume {name}"), RESUMED[name][1])


@pytest.mark.parametrize("way", WAYS)
def test_wrapped_loop_ends_where_a_plain_one_does(results, way):
    expected = ended("plain")
    first, second = found(results, f"loop, {way}")
    for name, value in ended(way).items():
        assert torch.equal(value, expected[name]), name
        assert torch.equal(first[name], second[name]), name
        assert_close(first[name], value, rtol=1e-3, atol=1e-5)


def test_gradients_are_means_beside_sparse_ones(results):
    first, second = found(results, "gradients, sparse")
    assert_close(first, second, rtol=0, atol=0)
    assert all(gradient.any() for gradient in first[-1:])


@pytest.mark.parametrize("way", LOADED)
def test_gradients_are_means_over_processes_where_ranks_of_a_file_come_into_a_wrapped_model(results, way):
    """DDP keeps buckets of the shapes that it was made for."""
    expected, _ = found(results, f"gradients, {LOADED[0]}")
    first, second = found(results, f"gradients, {way}")
    assert_close(first, second, rtol=0, atol=0)
    assert_close(first, expected)


@pytest.mark.parametrize(
    ("kind", "there", "text"),
    [
        ("KeyboardInterrupt", "KeyboardInterrupt", "stop"),
        ("ConfigurationError", "ConfigurationError", "bad"),
        # Process 1 cannot make this error again, so it gets another one.
        ("Unpicklable", "RuntimeError", "Unpicklable in process 0: ab"),
    ],
)
def test_whatever_process_0_raises_is_raised_in_all(results, kind, there, text):
    for result in results:
        first, second = result[f"raised {kind}"]
        assert first[0] == kind
        assert second == (there, text)


def test_result_that_cannot_be_pickled_is_an_error_in_all(results):
    for result in results:
        assert len(result["raised by pickle"]) == 2


@pytest.mark.parametrize(("to", "source"), [*itertools.permutations(CROSSED, 2)])
def test_run_goes_on_from_the_checkpoint_of_other_processes(results, folder, to, source):
    run = CROSSED["one process"][0]
    _, name = CROSSED[source]
    if to == "one process":
        ends = [outcome(*fit(run, ckpt_path=saved(folder / name, step))) for step in CROSSINGS]
    else:
        ends = sum(found(results, f"{to} from {source}"), [])
    expected = alone("ddp, budget")
    for end in ends:
        assert end["events"] == expected["events"]
        assert_close(end["weights"], expected["weights"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("what", ["weights", "optimizer state"])
def test_processes_that_differ_are_found_in_all_of_them(results, what):
    for result in results:
        message = result[f"other {what}"]
        assert "before the change of rank at step 12" in message
        assert f"'net.2' ({what}: processes [1] differ from process 0)" in message
        assert "'net.0'" not in message


def test_checkpoint_without_base_needs_one_file_and_the_same_base(results):
    for result in results:
        assert "save_distributed_checkpoint=False" in result["a folder without the base"]
        assert "'net.2.base.weight' had another shape or other values than here (1 of" in result["another base"]


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork", "ddp_notebook"])
def test_strategies_that_lose_results_are_refused(strategy):
    trainer = lightning.Trainer(accelerator="cpu", devices=2, strategy=strategy, logger=False)
    with pytest.raises(ConfigurationError, match=r'start_method=.*use strategy="ddp"') as raised:
        check_strategy(trainer)
    assert raised.value.arguments == ("strategy",)
