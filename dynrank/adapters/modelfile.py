"""The Modelfile of an adapter, by which Ollama serves it."""

from dynrank.adapters.sidecar_files import INPUTS_FILE, Inputs
from dynrank.errors import ConfigurationError, shown


def modelfile(base: str, inputs: Inputs) -> str:
    """The text of a Modelfile for ``base`` with an adapter in the file adapter.gguf beside it.

    A chat has the template of the base, which Ollama finds itself, and the system prompt that training learned. An
    adapter that learned answers to plain prompts must get these without a template.
    """
    lines = [f"FROM {base}", "ADAPTER ./adapter.gguf"]
    if inputs.form in ("completion", "text"):
        lines.append(f"TEMPLATE {_quoted('{{ .Prompt }}')}")
    if inputs.system is not None:
        lines.append(f"SYSTEM {_quoted(inputs.system)}")
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """A value of several lines, which Ollama ends at the next three quotes at the end of a line."""
    # Ollama drops characters that cannot be printed.
    strange = [char for char in text if not char.isprintable() and char not in "\n\r\t"]
    if strange or '"""' in text:
        what = f"characters that cannot be printed, {strange[:5]}" if strange else "three quotes"
        raise ConfigurationError(
            f"a Modelfile cannot hold a system prompt with {what}, got {shown(text)}; change it in {INPUTS_FILE}"
        )
    return f'"""{text}"""'
