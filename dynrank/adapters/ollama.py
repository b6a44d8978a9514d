"""The Modelfile from which Ollama makes a model of a base and an adapter.

Each line is an instruction and its value. A value between three quotes may have several lines. Ollama ends it at the
next three quotes at the end of a line, and drops characters that cannot be printed.
"""

from pathlib import Path

from dynrank.adapters.sidecar_files import INPUTS_FILE, Inputs
from dynrank.errors import ConfigurationError, shown


def base_of_ollama(origin: str) -> str:
    """The base of an adapter, after a check that Ollama can read it: names are of its own registry, not of the hub."""
    if not Path(origin).exists() or origin.endswith(".json"):
        raise ConfigurationError(
            f"Ollama needs the base as a folder or a GGUF file, got {origin!r}; hf download it with --local-dir DIR, "
            "and give --model DIR"
        )
    return origin


def modelfile(base: str, inputs: Inputs, adapter: str | None = "./adapter.gguf") -> str:
    """The text of a Modelfile for ``base`` with a GGUF file of an adapter (None: merged into it already).

    A chat has the template of the base, which Ollama finds itself, and the system prompt that training learned. An
    adapter that learned answers to plain prompts must get these without a template.
    """
    lines = [f"FROM {base}"]
    if adapter is not None:
        lines.append(f"ADAPTER {adapter}")
    if inputs.form in ("completion", "text"):
        lines.append(f"TEMPLATE {_quoted('{{ .Prompt }}')}")
    if inputs.system is not None:
        lines.append(f"SYSTEM {_quoted(inputs.system)}")
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    strange = [char for char in text if not char.isprintable() and char not in "\n\r\t"]
    if strange or '"""' in text:
        what = f"characters that cannot be printed, {strange[:5]}" if strange else "three quotes"
        raise ConfigurationError(
            f"a Modelfile cannot hold a system prompt with {what}, got {shown(text)}; change it in {INPUTS_FILE}"
        )
    return f'"""{text}"""'
