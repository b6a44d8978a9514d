"""The options of a command that say by which examples gates are watched."""

from __future__ import annotations

from dataclasses import dataclass

from dynrank.errors import ConfigurationError

__all__ = ["Examples", "examples_given"]


@dataclass(frozen=True)
class Examples:
    """Where the gates of an adapter are watched.

    Attributes:
        data: file of rows of a text and a label, or of what a language model learns: messages, a prompt and an answer,
            or a text.
        model: name of the model that the adapter was trained on; None: as the adapter names it.
    """

    data: str
    model: str | None = None


def examples_given(gates: bool, model: str | None, data: str | None) -> Examples | None:
    """Those that the options of a command name; None without ``--gates``.

    Raises:
        ConfigurationError: if they do not go together.
    """
    if not gates and (model or data):
        raise ConfigurationError(f"--model and --data go with --gates, got {model or data!r} without it")
    if not gates:
        return None
    if not data:
        raise ConfigurationError("--gates needs --data FILE, whose examples say what the loss needs")
    return Examples(data, model)
