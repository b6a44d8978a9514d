"""Pre-trains a small decoder on the docstrings of Python packages, for task.model=FOLDER.

No Python package brings such a model with its weights, so this program makes one from random weights. By default it is
a Llama of four blocks of width 320 with a byte-level BPE of 2,048 tokens (5.6M parameters, embedding and head shared).
It sees 6 million tokens, in 20 to 30 minutes of one core with AMX. The other architectures are GPT-2, BLOOM (fused
query_key_value) and Qwen3-MoE (8 experts, 2 for a token). Results with them say nothing about the published models. An
interrupted program goes on from the last multiple of 200 steps.
Run: .venv/bin/python scripts/study/pretrain_small.py [--architecture llama] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import sysconfig
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast, get_cosine_schedule_with_warmup

# The end of a docstring.
END = "<|end|>"
PACKAGES = ("torch", "lightning", "torchmetrics", "transformers", "numpy", "sympy", "networkx", "peft", "datasets")
PACKAGES += ("scipy", "pandas", "sklearn", "matplotlib")
MODELS = Path.home() / ".cache" / "dynrank" / "models"
# Steps between two saved states, from which an interrupted run goes on.
KEEP_EVERY = 200
# Rows of the corpus that are not trained on.
HELD_OUT = 64
# Fields of the config that only this architecture has.
OWN: dict[str, dict[str, Any]] = {
    "gpt2": {"n_positions": 512, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "bloom": {},
    "llama": {"max_position_embeddings": 512},
    "qwen3_moe": {
        "max_position_embeddings": 512,
        "head_dim": 64,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        # The loss then keeps the experts balanced.
        "output_router_logits": True,
    },
}


def main() -> None:
    """Train what the options say into a folder that transformers loads."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", choices=OWN, default="llama")
    parser.add_argument("--out", type=Path, help=f"folder; default: {MODELS}/ARCHITECTURE")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=16, help="rows of a step")
    parser.add_argument("--length", type=int, default=128, help="tokens of a row")
    parser.add_argument("--width", type=int, default=320)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--characters", type=int, default=40_000_000, help="of the corpus, at most")
    parser.add_argument("--lr", type=float, default=2e-3)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    out = options.out or MODELS / options.architecture
    out.mkdir(parents=True, exist_ok=True)
    texts = docstrings(options.characters)
    print(f"{len(texts):,} docstrings, {sum(map(len, texts)):,} characters", flush=True)
    tokenizer = make_tokenizer(texts, options.vocabulary)
    rows = token_rows(tokenizer, texts, options.length)
    print(f"{rows.numel():,} tokens of {len(tokenizer):,}", flush=True)
    torch.manual_seed(0)
    model = make_model(options, len(tokenizer))
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, head and embedding shared", flush=True)
    train(model, rows, options, out / "pretraining.pt")
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "pretraining.pt").unlink(missing_ok=True)
    print(f"use it with task.model={out}")


def docstrings(characters: int) -> list[str]:
    """Docstrings of 200 characters or more, each once, in a random order, up to so many ``characters``."""
    folders = [sysconfig.get_path("stdlib")]
    for package in PACKAGES:
        spec = find_spec(package)
        folders += spec.submodule_search_locations or () if spec is not None else ()
    files = sorted({file for folder in folders for file in Path(folder).rglob("*.py") if _wanted(file, Path(folder))})
    random.Random(0).shuffle(files)
    found: dict[str, None] = {}
    size = 0
    for file in files:
        for text in _docstrings_of(file):
            if size < characters and text not in found:
                found[text] = None
                size += len(text)
        if size >= characters:
            break
    return list(found)


def _wanted(file: Path, folder: Path) -> bool:
    return not {"site-packages", "test", "tests", "testing", "idlelib"} & set(file.relative_to(folder).parts)


def _docstrings_of(file: Path) -> list[str]:
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, ValueError):
        # The file is faulty on purpose, or of another Python.
        return []
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    texts = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, kinds)]
    return [text for text in texts if len(text) >= 200]


def make_tokenizer(texts: list[str], vocabulary: int) -> Any:
    """A byte-level BPE of these texts, as GPT-2's and BLOOM's are."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, bos_token=END)


def token_rows(tokenizer: Any, texts: list[str], length: int) -> Tensor:
    """All texts behind each other, each with its end, cut into int64 rows (count, length)."""
    ids: list[int] = []
    for row in tokenizer(texts)["input_ids"]:
        ids += [*row, tokenizer.eos_token_id]
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


def make_model(options: argparse.Namespace, vocabulary: int) -> Any:
    """The model with random weights; head and embedding are one tensor."""
    heads = max(1, options.width // 64)
    inner = options.width * 8 // 3
    size = {"hidden_size": options.width, "num_hidden_layers": options.layers, "num_attention_heads": heads}
    if options.architecture in ("llama", "qwen3_moe"):
        size |= {"num_key_value_heads": heads, "intermediate_size": inner, "moe_intermediate_size": options.width}
    tokens = {"vocab_size": vocabulary, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    config = AutoConfig.for_model(
        options.architecture, **size, **tokens, **OWN[options.architecture], tie_word_embeddings=True
    )
    return AutoModelForCausalLM.from_config(config)


def train(model: Any, rows: Tensor, options: argparse.Namespace, state: Path) -> None:
    """AdamW with a cosine rate; goes on from ``state`` if it is there, and leaves it there when interrupted."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=0.01)
    scheduler = get_cosine_schedule_with_warmup(optimizer, options.steps // 20, options.steps)
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    first = 0
    if state.exists():
        kept = torch.load(state, weights_only=True)
        first = kept.pop("step")
        for name, values in kept.items():
            parts[name].load_state_dict(values)
        print(f"goes on at step {first}", flush=True)
    held_out = rows[:HELD_OUT]
    trained = rows[HELD_OUT:]
    # Only the products are in bfloat16. Weights stay in float32.
    half = partial(torch.autocast, "cpu", dtype=torch.bfloat16)
    start = time.perf_counter()
    for step in range(first, options.steps):
        generator = torch.Generator().manual_seed(step)
        batch = trained[torch.randint(len(trained), (options.batch,), generator=generator)]
        with half():
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        done = step + 1
        if done % KEEP_EVERY == 0 or done == options.steps:
            part = state.with_suffix(".part")
            torch.save({name: thing.state_dict() for name, thing in parts.items()} | {"step": done}, part)
            os.replace(part, state)
            with torch.no_grad(), half():
                unseen = float(model.eval()(input_ids=held_out, labels=held_out).loss)
            model.train()
            left = (time.perf_counter() - start) / (done - first) * (options.steps - done)
            print(
                f"step {done}: loss {float(loss.detach()):.3f}, held out {unseen:.3f}, {left:.0f} s to go", flush=True
            )


if __name__ == "__main__":
    main()
