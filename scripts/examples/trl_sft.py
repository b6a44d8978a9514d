"""TRL's SFTTrainer with a schedule of ranks: learns completions of prompts, and halves the adapter during training.

``pip install trl 'dynrank[hf]' peft``, then ``python scripts/examples/trl_sft.py MODEL FILE OUT``; in two processes
``accelerate launch --num_processes 2 scripts/examples/trl_sft.py MODEL FILE OUT``, and with the base sharded by FSDP2
``accelerate launch --config_file scripts/fsdp2.yaml scripts/examples/trl_sft.py MODEL FILE OUT``.
"""

import argparse

import datasets
import torch
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from dynrank.callbacks import RankTrainerCallback


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="name on the hub, or a folder")
    parser.add_argument("file", help="JSON lines, each with a prompt and a completion")
    parser.add_argument("out", help="folder of the run; the adapter comes into OUT/adapter")
    parser.add_argument("--rank", type=int, default=32, help="at the start")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=8, help="of each process")
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    arguments = parser.parse_args()

    gpu = torch.cuda.is_available()
    settings = SFTConfig(
        arguments.out,
        max_steps=arguments.steps,
        per_device_train_batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        use_cpu=not gpu,
        bf16=gpu,
    )
    trainer = SFTTrainer(
        arguments.model,
        settings,
        train_dataset=datasets.load_dataset("json", data_files=arguments.file, split="train"),
        peft_config=LoraConfig(r=arguments.rank, target_modules="all-linear"),
        callbacks=[RankTrainerCallback(arguments.rank // 2)],
    )
    trainer.train()
    trainer.save_model(f"{arguments.out}/adapter")


if __name__ == "__main__":
    main()
