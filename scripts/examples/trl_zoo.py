"""TRL's trainers with schedules of ranks: the ranks that each ends with, and whether PEFT loads its adapter.

``pip install trl 'dynrank[hf]' peft``, then ``python scripts/examples/trl_zoo.py MODEL OUT``; in two processes
``torchrun --nproc_per_node 2 scripts/examples/trl_zoo.py MODEL OUT``. MODEL is a small causal language model with a
tokenizer. The data are sums of two numbers. The program prints the rows of a table.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import trl
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

import dynrank
from dynrank.callbacks import RankTrainerCallback
from dynrank.distributed.processes import check_processes, process_index
from dynrank.schedules import How, auto, early_budget

SUMS = [(f"{i} and {i % 7} is", f" {i + i % 7}", f" {i - 1}") for i in range(48)]
COLUMNS = {
    "sft": [{"prompt": prompt, "completion": right} for prompt, right, _ in SUMS],
    "pairs": [{"prompt": prompt, "chosen": right, "rejected": wrong} for prompt, right, wrong in SUMS],
    "texts": [{"chosen": prompt + right, "rejected": prompt + wrong} for prompt, right, wrong in SUMS],
    "judged": [
        {"prompt": prompt, "completion": (wrong, right)[i % 2], "label": bool(i % 2)}
        for i, (prompt, right, wrong) in enumerate(SUMS)
    ],
    "prompts": [{"prompt": prompt} for prompt, _, _ in SUMS],
}
WRITING = {"num_generations": 4, "max_completion_length": 8}
ZOO: dict[str, tuple[Any, Any, str, dict[str, Any]]] = {
    "SFT": (trl.SFTTrainer, trl.SFTConfig, "sft", {}),
    "SFT of add_lora": (trl.SFTTrainer, trl.SFTConfig, "sft", {}),
    "DPO": (trl.DPOTrainer, trl.DPOConfig, "pairs", {}),
    "KTO": (trl.KTOTrainer, trl.KTOConfig, "judged", {}),
    "ORPO": (ORPOTrainer, ORPOConfig, "pairs", {"max_length": 64}),
    "Reward": (trl.RewardTrainer, trl.RewardConfig, "texts", {}),
    "GRPO": (trl.GRPOTrainer, trl.GRPOConfig, "prompts", WRITING),
    "GRPO of equal rewards": (trl.GRPOTrainer, trl.GRPOConfig, "prompts", WRITING),
    "RLOO": (trl.RLOOTrainer, trl.RLOOConfig, "prompts", WRITING),
}
HEADINGS = ["trainer", "schedule", "parameters", "ranks", "in training, first → last", "PEFT differs by", "seconds"]


def digits(completions: Sequence[str], **_: Any) -> list[float]:
    """The share of digits in each completion, which is what GRPO and RLOO are rewarded for."""
    return [sum(letter.isdigit() for letter in text) / max(1, len(text)) for text in completions]


def equal(completions: Sequence[str], **_: Any) -> list[float]:
    """The same for each, so that no gradient comes."""
    return [1.0] * len(completions)


def schedule_of(name: str, trainer: str, rank: int) -> Any:
    """Stages; ``auto`` is held to what the trainer's evaluation measures."""
    if name == "early_budget":
        return early_budget(max(1, rank // 4))
    if "GRPO" not in trainer and trainer != "RLOO":
        return auto(0.05)
    return auto(0.05, how=How(lr_factor="sqrt", check_monitor="eval_reward", check_mode="max"))


def train(
    trainer_name: str, schedule_name: str, model: str, out: Path, rank: int, steps: int, rate: float = 5e-3
) -> list[str]:
    """A run, and its row of the table; an error if PEFT loads something else than was trained."""
    trainer_class, config_class, columns, options = ZOO[trainer_name]
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    kind = AutoModelForSequenceClassification if trainer_name == "Reward" else AutoModelForCausalLM
    labels = {"num_labels": 1, "pad_token_id": tokenizer.pad_token_id} if trainer_name == "Reward" else {}

    def base() -> Any:
        torch.manual_seed(0)
        return kind.from_pretrained(model, dtype=torch.float32, **labels)

    folder = out / f"{trainer_name} {schedule_name}".replace(" ", "_")
    settings = config_class(
        str(folder), max_steps=steps, per_device_train_batch_size=4, per_device_eval_batch_size=4, learning_rate=rate,
        logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=not torch.cuda.is_available(),
        bf16=False, gradient_checkpointing=False, seed=0, **options,
    )  # fmt: skip
    data = Dataset.from_list(COLUMNS[columns])
    ranks = RankTrainerCallback(schedule_of(schedule_name, trainer_name, rank), evaluate=lambda: trainer.evaluate())
    own = trainer_name == "SFT of add_lora"
    lora = LoraConfig(r=rank, target_modules="all-linear", modules_to_save=["score"] if labels else None)
    start = time.perf_counter()
    trainer = trainer_class(
        model=dynrank.add_lora(base(), rank=rank, alpha=rank) if own else base(),
        args=settings,
        train_dataset=data.select(range(32)),
        eval_dataset=data.select(range(32, 48)),
        processing_class=tokenizer,
        callbacks=[ranks],
        **({"reward_funcs": equal if "equal" in trainer_name else digits} if options is WRITING else {}),
        **({} if own else {"peft_config": lora}),
    )
    before = len(dynrank.adapter_parameters(trainer.model)), _size(trainer.model)
    trainer.train()
    seconds = time.perf_counter() - start
    check_processes(trainer.model, [], "at the end")
    trainer.save_model(str(folder / "adapter"))
    trainer.accelerator.wait_for_everyone()
    loaded = PeftModel.from_pretrained(base(), folder / "adapter")
    inputs = tokenizer(SUMS[0][0], return_tensors="pt")
    with torch.no_grad():
        ids = inputs["input_ids"]
        difference = trainer.model.cpu().eval()(ids).logits - loaded.eval()(ids).logits
    found = [layer.rank for _, layer in dynrank.lora_layers(trainer.model)]
    measure = "reward" if options is WRITING else "loss"
    logged = [row[measure] for row in trainer.state.log_history if measure in row]
    assert before[0] == 2 * len(found)
    if float(difference.abs().max()) > 1e-4:
        raise AssertionError(f"{trainer_name}: PEFT's logits differ by {difference.abs().max():g}")
    changes = f"{rank} → {min(found)} to {max(found)}, {fmean(found):.1f} on average"
    course = f"{measure} {fmean(logged[:3]):.3f} → {fmean(logged[-3:]):.3f}"
    share = f"{_size(trainer.model) / before[1]:.0%}"
    return [trainer_name, schedule_name, share, changes, course, f"{difference.abs().max():.0e}", f"{seconds:.0f}"]


def _size(model: Any) -> int:
    return sum(factor.numel() for factor in dynrank.adapter_parameters(model))


def rows(arguments: argparse.Namespace) -> Iterator[list[str]]:
    """A row for each trainer and schedule."""
    for name in arguments.trainers:
        for schedule in arguments.schedules:
            sizes = arguments.rank, arguments.steps, arguments.rate
            yield train(name, schedule, arguments.model, Path(arguments.out), *sizes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="name on the hub, or a folder")
    parser.add_argument("out", help="folder of the runs")
    parser.add_argument("--trainers", nargs="*", choices=[*ZOO], default=[*ZOO])
    parser.add_argument("--schedules", nargs="*", choices=["early_budget", "auto"], default=["early_budget", "auto"])
    parser.add_argument("--rank", type=int, default=8, help="at the start")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rate", type=float, default=5e-3)
    arguments = parser.parse_args()
    for number, row in enumerate(rows(arguments)):
        # The number is known once the first run has met the other processes.
        if process_index() == 0:
            headings = f"| {' | '.join(HEADINGS)} |\n|{'---|' * len(HEADINGS)}\n" if number == 0 else ""
            print(f"{headings}| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
