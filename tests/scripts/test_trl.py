"""TRL's trainers under schedules of ranks: SFT as a user starts it, alone and in two processes; all in miniature."""

import json
from pathlib import Path

import as_gpus
import forked
import pytest
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import dynrank

SCRIPT = "import runpy, sys; sys.argv.pop(0); runpy.run_path(sys.argv[0], run_name='__main__')"
ROOT = Path(__file__).resolve().parents[2]
# This is the sum of d_in + d_out over all layers of `tiny_llama`, which has two blocks.
SIZE = 2 * (4 * (32 + 32) + 3 * (32 + 48))


@pytest.fixture
def arguments(tiny_llama, tmp_path):
    """Those of a short run into ``OUT`` with so many examples per step and process."""
    rows = [{"prompt": f"{i} and 1 is", "completion": f" {i + 1}" * (1 + i % 3)} for i in range(40)]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    fixed = ["--rank", "8", "--steps", "6", "--learning-rate", "1e-2"]
    return lambda out, size: [str(tiny_llama), str(file), str(out), "--batch-size", str(size), *fixed]


def updates(factors):
    """B A of each layer: a direction of next to no size is turned by rounding, and its factors with it."""
    ends = {name: name.replace("lora_A", "lora_B") for name in factors if "lora_A" in name}
    return {lora_A: factors[lora_B] @ factors[lora_A] for lora_A, lora_B in ends.items()}


def under_ddp(*command, cwd):
    return forked.pair(SCRIPT, *command, cwd=cwd)


def under_fsdp2(*command, cwd):
    """As ``accelerate launch`` starts it; without ``as_gpus.py`` accelerate would not shard on CPUs."""
    launch = ["launch", "--config_file", ROOT / "scripts" / "fsdp2.yaml", "--main_process_port", forked.free_port()]
    program = "from accelerate.commands.accelerate_cli import main; main()"
    return [forked.start(program, *launch, as_gpus.__file__, *command, cwd=cwd, PYTHONWARNINGS="ignore")]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("start", [under_ddp, under_fsdp2])
def test_two_processes_of_sft_trainer_end_where_one_with_both_batches_ends(
    start, main, arguments, tiny_llama, tmp_path
):
    started = start(ROOT / "scripts" / "examples" / "trl_sft.py", *arguments(tmp_path / "two", 2), cwd=tmp_path)
    main("trl_sft", *arguments(tmp_path / "one", 4))
    assert {*forked.end(started)} == {0}, forked.printed(tmp_path)
    one, two = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("one", "two"))
    wanted = updates(one)
    for name, update in updates(two).items():
        assert (update - wanted[name]).norm() < 1e-3 * wanted[name].norm()

    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), tmp_path / "two" / "adapter")
    assert len({layer.rank for _, layer in dynrank.lora_layers(loaded)}) > 1
    # The adapter began at rank 8 and ends at rank 4 on average.
    assert 3 * SIZE < sum(value.numel() for value in one.values()) <= 4 * SIZE


# Of the two named last the rewards differ, or are equal from the start.
RUNS = [("Reward", "auto"), ("SFT of add_lora", "early_budget"), ("DPO", "early_budget")]
RUNS += [("GRPO", "auto"), ("GRPO of equal rewards", "early_budget")]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("trainer", "schedule"), RUNS)
def test_trainer_ends_with_an_adapter_that_peft_loads(trainer, schedule, script, tiny_llama, tmp_path):
    row = script("trl_zoo").train(trainer, schedule, str(tiny_llama), tmp_path, rank=8, steps=6)
    assert row[:2] == [trainer, schedule]
    assert float(row[2].rstrip("%")) <= 25
    assert (tmp_path / f"{trainer} {schedule}".replace(" ", "_") / "adapter" / "adapter_config.json").exists()
