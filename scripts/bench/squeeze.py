"""Time and memory of ``dynrank squeeze`` on a 7B model's worth of adapters: 224 layers of 4096 x 4096, rank 64 -> 16.

The program makes the adapter (random, float32, 470 MB) in a temporary folder and runs the command on it in a process of
its own. In this process it compares two layers with PEFT's convert_to_lora.
Run: .venv/bin/python scripts/bench/squeeze.py [--layers N] [--size N] [--skip-peft]
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from dynrank.adapters.squeeze import squeeze
from dynrank.linalg import truncate_product


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=224)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--final-rank", type=int, default=16)
    parser.add_argument("--skip-peft", action="store_true", help="leave out the comparison (its dense SVD takes long)")
    options = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "adapter"
        make_adapter(source, options.layers, options.size, options.rank)
        command = ["squeeze", str(source), "--rank", str(options.final_rank), "--out", str(Path(folder) / "out")]
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "dynrank.app.commands.cli", *command], check=True, stdout=subprocess.DEVNULL
        )
        seconds = time.perf_counter() - start
        size = (source / "adapter_model.safetensors").stat().st_size
    ranks = f"{options.rank} -> {options.final_rank}"
    print(f"threads                    {torch.get_num_threads()}")
    print(f"adapter                    {options.layers} layers of {options.size} x {options.size}, {size / 1e6:.0f} MB")
    print(f"dynrank squeeze {ranks:<10} {seconds:.1f} s, with the start of Python and both files")
    print(f"its peak memory            {resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**10:.0f} MiB")
    if not options.skip_peft:
        compare(options.size, options.rank, options.final_rank)


def make_adapter(folder: Path, layers: int, size: int, rank: int) -> None:
    """A PEFT adapter of random factors."""
    folder.mkdir()
    names = [f"base_model.model.layers.{i}.q_proj" for i in range(layers)]
    tensors = {f"{name}.lora_A.weight": torch.randn(rank, size) for name in names}
    tensors |= {f"{name}.lora_B.weight": torch.randn(size, rank) for name in names}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))


def compare(size: int, rank: int, final_rank: int, layers: int = 2) -> None:
    """Ours and PEFT's conversion of the same factors, in memory, and from file to file."""
    from peft import LoraConfig, convert_to_lora, get_peft_model

    model = nn.ModuleDict({f"q{i}": nn.Linear(size, size, bias=False) for i in range(layers)})
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=[*model], init_lora_weights=False)
    theirs = get_peft_model(model, config)  # type: ignore[arg-type]
    start = time.perf_counter()
    with warnings.catch_warnings():
        # PEFT warns that converting LoRA to LoRA is unusual.
        warnings.simplefilter("ignore")
        _, state = convert_to_lora(theirs, rank=final_rank)
    dense = (time.perf_counter() - start) / layers

    linears = [module for name, module in theirs.named_modules() if name.endswith(tuple(model))]
    factors = [(m.lora_B["default"].weight.detach(), m.lora_A["default"].weight.detach()) for m in linears]
    # The command uses one thread, too.
    torch.set_num_threads(1)
    start = time.perf_counter()
    changes = [truncate_product(lora_B, lora_A, final_rank) for lora_B, lora_A in factors]
    ours = (time.perf_counter() - start) / layers
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        start = time.perf_counter()
        squeeze(folder, Path(folder) / "out", rank=final_rank)
        whole = (time.perf_counter() - start) / layers
    keys = [f"base_model.model.q{i}" for i in range(layers)]
    products = [state[f"{key}.lora_B.weight"] @ state[f"{key}.lora_A.weight"] for key in keys]
    apart = max(float((p - 2 * c.lora_B @ c.lora_A).norm() / p.norm()) for p, c in zip(products, changes, strict=True))
    print(f"PEFT's convert_to_lora     {dense:.1f} s a layer")
    print(f"our truncation             {ours * 1e3:.1f} ms a layer, {dense / ours:.0f} times as fast")
    print(f"squeeze, file to file      {whole * 1e3:.1f} ms a layer, {dense / whole:.0f} times as fast")
    print(f"the two updates differ by  {apart:.1e} of their norm")


if __name__ == "__main__":
    main()
