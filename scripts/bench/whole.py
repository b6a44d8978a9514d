"""A decoder of random weights from a PEFT model to a server: trained by transformers' Trainer, cut, saved, exported.

The default is the shape of Llama 3.2 1B in bfloat16. Tokens are random, so losses say nothing; ranks, seconds and bytes
do. The exported adapter is loaded by vLLM where that is installed, and by PEFT where it is not, and its logits are
compared with the trained model's.
Run: .venv/bin/python scripts/bench/whole.py [--size 1b] [--rank 16] [--final-rank 4] [--steps 60] [--device cuda]
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
import time
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from serve_vllm import loaded_by_vllm
from torch import Tensor
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import dynrank
from dynrank.callbacks import RankTrainerCallback

# Shapes by name: of Llama 3.2 1B, and one for a machine without a GPU.
SIZES = {
    "1b": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "vocab_size": 256,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
}


class Tokens(Dataset[dict[str, Tensor]]):
    """Rows of random tokens."""

    def __init__(self, vocabulary: int, length: int) -> None:
        self.vocabulary = vocabulary
        self.length = length

    def __len__(self) -> int:
        return 10**6

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        row = torch.randint(self.vocabulary, (self.length,), generator=generator)
        return {"input_ids": row, "labels": row}


class Memory(transformers.TrainerCallback):
    """Seconds and peak memory of the steps before and after the change."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, float, int]] = []
        self.start = 0.0

    def on_step_begin(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        """Start the clock, and count the peak from here."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        """Keep what the step took."""
        peak = 0
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated()
        self.rows.append((state.global_step, time.perf_counter() - self.start, peak))


def main() -> None:
    """Train, save, export, load, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="1b")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--final-rank", type=int, default=4)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rows", type=int, default=4, help="of a batch")
    parser.add_argument("--length", type=int, default=512, help="tokens of a row")
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    options = parser.parse_args()
    torch.manual_seed(0)
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    config = LlamaConfig(**SIZES[options.size], use_cache=False)
    with torch.device(options.device):
        base = LlamaForCausalLM(config).to(dtype)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base.save_pretrained(folder / "base")
        model = get_peft_model(base, LoraConfig(r=options.rank, lora_alpha=32, target_modules="all-linear"))
        memory = Memory()
        cut = RankTrainerCallback(options.final_rank)
        arguments = TrainingArguments(
            str(folder / "run"),
            max_steps=options.steps,
            per_device_train_batch_size=options.rows,
            learning_rate=1e-3,
            bf16=options.device == "cuda",
            use_cpu=options.device == "cpu",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        tokens = Tokens(config.vocab_size, options.length)
        # The change comes first at the beginning of a step, so that its time and memory are not the step's.
        Trainer(model, arguments, train_dataset=tokens, callbacks=[cut, memory]).train()
        (event,) = cut.history
        print(event)
        for name_of_half, rows in (
            ("before the cut", [row for row in memory.rows if row[0] <= event.step]),
            ("after the cut", [row for row in memory.rows if row[0] > event.step]),
        ):
            # The first step of each half allocates.
            seconds = sorted(seconds for _, seconds, _ in rows[1:])
            print(f"{name_of_half}: {1e3 * seconds[len(seconds) // 2]:.1f} ms a step, {rows[-1][2] / 1e6:.0f} MB peak")
        dynrank.save_adapter(model, folder / "adapter")
        dynrank.export_adapter(folder / "adapter", folder / "served", to="vllm")
        ranks = {layer.rank for _, layer in dynrank.lora_layers(model)}
        print(f"ranks {min(ranks)} to {max(ranks)}, file {size_of(folder / 'adapter') / 1e6:.2f} MB")
        print(f"served folder {size_of(folder / 'served') / 1e6:.2f} MB")
        if importlib.util.find_spec("vllm") is not None:
            loaded_by_vllm(str(folder / "served"), str(folder / "base"), max(ranks))
            print("vLLM has loaded the exported adapter")
        with torch.device(options.device):
            plain = LlamaForCausalLM.from_pretrained(folder / "base", dtype=dtype)
        loaded = PeftModel.from_pretrained(plain, folder / "served").to(options.device).eval()
        ids = tokens[0]["input_ids"][None].to(options.device)
        with torch.no_grad():
            ours = model.eval()(input_ids=ids).logits.float()
            theirs = loaded(input_ids=ids).logits.float()
        print(f"logits of PEFT's model of the exported files: within {float((ours - theirs).abs().max()):.1e}")


def size_of(folder: Path) -> int:
    """Bytes of the weights in ``folder``."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


if __name__ == "__main__":
    main()
