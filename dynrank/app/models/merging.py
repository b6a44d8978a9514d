"""Merging a stored adapter into its base, in a folder that other programs load."""

from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers import AutoTokenizer, PreTrainedModel

from dynrank.adapters.read import read_adapter
from dynrank.adapters.sidecar_files import INPUT_FILES, TOKENIZER_FILE, copy_files, input_files, read_inputs
from dynrank.app.models.base_model import base_of, on_base
from dynrank.app.models.generating import end_of_turn_of, end_tokens
from dynrank.app.models.pretrained import load_by_name, load_tokenizer, set_padding
from dynrank.layers.placing import merge
from dynrank.output.output_folder import check_free, whole_or_nothing


def merge_adapter(source: str | Path, model: str | None, out: str | Path) -> PreTrainedModel:
    """Merge the adapter in ``source`` into its base model, write the result to ``out``, and return it.

    Weights keep the stored dtype of the model; sums are computed in float32 or wider. Heads stored in the adapter
    (modules_to_save), tokenizer files and label names are included; the adapter's folder has precedence. If it says
    what training learned, generation_config.json names the ends of answers. ``out`` is written whole or not at all. No
    code from the model's folder is run.

    Args:
        source: folder of a PEFT LoRA adapter.
        model: folder or hub name of the base model; None: as the adapter names it.
        out: new or empty folder.

    Raises:
        ConfigurationError: if the adapter or the model cannot be used, they do not fit, a tokenizer file is a link out
            of its folder, or ``out`` is not free or cannot be written.
    """
    source = Path(source)
    out = Path(out)
    adapter = read_adapter(source)
    origin, settings = base_of(adapter, model)
    check_free(out, source, Path(origin))
    merged: PreTrainedModel = merge(on_base(adapter, model))
    files = input_files(source)
    if TOKENIZER_FILE in files:
        _name_tokens(merged, source)
    # Files of two tokenizers are none: transformers would read the base's special tokens and template.
    elif not origin.endswith(".gguf"):
        at = origin
        if not Path(origin).exists():
            at = snapshot_download(origin, revision=settings.revision, allow_patterns=[*INPUT_FILES])
        files = input_files(Path(at)) | files
    with whole_or_nothing(out) as folder:
        merged.save_pretrained(folder)
        # The tokenizer of a GGUF file is in it.
        if not files and origin.endswith(".gguf"):
            load_by_name(AutoTokenizer.from_pretrained, origin, "--model", settings).save_pretrained(folder)
        copy_files(files, folder)
    return merged


def _name_tokens(model: Any, source: Path) -> None:
    """Let a classifier know what pads texts, and others what ends an answer, by the tokenizer in ``source``."""
    form = read_inputs(source).form
    # An adapter of another program does not tell what training learned.
    if model.can_generate() and not form:
        return
    tokenizer = load_tokenizer(str(source.resolve()), "--model")
    if model.can_generate():
        end = end_of_turn_of(tokenizer) if form == "chat" else None
        model.generation_config.eos_token_id = end_tokens(model, tokenizer, end)
    else:
        set_padding(model, tokenizer.pad_token_id)
