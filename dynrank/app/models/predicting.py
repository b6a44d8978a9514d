"""A stored adapter on its base model as a pipeline of transformers, which answers texts."""

from math import inf
from typing import Any

from transformers import TextGenerationPipeline, pipeline

from dynrank.adapters.read import Adapter
from dynrank.app.models.base_model import on_base
from dynrank.app.models.generating import answer_text, closing_tokens, end_tokens, plain_config
from dynrank.app.models.pretrained import positions, set_padding
from dynrank.errors import ConfigurationError, shown


class _Writer(TextGenerationPipeline):  # type: ignore[misc]
    """The pipeline that also takes encoder-decoders, asks as training did, and keeps the blanks around an answer."""

    is_turn: bool
    closing: int
    longest: float

    def check_model_type(self, supported_models: Any) -> None:
        """All models that generate are supported."""

    def preprocess(self, prompt_text: Any, **options: Any) -> dict[str, Any]:
        made = super().preprocess(prompt_text, **options)
        length = made["input_ids"].shape[1] - self.closing
        if length > self.longest:
            raise ConfigurationError(
                f"a prompt must leave the model positions for --max-new-tokens, so it may have {self.longest} tokens, "
                f"got {length}: {shown(prompt_text)}"
            )
        return {name: value if name == "prompt_text" else value[:, :length] for name, value in made.items()}

    def postprocess(self, model_outputs: Any, **options: Any) -> str:
        # Only a decoder repeats the prompt.
        start = 0 if self.model.config.is_encoder_decoder else model_outputs["input_ids"].shape[-1]
        ids = model_outputs["generated_sequence"][0, 0].tolist()
        return answer_text(self.tokenizer, ids, start, is_turn=self.is_turn)


def answering(
    adapter: Adapter, base: str | None, tokenizer: Any, *, max_length: int | None, max_new_tokens: int, turn: str | None
) -> Any:
    """The pipeline of the adapter's model: one for text-classification, with all labels, or one that writes greedily.

    Args:
        adapter: the adapter.
        base: name of the base model; None: as the adapter names it.
        tokenizer: the tokenizer of the texts.
        max_length: number of tokens after which a classifier's text is cut; None: as many as the model reads.
        max_new_tokens: largest number of tokens to generate for a text.
        turn: of texts that are chats, the token that ends an answer, or "" if none does; None: they are no chats.
    """
    model: Any = on_base(adapter, base).eval()
    set_padding(model, tokenizer.pad_token_id)
    most = positions(model)
    several = model.config.problem_type == "multi_label_classification"
    # The one output of a reward model is a number, and so are all of a regression: they are no classes.
    numbers = model.config.problem_type == "regression" or (model.config.num_labels == 1 and not several)
    if type(model).__name__.endswith("ForSequenceClassification") and not numbers:
        cut = int(min(max_length or tokenizer.model_max_length, most)) if most < inf else max_length
        options: Any = {"top_k": None, "truncation": True, "max_length": cut, "return_token_type_ids": False}
        return pipeline("text-classification", model=model, tokenizer=tokenizer, **options)
    if not model.can_generate():
        raise ConfigurationError(
            f"{adapter.source!r} must adapt a classifier or a model that generates text, got a {type(model).__name__} "
            f"with {model.config.num_labels} outputs{' of numbers' * numbers}"
        )
    is_read = model.config.is_encoder_decoder
    # The last token of an answer is not read; an encoder reads the prompt alone.
    longest = most - (0 if is_read else max_new_tokens - 1)
    if longest < 1:
        raise ConfigurationError(
            f"--max-new-tokens must be at most {most}, which the model reads, got {max_new_tokens}"
        )
    options = {"do_sample": False, "max_new_tokens": max_new_tokens, "add_special_tokens": turn is None}
    options["eos_token_id"] = end_tokens(model, tokenizer, turn or None)
    model.generation_config = plain_config(model)
    writer: Any = pipeline("text-generation", model=model, tokenizer=tokenizer, pipeline_class=_Writer, **options)
    # The pipeline pads on the left, where an encoder begins to count positions.
    if is_read:
        tokenizer.padding_side = "right"
    # An answer goes on after a decoder's prompt. What an encoder reads ends as its tokenizer ends it.
    writer.closing = 0 if is_read or turn is not None else closing_tokens(tokenizer)
    writer.is_turn = turn is not None
    writer.longest = longest
    return writer
