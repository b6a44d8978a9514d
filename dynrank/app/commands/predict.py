"""``dynrank predict``: answers to texts, or to the rows of a file as training reads them, printed or in a file."""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from functools import partial
from math import inf
from os.path import exists, isdir, isfile
from pathlib import Path
from typing import Any, TypeVar

import datasets
from tqdm import tqdm

from dynrank.adapters.read import read_adapter
from dynrank.adapters.sidecar_files import INPUTS_FILE, LABELS_FILE, Inputs, label_names, read_inputs
from dynrank.app.commands.keep import as_cells_of_csv, kept_cells, kept_columns
from dynrank.app.console import one_line, print_facts
from dynrank.app.models.predicting import Answerer, Prompts
from dynrank.app.tasks.data.columns import (
    COLUMNS,
    Columns,
    Form,
    Theirs,
    columns_to_ask,
    each,
    find_columns,
    form_of,
    is_optional,
    names_in,
    refuse_unknown,
    refuse_unread,
)
from dynrank.app.tasks.data.source import READERS, Source, lines_of
from dynrank.app.tasks.data.stored import RawRows, reading, refuse, usable_rows
from dynrank.digest import digest
from dynrank.errors import ConfigurationError, read_as
from dynrank.output.output_folder import new_file

# The forms of questions to a model that generates text; the first one whose columns the file has is used.
_WRITTEN: tuple[Form, ...] = ("chat", "completion", "text")
# PEFT's names of tasks.
_CLASSIFYING = "SEQ_CLS"
_WRITING = ("CAUSAL_LM", "SEQ_2_SEQ_LM")
# How many labels are printed for each text.
_SHOWN = 3
# Batches that are sorted by length, and kept if the command is interrupted, together.
_TOGETHER = 8
_KINDS = (".csv", ".parquet", ".jsonl")

T = TypeVar("T")


def predict(
    source: Path,
    texts: Sequence[str],
    out: Path | None,
    *,
    model: str | None,
    columns: Mapping[str, Theirs],
    keep: Sequence[str],
    system: str | None,
    chat: bool,
    skip_unusable: bool,
    batch_size: int,
    max_new_tokens: int,
) -> None:
    """Print the answers to ``texts``, or write them to ``out``; see ``dynrank predict --help``."""
    if out is not None and out.suffix not in _KINDS:
        raise ConfigurationError(f"--out must end in one of {[*_KINDS]}, got {str(out)!r}")
    if out is not None and out.exists():
        raise ConfigurationError(f"--out must be a new file, {str(out)!r} exists")
    if keep and out is None:
        raise ConfigurationError(f"--keep must go with --out, which gets the columns, got {' '.join(keep)}")
    refuse_unknown(columns, "FILE")
    learned = read_inputs(source)
    known = "chat" if chat or system is not None else learned.form
    forms = read_as(list[Form], [known] if known else [], str(source / INPUTS_FILE))
    system = learned.system if system is None else system
    inputs = replace(learned, system=system)
    sizes: dict[str, Any] = {"max_length": learned.max_length, "max_new_tokens": max_new_tokens}
    # Only answers go to the standard output.
    with redirect_stdout(sys.stderr):
        asking = _asking(texts, columns)
        table = asking if isinstance(asking, Source) else None
        kept = kept_columns(keep, table)
        ask = partial(_questions, asking, learned=inputs, columns=columns, skip=skip_unusable)
        # A file is checked before the model is loaded, which takes longer, unless its form depends on the model.
        asked = ask(forms[0]) if forms else None
        adapter = read_adapter(source)
        if not forms and table is not None:
            _refuse_in_every_form(table, adapter.config.task_type, inputs, columns)
        prompts = Prompts(adapter, model, system)
        accept = partial(_accepted, prompts, skip=skip_unusable)
        asked = accept(*asked) if asked else None
        answerer = Answerer(adapter, model, prompts, **sizes)
        if not answerer.writes and not (source / LABELS_FILE).exists():
            many = "several" if answerer.several else "one"
            names = ", ".join(label_names(answerer.model) or ())
            print_facts({"labels": f"{names}; {many} for each text: as the base says, for there is no {LABELS_FILE}"})
        rows, form, where = asked or accept(*ask(None if answerer.writes else "classification"))
    if form == "chat" and not answerer.writes:
        raise ConfigurationError("chats (--chat, --system) need a model that generates text")
    if (form == "classification") == answerer.writes:
        raise ConfigurationError(f"{str(source)!r} cannot answer rows of the form {form}")
    if answerer.writes:
        with redirect_stdout(sys.stderr):
            rows = _within_positions(rows, answerer, where, skip=skip_unusable)
    if out is None:
        for start in range(0, len(rows), batch_size):
            batch = rows.select(range(start, min(start + batch_size, len(rows)))).to_list()
            for line in answerer.texts(batch) if answerer.writes else map(_ranked, answerer.labels(batch)):
                print(one_line(line) if answerer.writes else line, flush=True)
        return
    if out.suffix == ".csv" and answerer.several:
        raise ConfigurationError("--out must end in .jsonl or .parquet, because a text may have several labels")
    beside = kept_cells(table, kept, rows["place"], [*_features(answerer)]) if table is not None and kept else None
    if beside is not None and out.suffix == ".csv":
        beside = as_cells_of_csv(beside)
    how = (str(source.resolve()), model, system, batch_size, max_new_tokens)
    key = digest((*how, _state_of(source), asdict(learned), rows._fingerprint))
    _write(rows, out, key, answerer, batch_size, beside)


def _asking(texts: Sequence[str], columns: Mapping[str, Theirs]) -> Source | Sequence[str] | Path:
    """What asks: a table, texts, or a text file whose lines are texts.

    Args:
        texts: texts, or the name of one file.
        columns: the user's names of columns, which only a table has.
    """
    if len(texts) == 1 and isdir(texts[0]):
        raise ConfigurationError(f"TEXT must be a text or a file, got the folder {texts[0]!r}; name one of its files")
    # Also what a shell puts in place of <(…).
    pipes = [text for text in texts if text == "-" or (exists(text) and not (isfile(text) or isdir(text)))]
    if pipes:
        raise ConfigurationError(
            f"TEXT must be a text or a file, got {pipes[0]!r}; write what a pipe gives into a file"
        )
    files = [text for text in texts if _is_file(text)]
    if files and len(texts) > 1:
        raise ConfigurationError(f"a file must be the only TEXT, got {files[0]!r} and {len(texts) - 1} more")
    file = Path(files[0]) if files else None
    if file is not None and file.suffix.lower() in READERS and file.suffix.lower() != ".txt":
        return Source(str(file), "FILE", "test")
    if columns:
        raise ConfigurationError(f"--columns must go with a file of columns, got {texts[0]!r}")
    return texts if file is None else file


def _questions(
    asking: Source | Sequence[str] | Path,
    form: Form | None,
    *,
    learned: Inputs,
    columns: Mapping[str, Theirs],
    skip: bool,
) -> tuple[datasets.Dataset, str, str]:
    """The rows to answer, their form, and their name in errors.

    Args:
        asking: what asks.
        form: form of the rows; None: by the columns of the table.
        learned: how training made its inputs; the table must have the columns that it used. ``system`` is that of chats
            without one.
        columns: the user's names of columns.
        skip: leave out rows that cannot be used; otherwise one error lists them.
    """
    if isinstance(asking, Source):
        form = form or form_of(asking.sample, _WRITTEN, columns, asking.where)
        used = _columns(asking, form, learned, columns)
        facts: dict[str, object] = {"columns": used}
        # Where it is known what training read, other columns are the user's own.
        if used.unused and not learned.form:
            facts["not used"] = ", ".join(used.unused)
        print_facts(facts)
        where = asking.where
        rows, unusable = asking.read(used, skip=skip)
    else:
        form = form or "completion"
        name = "prompt" if form == "chat" else COLUMNS[form][0]
        used = Columns(form, {name: name}, asked=True)
        where = f"FILE={asking}" if isinstance(asking, Path) else "TEXT"
        with reading(where):
            raw = lines_of(asking, name) if isinstance(asking, Path) else datasets.Dataset.from_dict({name: [*asking]})
        rows, unusable = usable_rows(RawRows(where, raw), used, skip=skip)
    if unusable:
        print_facts({"left out": f"{unusable:,} rows that cannot be used"})
    return rows, used.form, where


def _refuse_in_every_form(table: Source, task_type: str | None, learned: Inputs, columns: Mapping[str, Theirs]) -> None:
    """Refuse a table, or names of its columns, that fit no form; which one it is, only the model will tell for sure.

    ``task_type`` is PEFT's name of the adapter's task, if it has one.
    """
    if task_type not in _WRITING:
        try:
            _columns(table, "classification", learned, columns)
            return
        except ConfigurationError:
            if task_type == _CLASSIFYING:
                raise
    _columns(table, form_of(table.sample, _WRITTEN, columns, table.where), learned, columns)


def _accepted(
    prompts: Prompts, rows: datasets.Dataset, form: str, where: str, *, skip: bool
) -> tuple[datasets.Dataset, str, str]:
    """(the rows, without the chats that the chat template refuses, ``form``, ``where``); see :func:`_usable`."""
    if form != "chat":
        return rows, form, where
    if not prompts.tokenizer.chat_template:
        raise ConfigurationError("chats (--chat, --system) need a tokenizer with a chat template")
    refusals = _of_each(rows, prompts.refusals)
    faults = [None if why is None else f"is refused by the chat template: {why}" for why in refusals]
    return _usable(rows, where, faults, "rows that the chat template refuses", skip=skip), form, where


def _within_positions(rows: datasets.Dataset, answerer: Answerer, where: str, *, skip: bool) -> datasets.Dataset:
    """The rows whose prompts leave positions of the model for an answer; see :func:`_usable`."""
    longest = answerer.longest
    if longest == inf:
        return rows
    new = answerer.max_new_tokens
    if longest < 1:
        raise ConfigurationError(
            f"--max-new-tokens must be at most {answerer.positions}, which the model reads, got {new}"
        )
    fault = (
        f"has a prompt of more than {longest} tokens, the model reads {answerer.positions}, and the answer may need "
        f"{new} (--max-new-tokens)"
    )
    faults = [fault if length > longest else None for length in _of_each(rows, answerer.lengths)]
    return _usable(rows, where, faults, f"rows whose prompts have more than {longest} tokens", skip=skip)


def _of_each(rows: datasets.Dataset, find: Callable[[list[Any]], list[T]]) -> list[T]:
    """What ``find`` finds for each of many rows."""
    parts = (rows.select(range(start, min(start + 1000, len(rows)))) for start in range(0, len(rows), 1000))
    return [found for part in parts for found in find(part.to_list())]


def _usable(
    rows: datasets.Dataset, where: str, faults: Sequence[str | None], left_out: str, *, skip: bool
) -> datasets.Dataset:
    """The rows without a fault, if ``skip`` leaves the others out; otherwise one error lists them.

    ``left_out`` says what they are.
    """
    kept = [i for i, fault in enumerate(faults) if fault is None]
    count = len(rows) - len(kept)
    if not count:
        return rows
    if not (skip and kept):
        places = zip(rows["place"], faults, strict=True)
        refuse(where, [(place, fault) for place, fault in places if fault is not None])
    print_facts({"left out": f"{count:,} {left_out}"})
    return rows.select(kept)


def _is_file(text: str) -> bool:
    """Whether a text is a file, or a misspelt name of one."""
    named = len(text.split()) == 1 and Path(text).suffix.lower() in READERS
    # Unlike Path.is_file, this raises no error for a text that is too long for a name.
    return named or isfile(text)


def _columns(table: Source, form: Form, learned: Inputs, given: Mapping[str, Theirs]) -> Columns:
    """The columns of a table: those that the user names, otherwise those of training.

    Nothing else is read, such as a column of contexts that training did not have. Training rows without names of
    columns had the columns that their form needs; the table has these by usual names. If nothing is known of training,
    all columns are found by usual names.
    """
    columns = {ours: theirs if isinstance(theirs, str) else tuple(theirs) for ours, theirs in learned.columns.items()}
    trained = columns_to_ask(columns, form)
    # An optional column may be given as "": these rows have none.
    given = {ours: theirs for ours, theirs in given.items() if theirs or is_optional(ours)}
    replaced = {*given}
    # Chats are in messages, or in prompts.
    replaced |= {"messages"} if "prompt" in given else {"prompt", "input"} if "messages" in given else set()
    known = {*names_in(table.sample)}
    if learned.system is not None and not known.issuperset(each(trained.get("system", ()))):
        replaced.add("system")
    kept = {ours: theirs for ours, theirs in trained.items() if ours not in replaced}
    _refuse_missing(table, kept)
    options: Any = {"trained": kept if learned.form or trained else None, "asked": True}
    found = find_columns(table.sample, given, form, table.where, **options)
    refuse_unread(given, found)
    return found


def _refuse_missing(table: Source, trained: Mapping[str, Theirs]) -> None:
    """Refuse a table without a column that training read."""
    known = names_in(table.sample)
    lacking = {ours: [name for name in each(theirs) if name not in known] for ours, theirs in trained.items()}
    lacking = {ours: names for ours, names in lacking.items() if names}
    if not lacking:
        return
    missing = [repr(name) for names in lacking.values() for name in names]
    read = ", ".join(f"{ours} <- {' + '.join(each(trained[ours]))}" for ours in lacking)
    advice = [f"give {' '.join(f'--columns {ours}=NAME' for ours in lacking)} with these rows' own names"]
    advice += [f"--columns {ours}= if these rows have none" for ours in lacking if is_optional(ours)]
    raise ConfigurationError(
        f"{table.where} has no column{'s' * (len(missing) > 1)} {' and '.join(missing)}, which training read ({read}); "
        f"it has {known}; {', or '.join(advice)}"
    )


def _ranked(labels: list[tuple[str, float]]) -> str:
    return "\t".join(f"{one_line(name)} {value:.4f}" for name, value in labels[:_SHOWN])


def _write(
    rows: datasets.Dataset, out: Path, key: str, answerer: Answerer, batch_size: int, beside: datasets.Dataset | None
) -> None:
    """Write the answers to ``out``; an interrupted command goes on with the parts that the cache of ``datasets`` has.

    ``key`` is in their fingerprints, and changes with everything on which the answers depend. ``beside`` has columns of
    the same rows, which come before the answers.
    """
    print_facts({"writing": f"{out}, {len(rows):,} rows; if it is interrupted, the same command goes on"})
    # One bar shows all parts.
    datasets.disable_progress_bars()
    together = _TOGETHER * batch_size
    parts = []
    with tqdm(total=len(rows), unit=" rows", mininterval=0.1 if sys.stderr.isatty() else 30) as bar:
        for start in range(0, len(rows), together):
            part = rows.select(range(start, min(start + together, len(rows))))
            parts.append(
                part.map(
                    _answers,
                    batched=True,
                    batch_size=together,
                    fn_kwargs={"answerer": answerer, "batch_size": batch_size},
                    remove_columns=rows.column_names,
                    features=_features(answerer),
                    new_fingerprint=digest((key, start)),
                )
            )
            bar.update(len(part))
    answers = datasets.concatenate_datasets(parts)
    stored = answers.cache_files
    if beside is not None:
        place, *own = answers.column_names
        answers = datasets.concatenate_datasets([answers, beside], axis=1)
        answers = answers.select_columns([place, *beside.column_names, *own])
    with new_file(out) as file:
        if out.suffix == ".csv":
            answers.to_csv(file)
        elif out.suffix == ".jsonl":
            # Not by pandas, which rounds numbers, and writes dates as milliseconds.
            lines = (json.dumps(row, ensure_ascii=False, default=str) for row in answers)
            file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        else:
            answers.to_parquet(file)
    # Another command answers anew, because the base model may be another by then.
    for part in stored:
        Path(part["filename"]).unlink(missing_ok=True)


def _state_of(source: Path) -> list[tuple[str, int, int]]:
    """What changes with a file in the adapter's folder: each one's name, size and time."""
    files = [(file.name, file.stat()) for file in sorted(source.iterdir()) if file.is_file()]
    return [(name, state.st_size, state.st_mtime_ns) for name, state in files]


def _answers(columns: Mapping[str, list[Any]], *, answerer: Answerer, batch_size: int) -> dict[str, list[Any]]:
    """The columns of the answers to rows, which are answered in batches of similar lengths."""
    rows = [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]
    found: list[Any] = [None] * len(rows)
    # Batches of texts with similar lengths need less padding.
    order = sorted(range(len(rows)), key=lambda i: len(str(rows[i])))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        asked = [rows[i] for i in batch]
        for i, answer in zip(batch, answerer.texts(asked) if answerer.writes else answerer.labels(asked), strict=True):
            found[i] = answer
    if answerer.writes:
        return {"row": columns["place"], "answer": found}
    if not answerer.several:
        best = [labels[0] for labels in found]
        names = [name for name, _ in best]
        return {"row": columns["place"], "label": names, "probability": [value for _, value in best]}
    likely = [[pair for pair in labels if pair[1] >= 0.5] for labels in found]
    return {
        "row": columns["place"],
        "label": [[name for name, _ in labels] for labels in likely],
        "probability": [[value for _, value in labels] for labels in likely],
    }


def _features(answerer: Answerer) -> datasets.Features:
    cells: dict[str, Any] = {"answer": datasets.Value("string")}
    if not answerer.writes:
        cells = {"label": datasets.Value("string"), "probability": datasets.Value("float64")}
        if answerer.several:
            cells = {name: datasets.List(kind) for name, kind in cells.items()}
    return datasets.Features({"row": datasets.Value("int64"), **cells})
