"""``dynrank predict``: answers to texts, by a stored adapter on its base model."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from dynrank.adapters.base import base_source, on_base
from dynrank.adapters.read import Adapter, read_adapter
from dynrank.adapters.sidecar_files import tokenizer_source
from dynrank.adapters.stored import readable
from dynrank.errors import ConfigurationError
from dynrank.models.pretrained import load_tokenizer
from dynrank.output.console import one_line

# How many labels are shown for each text.
SHOWN = 3
_TABLES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")


def texts_of(arguments: Sequence[str]) -> Sequence[str]:
    """The texts of a command line: its arguments, or the lines of the file that is the only argument."""
    texts = arguments
    if len(arguments) == 1 and _is_file(arguments[0]):
        file = Path(arguments[0])
        if file.suffix in _TABLES:
            raise ConfigurationError(f"FILE must be plain text with a text in each line, got {str(file)!r}")
        with readable(f"FILE {str(file)!r}"):
            texts = file.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    empty = [number for number, text in enumerate(texts, start=1) if not text.strip()]
    if empty:
        raise ConfigurationError(f"TEXT must not be empty, number {empty[0]} is")
    return texts


def _is_file(text: str) -> bool:
    """Whether a text is a file, or a misspelt name of one."""
    named = len(text.split()) == 1 and Path(text).suffix in (".txt", *_TABLES)
    # The system refuses to look up longer names.
    return named or (len(text) < 1000 and Path(text).is_file())


def answers(
    source: Path, texts: Sequence[str], base: str | None, *, batch_size: int, max_new_tokens: int, chat: bool
) -> Iterator[str]:
    """A line for each text: the most likely labels with their probabilities, or the text that the model generates.

    With ``chat`` each text is put into the tokenizer's chat template, as a user's first turn.
    """
    model, tokenizer_at = answering(read_adapter(source), base)
    tokenizer = load_tokenizer(tokenizer_at, "--model")
    # Decoders classify by the last token that is not padding.
    model.config.pad_token_id = tokenizer.pad_token_id
    writes = model.can_generate()
    if chat and not (writes and tokenizer.chat_template):
        raise ConfigurationError("--chat needs a model that generates text, and a tokenizer with a chat template")
    for start in range(0, len(texts), batch_size):
        batch = texts[start : start + batch_size]
        yield from (
            _written(model, tokenizer, batch, max_new_tokens, chat) if writes else _labelled(model, tokenizer, batch)
        )


def answering(adapter: Adapter, base: str | None) -> tuple[Any, str]:
    """(the base model with ``adapter``, ready to answer; the folder or name of its tokenizer).

    ``base`` is the name of the base model; None: as the adapter names it. A tokenizer and label names in the adapter's
    folder have precedence over the base's.
    """
    origin = base_source(adapter, base)
    model = on_base(adapter, origin).eval()
    if not model.can_generate() and not type(model).__name__.endswith("ForSequenceClassification"):
        raise ConfigurationError(
            f"{adapter.source!r} must adapt a classifier or a model that generates text, got a {type(model).__name__}"
        )
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer_source(Path(adapter.source), origin)


@torch.no_grad()
def _labelled(model: Any, tokenizer: Any, texts: Sequence[str]) -> Iterator[str]:
    inputs = tokenizer([*texts], padding=True, truncation=True, return_tensors="pt").to(model.device)
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits.float()
    several = model.config.problem_type == "multi_label_classification"
    for row in logits.sigmoid() if several else logits.softmax(-1):
        values, indices = row.topk(min(SHOWN, len(row)))
        pairs = zip(indices.tolist(), values.tolist(), strict=True)
        yield "\t".join(f"{one_line(model.config.id2label[index])} {value:.4f}" for index, value in pairs)


@torch.no_grad()
def _written(model: Any, tokenizer: Any, texts: Sequence[str], max_new_tokens: int, chat: bool) -> Iterator[str]:
    tokenizer.padding_side = "left"
    prompts = [*texts]
    if chat:
        turns = [[{"role": "user", "content": text}] for text in texts]
        prompts = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(prompts, padding=True, return_tensors="pt", add_special_tokens=not chat).to(model.device)
    made = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    for text in tokenizer.batch_decode(made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True):
        yield one_line(text.strip())
