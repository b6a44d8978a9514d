"""Embeddings whose rows are the tokens of a transformers model, and tokens that were added to them.

``resize_token_embeddings`` gives added tokens rows that are in no file of the base, and draws them anew in each
program. So these rows belong to an adapter, and to a checkpoint without its base, also if they were not trained. PEFT
stores them for the same reason (``save_embedding_layers``).
"""

import warnings
from pathlib import Path
from typing import Any

from torch import nn

from dynrank.layers.compiled import uncompiled
from dynrank.layers.foreign import store_on, stored_on
from dynrank.private import source_of

# The key of the record on a model whose files were known when it was loaded.
_TOKENS = "tokens"


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


def extended_embeddings(model: nn.Module) -> list[nn.Module]:
    """The :func:`token_embeddings` in ``model`` of models that have more tokens than the files they were loaded from.

    Those of a model with fewer tokens have no row that the files lack. ``model`` may be one of transformers, or contain
    such models. Where the files are not on this machine, a warning says that the embeddings are taken for unchanged.
    """
    found: dict[int, nn.Module] = {}
    # A model and the model inside it, without its head, have one config.
    extended: dict[int, bool] = {}
    for part in model.modules():
        embeddings = token_embeddings(part)
        if embeddings:
            config = id(part.config)
            if config not in extended:
                extended[config] = _has_added_tokens(part)
            found |= {id(module): module for module in embeddings if extended[config]}
    return [*found.values()]


def extended_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of :func:`extended_embeddings`."""
    return [parameter for module in extended_embeddings(model) for parameter in module.parameters()]


def remember_tokens(model: Any) -> None:
    """Record the number of tokens that the files of ``model`` have, which was just loaded from them."""
    store_on(model, _TOKENS, _tokens(model.config))


def _has_added_tokens(model: Any) -> bool:
    known = stored_on(model, _TOKENS)
    if known is not None:
        return bool(_tokens(model.config) > known)
    source = source_of(model)
    # A GGUF file is no config, and too long to read as one.
    if not source or Path(source).is_file():
        return False
    try:
        files = type(model.config).from_pretrained(source, revision=stored_on(model, "revision"), local_files_only=True)
    except (OSError, ValueError):
        warnings.warn(
            f"the base {source!r} is no folder with a config, and not in the hub's cache (HF_HOME), so its embeddings "
            "are taken for unchanged; if tokens were added, load it from a folder, or train them (modules_to_save)",
            stacklevel=4,
        )
        return False
    return _tokens(model.config) > _tokens(files)


def _tokens(config: Any) -> int:
    """The number of tokens of a model; 0 if it has none, or several models of texts."""
    try:
        return getattr(config.get_text_config(), "vocab_size", None) or 0
    except ValueError:
        return 0
