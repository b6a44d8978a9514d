"""The other files in an adapter's folder that its use needs: the tokenizer, and the names of the labels."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from dynrank.adapters.stored import readable
from dynrank.errors import ConfigurationError, read_as
from dynrank.output.output_folder import check_free, whole_or_nothing
from dynrank.output.whole_file import whole_file

# The labels are not in a config.json, because transformers would then expect a whole model in the folder.
LABELS_FILE = "labels.json"
TOKENIZER_FILE = "tokenizer_config.json"
# Patterns of the files in a model's folder that define how its inputs are made.
_INPUT_FILES = ("*token*", "vocab*", "merges.txt", "*.model", "*.spm", "chat_template*", "*processor_config.json")


@dataclass(config=ConfigDict(strict=True, extra="ignore"))
class _Labels:
    labels: list[str]
    problem_type: str | None = None


def write_sidecar_files(folder: Path, model: Any, tokenizer: Any) -> None:
    """Write the tokenizer's files, if there is one, and the labels of a classifier that has names for them."""
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if label_names(model):
        labels = _Labels(label_names(model), model.config.problem_type)
        with whole_file(folder / LABELS_FILE) as part:
            part.write_text(json.dumps(asdict(labels), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def label_names(model: Any) -> list[str]:
    """Names of a sequence classifier's classes; [] for transformers' default names, and for other models."""
    names = dict(getattr(getattr(model, "config", None), "id2label", None) or {})
    named = type(model).__name__.endswith("ForSequenceClassification") and names[0] != "LABEL_0"
    return [str(names[index]) for index in range(len(names))] if named else []


def with_labels(model: Any, folder: Path) -> Any:
    """The model itself, with the label names in the adapter's ``folder``, if there are any."""
    file = folder / LABELS_FILE
    if not file.exists():
        return model
    with readable(repr(str(file))):
        content = json.loads(file.read_text(encoding="utf-8"))
    found = read_as(_Labels, content, str(file))
    if len(found.labels) != model.config.num_labels:
        raise ConfigurationError(f"{str(file)!r} must name {model.config.num_labels} labels, got {len(found.labels)}")
    model.config.id2label = dict(enumerate(found.labels))
    model.config.label2id = {label: index for index, label in enumerate(found.labels)}
    model.config.problem_type = found.problem_type
    return model


def tokenizer_source(folder: Path, base: str) -> str:
    """The source of the adapter's tokenizer: the adapter's ``folder`` if it has one, otherwise the model ``base``."""
    return str(folder.resolve()) if (folder / TOKENIZER_FILE).exists() else base


@contextmanager
def new_adapter_folder(out: Path, source: Path) -> Iterator[Path]:
    """A folder to write another form of the adapter in ``source`` to, which has its tokenizer and labels already.

    It becomes ``out`` at the end of the block, or is deleted after an error.
    """
    check_free(out, source)
    sidecars = [*input_files(source), *source.glob(LABELS_FILE)]
    with whole_or_nothing(out) as folder:
        for file in sidecars:
            shutil.copyfile(file, folder / file.name)
        yield folder


def input_files(origin: Path) -> list[Path]:
    """A folder's files that are copied with a model; a snapshot in the hub's cache links to files two folders above."""
    found = [file for pattern in _INPUT_FILES for file in origin.glob(pattern) if file.is_file()]
    home = (origin.parent.parent if origin.parent.name == "snapshots" else origin).resolve()
    for file in found:
        if not file.resolve().is_relative_to(home):
            raise ConfigurationError(f"{str(file)!r} must not be a link out of its folder; copy the file there")
    return found
