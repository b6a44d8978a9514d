"""``dynrank predict``: answers to texts, or to the rows of a file as training reads them, printed or in a file."""

import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from os.path import exists, isfile
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from jinja2 import TemplateError
from tqdm import tqdm

from dynrank.adapters.read import read_adapter
from dynrank.adapters.sidecar_files import INPUTS_FILE, LABELS_FILE, Inputs, label_names, read_inputs, tokenizer_source
from dynrank.app.console import one_line, print_facts
from dynrank.app.models.base_model import base_settings, base_source, class_of_base
from dynrank.app.models.generating import end_of_turn_of
from dynrank.app.models.predicting import answering
from dynrank.app.models.pretrained import load_tokenizer
from dynrank.app.tasks.data import columns as of_data
from dynrank.app.tasks.data.source import READERS, Source
from dynrank.app.tasks.data.stored import reading, refuse
from dynrank.errors import ConfigurationError, read_as
from dynrank.output.output_folder import new_file

_KINDS = (".csv", ".parquet", ".jsonl")
_ANSWERS = ("row", "label", "probability", "answer")
# How many labels are printed for each text.
_SHOWN = 3


def predict(
    source: Path,
    texts: Sequence[str],
    out: Path | None,
    *,
    model: str | None,
    columns: Mapping[str, of_data.Theirs],
    keep: Sequence[str],
    system: str | None,
    chat: bool,
    skip_unusable: bool,
    batch_size: int,
    max_new_tokens: int,
) -> None:
    """Print the answers to ``texts``, or write them to ``out``; see ``dynrank predict --help``."""
    if out is not None and (out.suffix not in _KINDS or out.exists()):
        raise ConfigurationError(f"--out must be a new file that ends in one of {[*_KINDS]}, got {str(out)!r}")
    learned = read_inputs(source)
    learned.system = learned.system if system is None else system
    known = "chat" if chat or system is not None else learned.form
    forms = read_as(list[of_data.Form], [known] if known else [], str(source / INPUTS_FILE))
    # Only answers go to the standard output.
    with redirect_stdout(sys.stderr):
        table = _table(texts, columns)
        kept = _kept(keep, table if out else None)
        adapter = read_adapter(source)
        classifies = class_of_base(adapter, model).__name__.endswith("ForSequenceClassification")
        if not forms and table is not None and not classifies:
            forms = [of_data.form_of(table.sample, ("chat", "completion", "text"), columns, table.where)]
        form = forms[0] if forms else "classification" if classifies else "completion"
        if (form == "classification") != classifies:
            raise ConfigurationError(f"{str(source)!r} cannot answer rows of the form {form} (--chat, --system)")
        where = f"FILE={texts[0]}" if isfile(texts[0]) else "TEXT"
        rows = _plain(texts, form, where) if table is None else _rows(table, form, learned, columns, skip_unusable)
        place = tokenizer_source(source, base_source(adapter, model))
        tokenizer = load_tokenizer(place, "--model", base_settings(adapter, model))
        turn = None
        if form == "chat":
            rows, turn = _rendered(rows, learned.system, tokenizer, where, skip_unusable)
        sizes: Any = {"max_length": learned.max_length, "max_new_tokens": max_new_tokens}
        pipe = answering(adapter, model, tokenizer, turn=turn, **sizes)
        if classifies and not (source / LABELS_FILE).exists():
            names = ", ".join(label_names(pipe.model))
            print_facts({"labels": f"{names}: as the base says, for there is no {LABELS_FILE}"})
        if out is not None:
            print_facts({"writing": f"{out}, {len(rows):,} rows; if this is interrupted, it begins anew"})
    asked = rows["prompt" if "prompt" in rows.column_names else "text"][:]
    # Batches of texts with similar lengths need less padding, and the longest tell first whether there is memory.
    order = sorted(range(len(asked)), key=lambda i: -len(asked[i])) if out else [*range(len(asked))]
    answers = pipe((asked[i] for i in order), batch_size=batch_size)
    if out is None:
        for answer in answers:
            best = [f"{one_line(pair['label'])} {pair['score']:.4f}" for pair in answer[:_SHOWN] if classifies]
            print("\t".join(best) if classifies else one_line(answer), flush=True)
        return
    bar = tqdm(answers, total=len(order), unit=" rows", mininterval=0.1 if sys.stderr.isatty() else 30)
    found = [answer for _, answer in sorted(zip(order, bar, strict=True), key=lambda pair: pair[0])]
    places = rows["place"][:]
    cells = {"row": places} | {name: [values[place] for place in places] for name, values in kept.items()}
    _write(out, cells | (_labels(found, pipe.model) if classifies else {"answer": found}))


def _table(texts: Sequence[str], columns: Mapping[str, of_data.Theirs]) -> Source | None:
    """The file of columns that is named; None for texts, and for a file whose lines are texts."""
    strange = [text for text in texts if text == "-" or (exists(text) and not isfile(text))]
    if strange:
        raise ConfigurationError(
            f"TEXT must be a text or a file, got {strange[0]!r}; name one file of a folder, or write what a pipe gives "
            "into a file"
        )
    # Also a misspelt name of a file.
    files = [
        text for text in texts if isfile(text) or (len(text.split()) == 1 and Path(text).suffix.lower() in READERS)
    ]
    if files and len(texts) > 1:
        raise ConfigurationError(f"a file must be the only TEXT, got {files[0]!r} and {len(texts) - 1} more")
    if files and (not isfile(files[0]) or Path(files[0]).suffix.lower() in {*READERS} - {".txt"}):
        return Source(files[0], "FILE", "test")
    if columns:
        raise ConfigurationError(f"--columns must go with a file of columns, got {texts[0]!r}")
    return None


def _plain(texts: Sequence[str], form: str, where: str) -> datasets.Dataset:
    """Rows of texts, or of the lines of a file."""
    if isfile(texts[0]):
        with reading(where):
            texts = Path(texts[0]).read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
    if blank := [(number, "has an empty text") for number, text in enumerate(texts, start=1) if not text.strip()]:
        refuse(where, blank)
    cells: Sequence[Any] = [[{"role": "user", "content": text}] for text in texts] if form == "chat" else [*texts]
    return datasets.Dataset.from_dict({of_data.COLUMNS[form][0]: cells, "place": range(1, len(texts) + 1)})


def _rows(
    table: Source, form: of_data.Form, learned: Inputs, given: Mapping[str, of_data.Theirs], skip: bool
) -> datasets.Dataset:
    """The rows of a table by the columns that training read, unless the user has ``given`` others.

    Where it is not known what training read, columns are found by usual names. Unusable rows are left out if they are
    to ``skip``, otherwise one error lists them.
    """
    columns = {ours: theirs if isinstance(theirs, str) else tuple(theirs) for ours, theirs in learned.columns.items()}
    trained = of_data.columns_to_ask(columns, form)
    # Chats are in messages, or in prompts.
    replaced = {"messages"} if "prompt" in given else {"prompt", "input"} if "messages" in given else set()
    known = {*of_data.names_in(table.sample)}
    # The system prompt with which all chats began need not stand in each row.
    if learned.system is not None and not known.issuperset(of_data.each(trained.get("system", ()))):
        replaced.add("system")
    names = {ours: theirs for ours, theirs in trained.items() if ours not in replaced} | {**given}
    options: Any = {"trained": {} if learned.form or trained else None, "asked": True}
    used = of_data.find_columns(table.sample, names, form, table.where, **options)
    of_data.refuse_unread(given, used)
    unread = {"not used": ", ".join(used.unused)} if used.unused and not learned.form else {}
    print_facts({"columns": used, **unread})
    rows, unusable = table.read(used, skip=skip)
    if unusable:
        print_facts({"left out": f"{unusable:,} rows that cannot be used"})
    return rows


def _rendered(
    rows: datasets.Dataset, system: str | None, tokenizer: Any, where: str, skip: bool
) -> tuple[datasets.Dataset, str]:
    """(the chats by the tokenizer's template, as prompts; the token by which it ends a turn, or "")."""
    if not tokenizer.chat_template:
        raise ConfigurationError("chats (--chat, --system) need a tokenizer with a chat template")
    begin = [] if system is None else [{"role": "system", "content": system}]
    prompts, faults = {}, {}
    for place, messages in zip(rows["place"], rows["messages"], strict=True):
        turns = messages if messages[0]["role"] == "system" else [*begin, *messages]
        try:
            prompts[place] = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            faults[place] = f"is refused by the chat template: {error}"
    if faults and not (skip and prompts):
        refuse(where, faults.items())
    if faults:
        print_facts({"left out": f"{len(faults):,} rows that the chat template refuses"})
    end = end_of_turn_of(tokenizer, [*begin, {"role": "user", "content": "A question."}])
    return datasets.Dataset.from_dict({"prompt": [*prompts.values()], "place": [*prompts]}), end or ""


def _labels(answers: Sequence[Any], model: Any) -> dict[str, list[Any]]:
    """The label of each row and its probability; of a model of several labels, the lists of those of at least 0.5."""
    keys = {"label": "label", "probability": "score"}
    if model.config.problem_type != "multi_label_classification":
        return {name: [row[0][key] for row in answers] for name, key in keys.items()}
    return {
        name: [[pair[key] for pair in row if pair["score"] >= 0.5] for row in answers] for name, key in keys.items()
    }


def _kept(keep: Sequence[str], table: Source | None) -> dict[str, dict[int, Any]]:
    """{name beside the answers: {number of a row: its value}} of texts COLUMN or NAME=COLUMN."""
    known = of_data.names_in(table.sample) if table is not None else []
    parts = [("", text) if text in known else text.rpartition("=")[::2] for text in keep]
    kept = {name or column: column for name, column in parts}
    wrong = [column for name, column in kept.items() if column not in known or name in _ANSWERS]
    if wrong:
        raise ConfigurationError(
            f"--keep must name columns of FILE, which has {known}, beside --out; another name than {[*_ANSWERS]} is "
            f"given by --keep NAME=COLUMN; got {wrong}"
        )
    files = table.parts if table is not None and kept else []
    rows = {number: row for file in files for number, row in enumerate(file.rows, start=file.first)}
    return {name: {number: row.get(column) for number, row in rows.items()} for name, column in kept.items()}


def _write(out: Path, cells: Mapping[str, list[Any]]) -> None:
    def cell(value: Any) -> Any:
        # A cell of csv is a text.
        nested = out.suffix == ".csv" and isinstance(value, list | dict)
        return json.dumps(value, ensure_ascii=False, default=str) if nested else value

    try:
        answers = datasets.Dataset.from_dict({name: [*map(cell, column)] for name, column in cells.items()})
    except (pa.ArrowException, OverflowError) as error:
        raise ConfigurationError(f"columns must have values of one type to be kept: {error} (--keep)") from error
    with new_file(out) as file:
        if out.suffix == ".jsonl":
            # Not by pandas, which rounds numbers, and writes dates as milliseconds.
            lines = (json.dumps(row, ensure_ascii=False, default=str) for row in answers)
            file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        else:
            (answers.to_csv if out.suffix == ".csv" else answers.to_parquet)(file)
