"""The other files in an adapter's folder: tokenizer, labels, inputs, weights of the base."""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, field
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from dynrank.adapters.base import BASE_FILE, Base
from dynrank.adapters.stored import read_json
from dynrank.errors import ConfigurationError
from dynrank.output.output_folder import check_free, whole_or_nothing
from dynrank.output.whole_file import whole_file

# The labels are not in a config.json, because transformers would then expect a whole model in the folder.
LABELS_FILE = "labels.json"
INPUTS_FILE = "inputs.json"
TOKENIZER_FILE = "tokenizer_config.json"
# Patterns of the files in a model's folder that define how its inputs are made.
INPUT_FILES = (
    *("*token*", "*vocab*", "merges.txt", "bpe.codes", "emoji.json", "normalizer.json", "*.model", "*.spm"),
    *("chat_template*", "additional_chat_templates/*", "*processor_config.json"),
)


@dataclass(config=ConfigDict(strict=True, extra="ignore"))
class _Labels:
    labels: list[str]
    problem_type: Literal["single_label_classification", "multi_label_classification", "regression"] | None = None


@dataclass(config=ConfigDict(strict=True, extra="ignore"))
class Inputs:
    """How training made its inputs of rows.

    Attributes:
        form: form of the rows: classification, completion, chat or text; "" if it is not known.
        columns: {our name of a column: its name in the training file, or the names of several that are joined}.
        system: the system prompt with which every chat began; None if there was none, or several.
        max_length: number of tokens after which the text of a classifier is cut.
    """

    form: Literal["", "classification", "completion", "chat", "text"] = ""
    columns: dict[str, str | list[str]] = field(default_factory=dict)
    system: str | None = None
    max_length: int | None = None


def write_sidecar_files(
    folder: Path, model: Any, tokenizer: Any, inputs: Inputs | None = None, base: Base | None = None
) -> None:
    """Write what is given, and the labels of a classifier that has names for them."""
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    labels = _Labels(label_names(model), model.config.problem_type) if label_names(model) else None
    for name, content in ((LABELS_FILE, labels), (INPUTS_FILE, inputs), (BASE_FILE, base)):
        if content is not None:
            with whole_file(folder / name) as part:
                part.write_text(json.dumps(asdict(content), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_inputs(folder: Path) -> Inputs:
    """The inputs of training by the adapter's ``folder``, of which nothing is known for adapters of other programs."""
    file = folder / INPUTS_FILE
    return read_json(Inputs, file) if file.exists() else Inputs()


def label_names(model: Any) -> list[str]:
    """Names of a sequence classifier's classes, in the order of its head; [] for other models.

    Transformers' default names are given, too: users' labels may be called so, and stand in another order.
    """
    if not type(model).__name__.endswith("ForSequenceClassification"):
        return []
    names = model.config.id2label
    return [str(names[index]) for index in range(len(names))]


def stored_labels(folder: Path) -> list[str]:
    """Names of the classes in the adapter's ``folder``; [] if it has none."""
    file = folder / LABELS_FILE
    return read_json(_Labels, file).labels if file.exists() else []


def with_labels(model: Any, folder: Path) -> Any:
    """The model itself, with the label names in the adapter's ``folder``, if there are any."""
    file = folder / LABELS_FILE
    if not file.exists():
        return model
    found = read_json(_Labels, file)
    if len(found.labels) != model.config.num_labels:
        raise ConfigurationError(f"{str(file)!r} must name {model.config.num_labels} labels, got {len(found.labels)}")
    model.config.id2label = dict(enumerate(found.labels))
    model.config.label2id = {label: index for index, label in enumerate(found.labels)}
    # A file that somebody has written by hand may name the labels alone. Then the base's kind holds.
    if found.problem_type is not None:
        model.config.problem_type = found.problem_type
    return model


def tokenizer_source(folder: Path, base: str) -> str:
    """The source of the adapter's tokenizer: the adapter's ``folder`` if it has one, otherwise the model ``base``."""
    return str(folder.resolve()) if (folder / TOKENIZER_FILE).exists() else base


@contextmanager
def new_adapter_folder(out: Path, source: Path) -> Iterator[Path]:
    """A folder to write another form of the adapter in ``source`` to, which has its other files already.

    It becomes ``out`` at the end of the block, or is deleted after an error.
    """
    check_free(out, source)
    own = {name: source / name for name in (LABELS_FILE, INPUTS_FILE, BASE_FILE)}
    sidecars = input_files(source) | {name: file for name, file in own.items() if file.exists()}
    with whole_or_nothing(out) as folder:
        copy_files(sidecars, folder)
        yield folder


def input_files(origin: Path) -> dict[str, Path]:
    """{name in the folder: file} of a folder's files that are copied with a model.

    A snapshot in the hub's cache links to files two folders above.
    """
    paths = [path for pattern in INPUT_FILES for path in origin.glob(pattern) if path.is_file()]
    found = {str(path.relative_to(origin)): path for path in paths}
    home = (origin.parent.parent if origin.parent.name == "snapshots" else origin).resolve()
    for file in found.values():
        # A link of somebody else's folder could lead to a file that its reader would not publish.
        if not file.resolve().is_relative_to(home):
            raise ConfigurationError(f"{str(file)!r} must not be a link out of its folder; copy the file there")
    return found


def copy_files(files: Mapping[str, Path], folder: Path) -> None:
    """Copy files of these names into ``folder``, except those that it has already."""
    for name, file in files.items():
        target = folder / name
        if not target.exists():
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target)
