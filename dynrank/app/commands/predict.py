"""``dynrank predict``: answers to texts, or to the rows of a file as training reads them, printed or in a file."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from functools import partial
from os.path import exists, isfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tqdm import tqdm
from transformers import pipeline

from dynrank.adapters.read import read_adapter
from dynrank.adapters.sidecar_files import INPUTS_FILE, Inputs, read_inputs, tokenizer_source
from dynrank.app.console import one_line
from dynrank.app.models.base_model import base_of, class_of_base, on_base
from dynrank.app.models.generating import end_of_turn_of, greedy_texts, open_ids, rendered
from dynrank.app.models.pretrained import load_tokenizer, positions, set_padding
from dynrank.app.tasks.data.columns import COLUMNS, Form, find_columns
from dynrank.app.tasks.data.rows import usable_rows
from dynrank.app.tasks.data.source import KINDS, RawRows, read_source, reading
from dynrank.errors import ConfigurationError, Count, checked_call
from dynrank.output.output_folder import new_file

_WRITERS: dict[str, Any] = {
    ".csv": Dataset.to_csv,
    ".jsonl": partial(Dataset.to_json, force_ascii=False),
    ".parquet": Dataset.to_parquet,
}


@checked_call
def predict(
    source: Path, texts: Sequence[str], out: Path | None, *, base: str | None, batch_size: Count, max_new_tokens: Count
) -> None:
    """Print the answers to ``texts``, or write them to ``out``; see ``dynrank predict --help``."""
    if out is not None and (out.suffix not in _WRITERS or out.exists()):
        raise ConfigurationError(f"--out must be a new file that ends in one of {[*_WRITERS]}, got {str(out)!r}")
    # Only answers go to the standard output.
    with redirect_stdout(sys.stderr):
        adapter = read_adapter(source)
        learned = read_inputs(source)
        classifies = class_of_base(adapter).__name__.endswith("ForSequenceClassification")
        form = learned.form or ("classification" if classifies else "completion")
        rows = _rows(texts, form, learned)
        origin, settings = base_of(adapter, base)
        tokenizer = load_tokenizer(tokenizer_source(source, origin), "--model", settings)
        asked = rows[COLUMNS[form][0]][:]
        if form == "chat":
            asked = [_chat_ids(tokenizer, messages, learned.system) for messages in asked]
        elif not classifies:
            asked = open_ids(tokenizer, asked)
        model: Any = on_base(adapter, base).eval()
        # The one output of a reward model is a number, and so are all of a regression.
        kinds = (None, "single_label_classification")
        other = model.config.problem_type not in kinds or model.config.num_labels == 1
        if other if classifies else model.config.is_encoder_decoder or not model.can_generate():
            raise ConfigurationError(
                f"{str(source)!r} adapts a {type(model).__name__}{' whose outputs are not one class' * classifies}; "
                "dynrank predict asks classifiers and causal language models; ask others by PEFT"
            )
        set_padding(model, tokenizer.pad_token_id)
        # Batches of texts with similar lengths need less padding, and the longest tell first whether there is memory.
        order = sorted(range(len(asked)), key=lambda i: -len(asked[i]))
        asked = [asked[i] for i in order]
        if classifies:
            options: Any = {"top_k": None, "truncation": True, "return_token_type_ids": False}
            pipe = pipeline("text-classification", model=model, tokenizer=tokenizer, **options)
            # Only of a generator, the pipeline gives each answer when it is known.
            made = pipe((text for text in asked), batch_size=batch_size, max_length=learned.max_length)
        else:
            end = end_of_turn_of(tokenizer) if form == "chat" else None
            made = _written(model, tokenizer, asked, max_new_tokens, batch_size, end)
        bar = tqdm(made, total=len(order), unit=" rows", disable=None)
        answers = [answer for _, answer in sorted(zip(order, bar, strict=True), key=lambda pair: pair[0])]
    if out is None:
        for answer in answers:
            shown = [f"{one_line(pair['label'])} {pair['score']:.4f}" for pair in answer[:3] if classifies]
            print("\t".join(shown) if classifies else one_line(answer))
        return
    columns = {"answer": answers}
    if classifies:
        best = [answer[0] for answer in answers]
        columns = {"label": [pair["label"] for pair in best], "probability": [pair["score"] for pair in best]}
    with new_file(out) as file:
        _WRITERS[out.suffix](Dataset.from_dict({"row": rows["place"][:], **columns}), file)


def _rows(texts: Sequence[str], form: Form, learned: Inputs) -> Dataset:
    """The rows of the file that is named, otherwise the texts, or those in the lines of another file."""
    places = [*filter(exists, texts)]
    if places and not (len(texts) == 1 and isfile(texts[0])):
        raise ConfigurationError(f"TEXT must be texts, or one file, got {places[0]!r} of {len(texts)}")
    if old := learned.columns.keys() - COLUMNS[form]:
        raise ConfigurationError(f"{INPUTS_FILE} must name columns of {COLUMNS[form]}, got {[*old]}; join them in it")
    ours = COLUMNS[form][0]
    names = {}
    # Also a misspelt name of a file.
    if len(texts) == 1 and Path(texts[0]).suffix.lower() in ({*KINDS} - {".txt"} if places else KINDS):
        raw = read_source(texts[0], "FILE", "test")
        names = {ours: learned.columns.get(ours)}
    else:
        where = f"FILE={texts[0]}" if places else "TEXT"
        if places:
            with reading(where):
                texts = Path(texts[0]).read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
        cells: Any = [[{"role": "user", "content": text}] for text in texts] if form == "chat" else [*texts]
        raw = RawRows(where, Dataset.from_dict({ours: cells}))
    found = find_columns(raw.rows.column_names, names, form, raw.where, asked=True)
    return usable_rows(raw, found, asked=True)[0]


def _chat_ids(tokenizer: Any, messages: Sequence[Any], system: str | None) -> Any:
    """The tokens of a chat before an answer; ``system`` begins a chat that has no system prompt."""
    begins = system is None or messages[0]["role"] == "system"
    turns = messages if begins else [{"role": "system", "content": system}, *messages]
    return tokenizer(rendered(tokenizer, turns, asked=True), add_special_tokens=False)["input_ids"]


def _written(
    model: Any, tokenizer: Any, asked: Sequence[Sequence[int]], max_new_tokens: int, batch_size: int, end: str | None
) -> Iterator[str]:
    """What a causal language model writes greedily after the tokens of each prompt, the longest of which is first."""
    most = positions(model)
    # The last token of an answer is not read.
    if len(asked[0]) + max_new_tokens - 1 > most:
        raise ConfigurationError(
            f"the longest prompt, of {len(asked[0])} tokens, and --max-new-tokens={max_new_tokens} must fit into the "
            f"{most} positions of the model; shorten one of the two"
        )
    # A build of torch for GPUs names one also where there is none.
    model.to(torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu")
    for start in range(0, len(asked), batch_size):
        batch = {"input_ids": asked[start : start + batch_size]}
        inputs = tokenizer.pad(batch, padding_side="left", return_tensors="pt").to(model.device)
        yield from greedy_texts(model, tokenizer, **inputs, max_new_tokens=max_new_tokens, end_of_turn=end)
