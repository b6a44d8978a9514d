"""Answers of a classifier, and of a causal language model, to many texts."""

from collections.abc import Iterator, Sequence
from math import inf
from typing import Any

import torch
from transformers import pipeline

from dynrank.app.models.generating import closing_tokens, greedy_texts
from dynrank.app.models.pretrained import positions
from dynrank.errors import ConfigurationError


def classified(model: Any, tokenizer: Any, texts: Sequence[str], max_length: int | None, batch_size: int) -> Any:
    """The labels of each text, the most probable first, as the pipeline of transformers gives them.

    A text is cut after ``max_length`` tokens; None: after as many as the model reads.
    """
    most = positions(model)
    cut = int(min(max_length or tokenizer.model_max_length, most)) if most < inf else max_length
    options: Any = {"top_k": None, "truncation": True, "max_length": cut, "return_token_type_ids": False}
    pipe = pipeline("text-classification", model=model, tokenizer=tokenizer, **options)
    # Only of a generator, the pipeline gives each answer when it is known.
    return pipe((text for text in texts), batch_size=batch_size)


def written(
    model: Any, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int, batch_size: int, turn: str | None
) -> Iterator[str]:
    """What a causal language model writes greedily after each prompt.

    ``turn`` is for prompts that are chats: the token that ends an answer, or "" if none does; None: they are no chats.

    Raises:
        ConfigurationError: if the longest prompt leaves the model no positions for an answer.
    """
    is_turn = turn is not None
    asked = tokenizer([*prompts], add_special_tokens=not is_turn)["input_ids"]
    closing = 0 if is_turn else closing_tokens(tokenizer)
    asked = [ids[: len(ids) - closing] for ids in asked]
    longest = max(map(len, asked))
    most = positions(model)
    # The last token of an answer is not read.
    if longest + max_new_tokens - 1 > most:
        raise ConfigurationError(
            f"the longest prompt, of {longest} tokens, and --max-new-tokens={max_new_tokens} must fit into the {most} "
            "positions of the model; shorten one of the two"
        )
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    model.to(device)
    for start in range(0, len(asked), batch_size):
        batch = {"input_ids": asked[start : start + batch_size]}
        inputs = tokenizer.pad(batch, padding_side="left", return_tensors="pt").to(device)
        yield from greedy_texts(
            model,
            tokenizer,
            inputs["input_ids"],
            inputs["attention_mask"],
            max_new_tokens,
            end_of_turn=turn or None,
            is_turn=is_turn,
        )
