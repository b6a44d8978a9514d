"""``dynrank merge``: a stored adapter and its base model become one plain model on disk."""

import shutil
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedModel

from dynrank.adapters.base import base_source, on_base
from dynrank.adapters.beside import input_files
from dynrank.adapters.read import read_adapter
from dynrank.layers.placing import merge
from dynrank.models.pretrained import load_by_name
from dynrank.output.output_folder import check_free, whole_or_nothing


def merge_adapter(source: str | Path, model: str | None, out: str | Path) -> PreTrainedModel:
    """Merge the adapter in ``source`` into its base model, write the result to ``out``, and return it.

    Weights keep the stored dtype of the model; sums are computed in float32 or wider. The model's class is the first
    one that has all layers of the adapter: the class that the adapter names, the class in the model's config.json, or a
    common one. Heads stored in the adapter (modules_to_save), tokenizer files and label names are included; the
    adapter's folder has precedence. ``out`` is written whole or not at all. No code from the model's folder is run.

    Args:
        source: folder of a PEFT LoRA adapter.
        model: folder or hub name of the base model; None: as the adapter names it.
        out: new or empty folder.

    Raises:
        ConfigurationError: if the adapter or the model cannot be used, they do not fit, a tokenizer file is a link out
            of its folder, or ``out`` is not free or cannot be written.
    """
    source, out = Path(source), Path(out)
    adapter = read_adapter(source)
    origin = base_source(adapter, model)
    check_free(out, source, Path(origin))
    own, of_base = input_files(source), input_files(Path(origin))
    merged: PreTrainedModel = merge(on_base(adapter, origin))
    with whole_or_nothing(out) as folder:
        merged.save_pretrained(folder)
        if not own and not Path(origin).is_dir():
            load_by_name(AutoTokenizer.from_pretrained, origin, "--model").save_pretrained(folder)
        for file in own + of_base:
            if not (folder / file.name).exists():
                shutil.copyfile(file, folder / file.name)
    return merged
