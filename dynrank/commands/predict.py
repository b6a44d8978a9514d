"""``dynrank predict``: answers to texts, or to the rows of a file as training reads them, printed or in a file."""

import fcntl
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow.csv import CSVWriter
from tqdm import tqdm

from dynrank.adapters.predicting import Answerer
from dynrank.adapters.read import WEIGHTS_FILE, read_adapter
from dynrank.adapters.sidecar_files import INPUTS_FILE, Inputs, read_inputs
from dynrank.digest import digest
from dynrank.errors import ConfigurationError, read_as
from dynrank.output.console import one_line, print_facts
from dynrank.output.output_folder import new_file
from dynrank.output.whole_file import PART
from dynrank.tasks.data.columns import COLUMNS, Columns, Form, Theirs, each, find_columns, form_of
from dynrank.tasks.data.rows import Numbered, checked_rows
from dynrank.tasks.data.source import READERS, Source
from dynrank.tasks.data.stored import Rows, reading, refuse

# The forms of questions to a model that generates text; the first one whose columns the file has is used.
_WRITTEN: tuple[Form, ...] = ("chat", "completion", "text")
# How many labels are printed for each text.
_SHOWN = 3
# Batches that are sorted by length, and written, together.
_TOGETHER = 8
# Rows of a table that are written together.
_ROWS = 10_000
_TABLES: Mapping[str, Any] = {".csv": CSVWriter, ".parquet": pq.ParquetWriter, ".jsonl": None}

Answers = list[dict[str, Any]]


def predict(
    source: Path,
    texts: Sequence[str],
    out: Path | None,
    *,
    model: str | None,
    columns: Mapping[str, Theirs],
    system: str | None,
    chat: bool,
    skip_unusable: bool,
    batch_size: int,
    max_new_tokens: int,
) -> None:
    """Print the answers to ``texts``, or write them to ``out``; see ``dynrank predict --help``."""
    if out is not None and out.suffix not in _TABLES:
        raise ConfigurationError(f"--out must end in one of {[*_TABLES]}, got {str(out)!r}")
    if out is not None and out.exists():
        raise ConfigurationError(f"--out must be a new file, {str(out)!r} exists")
    learned = read_inputs(source)
    known = "chat" if chat or system is not None else learned.form
    forms = read_as(list[Form], [known] if known else [], str(source / INPUTS_FILE))
    ask = partial(Questions, texts, learned=learned, columns=columns, skip=skip_unusable)
    system = learned.system if system is None else system
    options: dict[str, Any] = {"max_length": learned.max_length, "max_new_tokens": max_new_tokens}
    # Only answers go to the standard output.
    with redirect_stdout(sys.stderr):
        # A file is checked before the model is loaded, which takes longer, unless its form depends on the model.
        questions = ask(forms[0]) if forms else None
        answerer = Answerer(read_adapter(source), model, system=system, **options)
        questions = questions or ask(None if answerer.writes else "classification")
    form = questions.columns.form
    if form == "chat" and not (answerer.writes and answerer.tokenizer.chat_template):
        raise ConfigurationError(
            "chats (--chat, --system) need a model that generates text, and a tokenizer with a chat template"
        )
    if (form == "classification") == answerer.writes:
        raise ConfigurationError(f"{str(source)!r} cannot answer rows of the form {form}")
    answer = partial(_answers, answerer)
    if out is None:
        rows = iter(questions)
        while batch := [*islice(rows, batch_size)]:
            for line in answerer.texts(batch) if answerer.writes else map(_ranked, answerer.labels(batch)):
                print(one_line(line) if answerer.writes else line, flush=True)
        return
    if out.suffix == ".csv" and answerer.several:
        raise ConfigurationError("--out must end in .jsonl or .parquet, because a text may have several labels")
    weights = (source / WEIGHTS_FILE).stat()
    how = (str(source.resolve()), weights.st_size, weights.st_mtime_ns, model, system, batch_size, max_new_tokens)
    key = digest((*how, asdict(learned), str(questions.columns), questions.key, skip_unusable))[:8]
    _write(questions, out, key, answer, batch_size, _schema(answerer))


class Questions:
    """The rows to answer: of texts, of the lines of a text file, or of a table that training could read.

    They are read once to check and count them, and again for each iteration, so they are never all in memory.

    Args:
        texts: texts, or the name of one file.
        form: form of the rows; None: by the columns of the file.
        learned: how training made its inputs; the columns that it used are used where the file has them.
        columns: the user's names of columns.
        skip: leave out rows that cannot be used; otherwise one error lists them.

    Attributes:
        columns: the columns that are used.
        key: a text that changes with the rows.
        count: number of usable rows.
    """

    def __init__(
        self, texts: Sequence[str], form: Form | None, *, learned: Inputs, columns: Mapping[str, Theirs], skip: bool
    ) -> None:
        self._parts: Sequence[Rows]
        file = Path(texts[0]) if len(texts) == 1 and _is_file(texts[0]) else None
        if file is not None and file.suffix.lower() in READERS and file.suffix.lower() != ".txt":
            table = Source(str(file), "FILE", "test")
            form = form or form_of(table.sample, _WRITTEN, columns, table.where, asked=True)
            self.columns = _columns(table, form, learned, columns)
            self._parts = table.parts
            print_facts({"columns": self.columns})
        else:
            form = form or "completion"
            name = "prompt" if form == "chat" else COLUMNS[form][0]
            if columns:
                raise ConfigurationError(f"--columns must go with a file of columns, got {texts[0]!r}")
            self.columns = Columns(form, {name: name}, asked=True)
            where = "TEXT" if file is None else f"FILE={file}"
            read = partial(_named, name, texts if file is None else file)
            stamp = "" if file is None or not file.exists() else str(file.stat().st_mtime_ns)
            self._parts = [Rows(where, str((*texts, stamp)), read)]
        self.key = str([part.key for part in self._parts])
        self.count = 0
        for part in self._parts:
            faults = []
            for row in self._read(part):
                self.count += not row["fault"]
                faults += [(row["place"], row["fault"])] if row["fault"] else []
            if faults and not skip:
                refuse(part.where, faults)
            if faults:
                print_facts({"left out": f"{len(faults):,} rows that cannot be used"})
        if not self.count:
            raise ConfigurationError(f"{self._parts[0].where} has no rows that can be used")

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for part in self._parts:
            yield from (row for row in self._read(part) if not row["fault"])

    def _read(self, part: Rows) -> Iterator[dict[str, Any]]:
        with reading(part.where):
            yield from checked_rows(part.read(), self.columns)


def _is_file(text: str) -> bool:
    """Whether a text is a file, or a misspelt name of one."""
    named = len(text.split()) == 1 and Path(text).suffix.lower() in READERS
    # The system refuses to look up longer names.
    return named or (len(text) < 1000 and Path(text).is_file())


def _named(name: str, texts: Sequence[str] | Path) -> Iterator[Numbered]:
    """Rows with one column ``name``: of each text, or of each line of a file."""
    if isinstance(texts, Path):
        with texts.open(encoding="utf-8-sig") as lines:
            yield from enumerate(({name: line.removesuffix("\n")} for line in lines), start=1)
    else:
        yield from enumerate(({name: text} for text in texts), start=1)


def _columns(table: Source, form: Form, learned: Inputs, given: Mapping[str, Theirs]) -> Columns:
    """The columns of a table: those that the user names, otherwise those of training, otherwise usual ones."""
    known = {name for row in table.sample for name in row}
    trained = {ours: theirs if isinstance(theirs, str) else tuple(theirs) for ours, theirs in learned.columns.items()}
    trained = {ours: theirs for ours, theirs in trained.items() if known.issuperset(each(theirs))}
    found = find_columns(table.sample, trained | {**given}, form, table.where, table.types, asked=True)
    unread = sorted(given.keys() - found.names.keys())
    if unread:
        raise ConfigurationError(f"--columns must name one of {sorted(found.names)} for the form {form}, got {unread}")
    return found


def _ranked(labels: list[tuple[str, float]]) -> str:
    return "\t".join(f"{one_line(name)} {value:.4f}" for name, value in labels[:_SHOWN])


def _answers(answerer: Answerer, rows: Sequence[Mapping[str, Any]]) -> Answers:
    """The cells of each row of a batch."""
    if answerer.writes:
        return [{"answer": text} for text in answerer.texts(rows)]
    if not answerer.several:
        return [{"label": name, "probability": value} for ((name, value), *_) in answerer.labels(rows)]
    likely = [[pair for pair in labels if pair[1] >= 0.5] for labels in answerer.labels(rows)]
    return [{"label": [name for name, _ in labels], "probability": [value for _, value in labels]} for labels in likely]


def _schema(answerer: Answerer) -> pa.Schema:
    cells: dict[str, Any] = {"answer": pa.string()}
    if not answerer.writes:
        cells = {"label": pa.string(), "probability": pa.float64()}
    several = answerer.several and not answerer.writes
    return pa.schema({"row": pa.int64(), **{name: pa.list_(kind) if several else kind for name, kind in cells.items()}})


def _write(
    questions: Questions,
    out: Path,
    key: str,
    answer: Callable[[Sequence[Mapping[str, Any]]], Answers],
    batch_size: int,
    schema: pa.Schema,
) -> None:
    """Write the answers to ``out``, from a file of lines beside it, in which an interrupted command goes on.

    ``key`` is in the name of this file, and changes with everything on which the answers depend.
    """
    part = out.with_name(f"{out.name}.{key}{PART}")
    together = _TOGETHER * batch_size
    with _begun(part, together) as (lines, done):
        begun = f"goes on after {done:,} rows" if done else f"{questions.count:,} rows"
        print_facts({"writing": f"{out}, {begun}; if it is interrupted, the same command goes on from {part.name}"})
        pause = 0.1 if sys.stderr.isatty() else 30
        with tqdm(total=questions.count, initial=done, unit=" rows", mininterval=pause) as bar:
            rows = islice(questions, done, None)
            while chunk := [*islice(rows, together)]:
                found: Answers = [{}] * len(chunk)
                # Batches of texts with similar lengths need less padding.
                order = sorted(range(len(chunk)), key=lambda i: len(str(chunk[i])))
                for start in range(0, len(order), batch_size):
                    batch = order[start : start + batch_size]
                    for i, cells in zip(batch, answer([chunk[i] for i in batch]), strict=True):
                        found[i] = {"row": chunk[i]["place"], **cells}
                    bar.update(len(batch))
                text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found)
                lines.write(text.encode())
                lines.flush()
        with new_file(out) as whole:
            _tabulate(part, whole, _TABLES[out.suffix], schema)
    part.unlink()


@contextmanager
def _begun(part: Path, together: int) -> Iterator[tuple[IO[bytes], int]]:
    """(the file of lines, to write to; how many lines are kept in it): only whole chunks, so batches are the same."""
    part.parent.mkdir(parents=True, exist_ok=True)
    with part.open("a+b") as lines:
        try:
            fcntl.flock(lines, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigurationError(f"another process is writing {str(part)!r}; wait for its end") from None
        lines.seek(0)
        kept = end = place = 0
        for count, line in enumerate(lines, start=1):
            place += len(line)
            if count % together == 0 and line.endswith(b"\n"):
                kept = count
                end = place
        lines.truncate(end)
        yield lines, kept


def _tabulate(part: Path, whole: Path, table: Any, schema: pa.Schema) -> None:
    """Write the rows in a file of lines as a table; without one, the lines themselves."""
    if table is None:
        shutil.copyfile(part, whole)
        return
    with part.open(encoding="utf-8") as lines, table(whole, schema) as writer:
        while rows := [json.loads(line) for line in islice(lines, _ROWS)]:
            writer.write_table(pa.Table.from_pylist(rows, schema))
