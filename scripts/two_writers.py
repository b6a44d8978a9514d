"""Two adapters of one causal language model for different tasks, trained briefly: a medical one and a code one.

The medical adapter has rank 16 on attention, 4 in every second of its layers. It writes the official description of an
ICD-10-CM code after one of its inclusion terms. The code adapter has rank 32 on all linear layers, 8 on down
projections. It writes the body of a function after its signature and docstring.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dynrank import add_lora, lora_layers, save_adapter
from dynrank.models.names import model_source
from dynrank.models.pretrained import load_causal_lm, read_config
from dynrank.tasks.data.splits import Pairs
from dynrank.tasks.data.stdlib import stdlib_functions
from dynrank.tasks.language_modeling import LanguageModeling

MODULES = ["base64", "csv", "gzip", "heapq", "pprint", "queue", "random", "shutil", "statistics", "textwrap"]
# Codes whose descriptions follow a template, half of all.
INJURIES = tuple("STVWXY")
BATCH, LENGTH, RATE = 4, 96, 1e-3


def diagnoses() -> Pairs:
    """Inclusion terms of ICD-10-CM, the words clinicians use, as prompts; the description of the code behind each."""
    import simple_icd_10_cm as icd

    codes = [code for code in icd.get_all_codes()[::10] if not code.startswith(INJURIES)]
    pairs = [(term, icd.get_description(code)) for code in codes for term in icd.get_inclusion_term(code)]
    made = [(f"Clinical term: {term}\nICD-10-CM:", f" {description}") for term, description in pairs]
    held_out = made[::20]
    return {"train": [pair for i, pair in enumerate(made) if i % 20], "val": held_out, "test": held_out}


def is_causal(model_name: str) -> bool:
    """Whether the model writes text; GGUF files hold no others here."""
    names = read_config(model_name, "--model").architectures or ()
    gguf = model_source(model_name, "--model").endswith(".gguf")
    return gguf or any("CausalLM" in name or "LMHead" in name for name in names)


def load_writer(model_name: str) -> nn.Module:
    """The causal language model."""
    return load_causal_lm(model_name, "--model").eval()


def data_of(model_name: str) -> dict[str, LanguageModeling]:
    """Examples of both tasks; their splits ``test`` are not trained on."""
    sizes: Any = {"batch_size": BATCH, "max_length": LENGTH, "seed": 0, "limit": 400}
    sources = {"medical": diagnoses, "code": partial(stdlib_functions, MODULES, 0)}
    both = {name: LanguageModeling(model_name, data, **sizes) for name, data in sources.items()}
    for task in both.values():
        task.setup("fit")
    return both


def write_adapters(model_name: str, data: Mapping[str, LanguageModeling], steps: int, folder: Path) -> list[Path]:
    """Folders of the two adapters in ``folder``; those that are there already are not trained again."""
    return [_trained(model_name, name, data[name], steps, folder / f"{name}-{steps}") for name in ("medical", "code")]


def prompts_of(data: Mapping[str, LanguageModeling], each: int) -> list[list[int]]:
    """Token ids of ``each`` test prompts of both tasks, in turn."""
    examples = [part.examples["test"][i] for i in range(each) for part in data.values()]
    return [example["input_ids"][: example["prompt_length"]] for example in examples]


def _trained(model_name: str, task: str, data: LanguageModeling, steps: int, folder: Path) -> Path:
    if (folder / "adapter_model.safetensors").exists():
        print(f"{task}: {folder}")
        return folder
    torch.manual_seed(0)
    model: Any = load_writer(model_name)
    if task == "medical":
        bare = load_causal_lm(model_name, "--model", on_meta=True)
        names = [name for name, _ in lora_layers(add_lora(bare, rank=16, target_modules="attention"))]
        rules = {name: {"rank": 4, "alpha": 4} for name in names[::2]}
        add_lora(model, rank=16, alpha=16, target_modules="attention", rank_map=rules)
    else:
        add_lora(model, rank=32, alpha=64, rank_map={"down_proj": {"rank": 8, "alpha": 16}})
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)
    losses = []
    for batch in islice(data.train_dataloader(), steps):
        loss = model.train()(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    third = max(1, steps // 3)
    print(f"{task}: {steps} steps, loss {_mean(losses[:third])} -> {_mean(losses[-third:])} (thirds); {folder}")
    save_adapter(model, folder)
    return folder


def _mean(values: Sequence[float]) -> str:
    return f"{sum(values) / len(values):.2f}"
