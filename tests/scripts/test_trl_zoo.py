"""TRL's other trainers under schedules of ranks, in miniature: a row each, and PEFT loads what was trained."""

import pytest

RUNS = [
    ("SFT", "auto"),
    ("SFT of add_lora", "early_budget"),
    ("DPO", "early_budget"),
    ("KTO", "auto"),
    ("ORPO", "early_budget"),
    ("Reward", "auto"),
    ("GRPO", "auto"),
    ("GRPO of equal rewards", "early_budget"),
    ("RLOO", "early_budget"),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("trainer", "schedule"), RUNS)
def test_trainer_ends_with_an_adapter_that_peft_loads(trainer, schedule, script, tiny_llama, tmp_path):
    row = script("trl_zoo").train(trainer, schedule, str(tiny_llama), tmp_path, rank=8, steps=6)
    assert row[:2] == [trainer, schedule]
    assert float(row[2].rstrip("%")) <= 25
    assert (tmp_path / f"{trainer} {schedule}".replace(" ", "_") / "adapter" / "adapter_config.json").exists()
