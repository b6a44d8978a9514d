"""Pre-trains a small GPT-2 or BLOOM (tied head, fused query_key_value) on docstrings, for task.model=FOLDER.

No Python package brings such a model with its weights, so this makes one, from random weights, in about ten minutes on
two CPU cores: four blocks of width 256 behind a vocabulary of 8,192 (5.4M parameters), on the docstrings of the
standard library, torch, lightning and torchmetrics. It is no good writer, and its numbers say nothing of GPT-2 or BLOOM
as they were published; it is a model of their architecture that has learned something before it is adapted.
Interrupted, it goes on from its last 50 steps. Run: .venv/bin/python scripts/pretrain_small.py --architecture bloom
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import sysconfig
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    get_cosine_schedule_with_warmup,
)

END = "<|end|>"  # of a docstring
PACKAGES = ("torch", "lightning", "torchmetrics")
KEEP_EVERY = 50  # steps between states to go on from
HELD_OUT = 32  # rows of the corpus that are not trained on


def main() -> None:
    """Train what the options say into a folder that transformers loads."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", choices=("gpt2", "bloom"), required=True)
    parser.add_argument("--out", type=Path, help="folder; default: models/ARCHITECTURE")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=16, help="rows of a step")
    parser.add_argument("--length", type=int, default=128, help="tokens of a row")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--characters", type=int, default=8_000_000, help="of the corpus, at most")
    parser.add_argument("--lr", type=float, default=1e-3)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    out = options.out or Path("models", options.architecture)
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
    """Docstrings of 200 characters or more, each once, in an order that is drawn, up to so many ``characters``."""
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
        return []  # made to be faulty, or of another Python
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
    """The model with random weights; head and embedding are one tensor, q, k and v one layer."""
    tokens = {"vocab_size": vocabulary, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    heads = max(1, options.width // 64)
    if options.architecture == "gpt2":
        size = {"n_embd": options.width, "n_layer": options.layers, "n_head": heads, "n_positions": 512}
        dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}  # less than one pass over the corpus
        return GPT2LMHeadModel(GPT2Config(**size, **dropout, **tokens))
    return BloomForCausalLM(BloomConfig(hidden_size=options.width, n_layer=options.layers, n_head=heads, **tokens))


def train(model: Any, rows: Tensor, options: argparse.Namespace, state: Path) -> None:
    """AdamW with a cosine rate; goes on from ``state`` if it is there, and leaves it there when interrupted."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=0.01)
    scheduler = get_cosine_schedule_with_warmup(optimizer, options.steps // 20, options.steps)
    parts, first = {"model": model, "optimizer": optimizer, "scheduler": scheduler}, 0
    if state.exists():
        kept = torch.load(state, weights_only=True)
        first = kept.pop("step")
        for name, values in kept.items():
            parts[name].load_state_dict(values)
        print(f"goes on at step {first}", flush=True)
    held_out, trained = rows[:HELD_OUT], rows[HELD_OUT:]
    start = time.perf_counter()
    for step in range(first, options.steps):
        generator = torch.Generator().manual_seed(step)
        batch = trained[torch.randint(len(trained), (options.batch,), generator=generator)]
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
            with torch.no_grad():
                unseen = float(model.eval()(input_ids=held_out, labels=held_out).loss)
            model.train()
            left = (time.perf_counter() - start) / (done - first) * (options.steps - done)
            print(
                f"step {done}: loss {float(loss.detach()):.3f}, held out {unseen:.3f}, {left:.0f} s to go", flush=True
            )


if __name__ == "__main__":
    main()
