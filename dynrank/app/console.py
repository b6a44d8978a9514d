"""What the commands print beside tables: facts, texts of users, and silence of libraries."""

import logging
from collections.abc import Mapping


def print_facts(facts: Mapping[str, object]) -> None:
    """Print one line per fact: its name, then its value."""
    width = max([16, *map(len, facts)])
    for name, fact in facts.items():
        print(f"{name:<{width}} {fact}", flush=True)


def one_line(text: str) -> str:
    r"""``text`` with line breaks, terminal codes and other invisible characters escaped.

    >>> print(one_line("a\nb"))
    a\nb
    """
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def quiet_imports() -> None:
    """Silence libraries that log messages while they are imported."""
    # torch.utils._pytree warns about torchao's classes.
    for name in ("matplotlib", "bitsandbytes", "torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


def quiet_loading() -> None:
    """Silence transformers while it loads a model; its warning of a new head is wrong, as the adapter has the head."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
