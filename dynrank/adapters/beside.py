"""What lies beside the two files of an adapter, so that it can be used: the tokenizer, and names of the labels."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from dynrank.errors import ConfigurationError, read_as
from dynrank.output.whole_file import whole_file

# No config.json: with one, transformers takes the folder for a whole model and looks for all weights in it.
LABELS_FILE, TOKENIZER_FILE = "labels.json", "tokenizer_config.json"
# Files of a model's folder that say how its inputs are made.
_INPUT_FILES = ("*token*", "vocab*", "merges.txt", "*.model", "*.spm", "chat_template*", "*processor_config.json")


@dataclass(config=ConfigDict(strict=True, extra="ignore"))
class _Labels:
    labels: list[str]
    problem_type: str | None = None


def write_beside(folder: Path, model: Any, tokenizer: Any) -> None:
    """Write the tokenizer's files, if there is one, and the labels of a classifier that has names for them."""
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if label_names(model):
        labels = _Labels(label_names(model), model.config.problem_type)
        with whole_file(folder / LABELS_FILE) as part:
            part.write_text(json.dumps(asdict(labels), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def label_names(model: Any) -> list[str]:
    """Names of the classes of a sequence classifier; none where they are transformers' own, or it is none."""
    names = dict(getattr(getattr(model, "config", None), "id2label", None) or {})
    named = type(model).__name__.endswith("ForSequenceClassification") and names[0] != "LABEL_0"
    return [str(names[index]) for index in range(len(names))] if named else []


def with_labels(model: Any, folder: Path) -> Any:
    """The model itself, which answers with the names of labels that lie in the adapter's ``folder``, if any do."""
    file = folder / LABELS_FILE
    if not file.exists():
        return model
    try:
        # a pipe would be waited for
        content = file.read_text(encoding="utf-8") if file.is_file() else "no file"
        found = read_as(_Labels, json.loads(content), str(file))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, ConfigurationError):
            raise
        raise ConfigurationError(f"{str(file)!r} cannot be read: {error}") from None
    if len(found.labels) != model.config.num_labels:
        raise ConfigurationError(f"{str(file)!r} must name {model.config.num_labels} labels, got {len(found.labels)}")
    model.config.id2label = dict(enumerate(found.labels))
    model.config.label2id = {label: index for index, label in enumerate(found.labels)}
    model.config.problem_type = found.problem_type
    return model


def tokenizer_source(folder: Path, base: str) -> str:
    """Where the adapter's tokenizer lies: in its ``folder``, or with the model ``base``."""
    return str(folder.resolve()) if (folder / TOKENIZER_FILE).exists() else base


def input_files(origin: Path) -> list[Path]:
    """Files of a folder that come along; a hub's cache keeps the files of a snapshot two folders above it."""
    found = [file for pattern in _INPUT_FILES for file in origin.glob(pattern) if file.is_file()]
    home = (origin.parent.parent if origin.parent.name == "snapshots" else origin).resolve()
    for file in found:
        if not file.resolve().is_relative_to(home):
            raise ConfigurationError(f"{str(file)!r} must not be a link out of its folder; copy it there")
    return found
