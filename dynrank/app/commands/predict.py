"""``dynrank predict``: answers to texts, or to the rows of a file as training reads them, printed or in a file."""

import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from os.path import exists, isfile
from pathlib import Path
from typing import Any

import datasets
from jinja2 import TemplateError
from tqdm import tqdm

from dynrank.adapters.read import read_adapter
from dynrank.adapters.sidecar_files import INPUTS_FILE, Inputs, read_inputs, tokenizer_source
from dynrank.app.console import one_line, print_facts
from dynrank.app.models.base_model import base_settings, base_source, class_of_base, on_base
from dynrank.app.models.generating import end_of_turn_of
from dynrank.app.models.predicting import classified, written
from dynrank.app.models.pretrained import load_tokenizer, set_padding
from dynrank.app.tasks.data import columns as of_data
from dynrank.app.tasks.data.rows import refuse, usable_rows
from dynrank.app.tasks.data.source import RawRows, read_source, reading
from dynrank.errors import ConfigurationError, Count, checked_call
from dynrank.output.output_folder import new_file

_KINDS = (".csv", ".parquet", ".jsonl")
# How many labels are printed for each text.
_SHOWN = 3


@checked_call
def predict(
    source: Path,
    texts: Sequence[str],
    out: Path | None,
    *,
    base: str | None,
    columns: Mapping[str, of_data.Theirs],
    system: str | None,
    chat: bool,
    skip_unusable: bool,
    batch_size: Count,
    max_new_tokens: Count,
) -> None:
    """Print the answers to ``texts``, or write them to ``out``; see ``dynrank predict --help``."""
    if out is not None and (out.suffix not in _KINDS or out.exists()):
        raise ConfigurationError(f"--out must be a new file that ends in one of {[*_KINDS]}, got {str(out)!r}")
    learned = read_inputs(source)
    learned.system = learned.system if system is None else system
    # Only answers go to the standard output.
    with redirect_stdout(sys.stderr):
        asked = _texts_or_table(texts)
        adapter = read_adapter(source)
        classifies = class_of_base(adapter, base).__name__.endswith("ForSequenceClassification")
        form = learned.form or ("classification" if classifies else "completion")
        form = "chat" if chat or system is not None else form
        if (form == "classification") != classifies:
            raise ConfigurationError(f"{str(source)!r} cannot answer rows of the form {form} (--chat, --system)")
        where = f"FILE={texts[0]}" if isfile(texts[0]) else "TEXT"
        if isinstance(asked, RawRows):
            rows = _rows(asked, form, learned, columns, skip_unusable)
        elif columns:
            raise ConfigurationError(f"--columns must go with a file of columns, got {texts[0]!r}")
        else:
            rows = _plain(asked, form, where)
        place = tokenizer_source(source, base_source(adapter, base))
        tokenizer = load_tokenizer(place, "--model", base_settings(adapter, base))
        turn = None
        if form == "chat":
            rows, turn = _rendered(rows, learned.system, tokenizer, where, skip_unusable)
        model: Any = on_base(adapter, base).eval()
        several = model.config.problem_type == "multi_label_classification"
        # The one output of a reward model is a number, and so are all of a regression: they are no classes.
        numbers = model.config.problem_type == "regression" or (model.config.num_labels == 1 and not several)
        if numbers if classifies else model.config.is_encoder_decoder or not model.can_generate():
            raise ConfigurationError(
                f"{str(source)!r} adapts a {type(model).__name__}{' whose outputs are numbers' * classifies}; dynrank "
                "predict asks classifiers and causal language models; ask others by PEFT"
            )
        set_padding(model, tokenizer.pad_token_id)
        if out is not None:
            print_facts({"writing": f"{out}, {len(rows):,} rows; if this is interrupted, it begins anew"})
    prompts = rows["prompt" if "prompt" in rows.column_names else "text"][:]
    # Batches of texts with similar lengths need less padding, and the longest tell first whether there is memory.
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i])) if out else [*range(len(prompts))]
    prompts = [prompts[i] for i in order]
    if classifies:
        answers = classified(model, tokenizer, prompts, learned.max_length, batch_size)
    else:
        answers = written(model, tokenizer, prompts, max_new_tokens, batch_size, turn)
    if out is None:
        for answer in answers:
            best = [f"{one_line(pair['label'])} {pair['score']:.4f}" for pair in answer[:_SHOWN] if classifies]
            print("\t".join(best) if classifies else one_line(answer), flush=True)
        return
    bar = tqdm(answers, total=len(order), unit=" rows", mininterval=0.1 if sys.stderr.isatty() else 30)
    found = [answer for _, answer in sorted(zip(order, bar, strict=True), key=lambda pair: pair[0])]
    _write(out, {"row": rows["place"][:], **(_labels(found, several) if classifies else {"answer": found})})


def _texts_or_table(texts: Sequence[str]) -> RawRows | Sequence[str]:
    """The file of columns that is named; otherwise the texts, or those in the lines of another file."""
    places = [text for text in texts if text == "-" or exists(text)]
    first = Path(texts[0])
    if places and not (len(texts) == 1 and isfile(first)):
        raise ConfigurationError(f"TEXT must be texts, or one file, got {places[0]!r} of {len(texts)}")
    # Also a misspelt name of a file.
    if len(texts) == 1 and first.suffix.lower() in ({*of_data.KINDS} - {".txt"} if places else of_data.KINDS):
        return read_source(texts[0], "FILE", "test")
    if places:
        with reading(f"FILE={first}"):
            return first.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
    return texts


def _plain(texts: Sequence[str], form: str, where: str) -> datasets.Dataset:
    """Rows of texts."""
    if blank := [(number, "the text is blank") for number, text in enumerate(texts, start=1) if not text.strip()]:
        refuse(where, blank)
    cells: Sequence[Any] = [[{"role": "user", "content": text}] for text in texts] if form == "chat" else [*texts]
    return datasets.Dataset.from_dict({of_data.COLUMNS[form][0]: cells, "place": range(1, len(texts) + 1)})


def _rows(
    table: RawRows, form: of_data.Form, learned: Inputs, given: Mapping[str, of_data.Theirs], skip: bool
) -> datasets.Dataset:
    """The rows of a table by the columns that training read, unless the user has ``given`` others.

    Unusable rows are left out if they are to ``skip``, otherwise one error lists them.
    """
    old = [ours for ours in learned.columns if not any(ours in names for names in of_data.COLUMNS.values())]
    if old and not given:
        raise ConfigurationError(
            f"{INPUTS_FILE} says that training read a column as {old[0]!r}, which this version does not; name columns "
            "by --columns, such as prompt=instruction,input"
        )
    options: Any = {"trained": learned.columns, "asked": True}
    used = of_data.find_columns(table.rows.column_names, given, form, table.where, **options)
    rows, unusable = usable_rows(table, used, asked=True, skip=skip)
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
            faults[place] = f"the chat template refuses it: {error}"
    if faults and not (skip and prompts):
        refuse(where, faults.items())
    if faults:
        print_facts({"left out": f"{len(faults):,} rows that the chat template refuses"})
    end = end_of_turn_of(tokenizer, [*begin, {"role": "user", "content": "A question."}])
    return datasets.Dataset.from_dict({"prompt": [*prompts.values()], "place": [*prompts]}), end or ""


def _labels(answers: Sequence[Any], several: bool) -> dict[str, list[Any]]:
    """The label of each row and its probability; where a row has several labels, lists of those of at least 0.5."""
    keys = {"label": "label", "probability": "score"}
    if not several:
        return {name: [row[0][key] for row in answers] for name, key in keys.items()}
    return {
        name: [[pair[key] for pair in row if pair["score"] >= 0.5] for row in answers] for name, key in keys.items()
    }


def _write(out: Path, cells: Mapping[str, list[Any]]) -> None:
    def cell(value: Any) -> Any:
        # A cell of csv is a text.
        return json.dumps(value, ensure_ascii=False) if out.suffix == ".csv" and isinstance(value, list) else value

    answers = datasets.Dataset.from_dict({name: [*map(cell, column)] for name, column in cells.items()})
    with new_file(out) as file:
        if out.suffix == ".parquet":
            answers.to_parquet(file)
        elif out.suffix == ".jsonl":
            answers.to_json(file, force_ascii=False)
        else:
            answers.to_csv(file)
