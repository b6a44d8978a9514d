"""transformers' Trainer and loops by Fabric and accelerate under FSDP2: two processes end where one process ends."""

import functools
from types import SimpleNamespace

import pytest
import torch
import wrapped_loops
from accelerate.utils import DistributedType
from ends import assert_resumed, assert_same_bits, found, of_pair
from peft import AutoPeftModel, PeftModel
from safetensors.torch import load_file
from torch.testing import assert_close
from trainer_runs import ANEW, IN_ONE, RESUMED, RUNS, STEPS, loaded, outcome, save_base, trained

import dynrank
from dynrank.distributed.accelerated import check_accelerate
from dynrank.errors import ConfigurationError

# transformers gives advice about small models and settings.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the base lies, and runs leave their checkpoints."""
    folder = tmp_path_factory.mktemp("trainer")
    save_base(folder / "base")
    return folder


@pytest.fixture(scope="module")
def results(folder):
    """[what process 0 found, what process 1 found], by check; see trainer_runs.main."""
    return of_pair("import sys, trainer_runs; trainer_runs.main(sys.argv[1])", folder)


@functools.cache
def alone(folder, name):
    """What one process comes to, with both their batches."""
    run = RUNS[name] if name in RUNS else RESUMED[name][0]
    return outcome(*trained(run, folder / "base", folder / "alone"))


def assert_same_run(one, expected):
    assert one["events"] == expected["events"]
    assert one["events"]
    assert_close(one["weights"], expected["weights"], rtol=0, atol=5e-6)
    assert_close(one["losses"], expected["losses"], rtol=0, atol=5e-6)
    assert_close(one["importance"], expected["importance"], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", [*RUNS, *RESUMED, "by transformers", "attached"])
def test_two_processes_come_to_what_one_does_with_both_batches(results, folder, name):
    first, second = found(results, f"resume {name}" if name in RESUMED else name)
    if name in RESUMED:
        first, second = first["whole"], second["whole"]
    assert_same_bits(first, second)
    # Weights in bytes are no floats, so embedding, head and norms alone are sharded.
    assert first["shards"] == (7 if name == "nf4 in bytes" else 21)
    expected = alone(folder, "peft" if name in ("by transformers", "attached") else name)
    if name == "in bfloat16":
        # The rounding of bfloat16 differs with the batch, and may turn a choice of ranks.
        assert_close(first["losses"], expected["losses"], rtol=0.02, atol=0)
    else:
        assert_same_run(first, expected)


@pytest.mark.parametrize("name", RESUMED)
def test_resumed_processes_come_to_the_same_bits(results, name):
    assert_resumed(found(results, f"resume {name}"), RESUMED[name][1])


@pytest.mark.parametrize("name", ANEW)
def test_each_model_of_model_init_is_sharded_and_resumed_as_one_that_is_given(results, name):
    for ends, run in zip(found(results, f"anew, {name}"), found(results, f"resume {name}"), strict=True):
        for end in ends:
            assert end["shards"] == run["whole"]["shards"]
            assert_same_bits(end, run["whole"])


@pytest.mark.parametrize("name", IN_ONE)
def test_one_process_goes_on_from_a_checkpoint_of_two(results, folder, name):
    end = results[0][f"in one, {name}"]
    assert not isinstance(end, str), end
    assert_same_run(end, alone(folder, name))


def assert_holds(saved, weights):
    """The file of an adapter has the values of the run."""
    stored = load_file(saved / "adapter_model.safetensors")
    values = [value for name, value in sorted(weights.items()) if "lora_" in name]
    read = [value for name, value in sorted(stored.items()) if "lora_" in name]
    assert_close(read, values, rtol=0, atol=0)


@pytest.mark.parametrize("name", RESUMED)
def test_peft_reads_what_was_saved(results, folder, name):
    """transformers itself saves no model under sharded state dicts; ``save_adapter`` does."""
    weights = found(results, f"resume {name}")[0]["whole"]["weights"]
    for saved in ("by dynrank",) if "shards" in name else ("by dynrank", "end"):
        place = folder / f"resume {name}" / saved
        assert_holds(place, weights)
        model = PeftModel.from_pretrained(loaded(folder / "base"), place)
        assert len({layer.rank for _, layer in dynrank.lora_layers(model)}) > 1
    if name == "own":
        AutoPeftModel.from_pretrained(folder / f"resume {name}" / "by dynrank")


def test_embeddings_with_added_tokens_are_equal_in_all_processes_and_saved(results, folder):
    """They are drawn by each process, and process 0 alone saves the adapter."""
    first, second = found(results, "added tokens")
    assert first.keys() == {"model.embed_tokens.weight", "lm_head.weight"}
    assert_close(first, second, rtol=0, atol=0)
    for saved in ("by dynrank", f"checkpoint-{STEPS}"):
        model = loaded(folder / "base")
        model.resize_token_embeddings(43, mean_resizing=False)
        dynrank.load_adapter(model, folder / "added tokens" / saved)
        assert_close({name: model.get_parameter(name).data for name in first}, first, rtol=0, atol=0)


@pytest.mark.parametrize(("name", "step"), [("best, before", 5), ("best, after", STEPS)])
def test_best_model_comes_back_with_its_own_ranks(results, folder, name, step):
    for best, weights in found(results, name):
        assert best == step
        assert_holds(folder / name / f"checkpoint-{step}", weights)


@pytest.mark.parametrize("way", wrapped_loops.SHARDED)
def test_wrapped_loop_ends_where_a_plain_one_does(results, way):
    first, second = found(results, f"loop, {way}")
    for name, value in wrapped_loops.ended("plain").items():
        assert torch.equal(first[name], second[name]), name
        assert_close(first[name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("FSDP1", "set fsdp_version: 2"),
        ("activation checkpointing", "gradient_checkpointing=True"),
        ("best of shards", "set state_dict_type to FULL_STATE_DICT"),
        ("vLLM", "set use_vllm=False"),
        ("late", "call RankTrainerCallback(...).attach(trainer) instead"),
        ("FSDP1 in a loop", "fsdp_version: 2"),
        ("accelerate alone", "shard_frozen(model) before accelerator.prepare"),
    ],
)
def test_what_shards_adapters_is_refused_by_name(results, name, words):
    for result in results:
        assert words in result[f"refused, {name}"]


@pytest.mark.parametrize(
    ("kind", "sizes", "words"),
    [
        (DistributedType.DEEPSPEED, {}, "set to DEEPSPEED"),
        (DistributedType.MEGATRON_LM, {}, "set to MEGATRON_LM"),
        (DistributedType.FSDP, {"tp_size": 2}, "set to tp_size=2"),
        (DistributedType.FSDP, {"cp_size": 2}, "set to cp_size=2"),
        (DistributedType.MULTI_GPU, {"sp_size": 4}, "set to sp_size=4"),
    ],
)
def test_states_of_accelerate_that_split_layers_or_sequences_are_refused(kind, sizes, words):
    """The attributes are those that accelerate's AcceleratorState sets."""
    state = SimpleNamespace(distributed_type=kind, parallelism_config=SimpleNamespace(**sizes))
    with pytest.raises(ConfigurationError, match=words):
        check_accelerate(state)
