"""The input and output of ``dynrank predict``: texts, and one line for each."""

from collections.abc import Sequence
from pathlib import Path

from dynrank.adapters.predicting import answers
from dynrank.errors import ConfigurationError
from dynrank.output.console import quiet_loading

_TABLES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")


def print_answers(
    adapter: Path, texts: Sequence[str], model: str | None, *, batch_size: int, max_new_tokens: int, chat: bool
) -> None:
    """Print the :func:`dynrank.adapters.predicting.answers` to ``texts``, or to the lines of a file."""
    quiet_loading()
    if len(texts) == 1 and len(texts[0]) < 1000 and (Path(texts[0]).is_file() or _named_as_file(texts[0])):
        texts = _lines(Path(texts[0]))
    empty = [number for number, text in enumerate(texts, start=1) if not text.strip()]
    if empty or not texts:
        raise ConfigurationError(f"TEXT must not be empty, number {empty[0] if empty else 1} is")
    for line in answers(adapter, texts, model, batch_size=batch_size, max_new_tokens=max_new_tokens, chat=chat):
        print(line, flush=True)


def _named_as_file(text: str) -> bool:
    return len(text.split()) == 1 and Path(text).suffix in (".txt", *_TABLES)


def _lines(file: Path) -> list[str]:
    if file.suffix in _TABLES:
        raise ConfigurationError(f"FILE must be plain text with a text in each line, got {str(file)!r}")
    try:
        return file.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"FILE {str(file)!r} cannot be read: {error}") from None
