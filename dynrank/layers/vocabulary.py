"""Embeddings whose rows are the tokens of a transformers model, and tokens that were added to them.

``resize_token_embeddings`` gives added tokens rows that are in no file of the base, and draws them anew in each
program. So these rows belong to an adapter, and to a checkpoint without its base, also if they were not trained. PEFT
stores them for the same reason (``save_embedding_layers``).
"""

from pathlib import Path
from typing import Any

from torch import nn

from dynrank.layers.compiled import uncompiled
from dynrank.layers.foreign import stored_on
from dynrank.private import source_of


def token_embeddings(model: Any) -> list[nn.Module]:
    """The input embedding of ``model`` and its output layer, or what stands in their places; none if it has no tokens.

    ``model`` is a model of transformers, or PEFT's around it; others have none.
    """
    if not hasattr(model, "resize_token_embeddings"):
        return []
    try:
        found = [model.get_input_embeddings(), model.get_output_embeddings()]
    # Models without tokens, such as those of images, raise one of these.
    except (AttributeError, NotImplementedError):
        return []
    return [uncompiled(module) for module in found if isinstance(module, nn.Module)]


def resized_embeddings(model: Any) -> list[nn.Module]:
    """The :func:`token_embeddings` of ``model`` if it has another number of tokens than the files it was loaded from.

    Without these files on this machine nothing is known of their tokens, and none are said to be resized.
    """
    found = token_embeddings(model)
    source = source_of(model)
    # A GGUF file is no config, and too long to read as one.
    if not found or not source or Path(source).is_file():
        return []
    try:
        files = type(model.config).from_pretrained(source, revision=stored_on(model, "revision"), local_files_only=True)
        return found if _size(files) != _size(model.config) else []
    # A config of several texts' models raises the second.
    except (OSError, ValueError):
        return []


def _size(config: Any) -> int | None:
    """The number of tokens of a model; None: it has none."""
    return getattr(config.get_text_config(), "vocab_size", None)
