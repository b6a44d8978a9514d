"""A stored adapter in a form for a server that may not read rank_pattern and alpha_pattern."""

import json
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel
from torch import Tensor

from dynrank.adapters.export_gguf import gguf_names, write_gguf
from dynrank.adapters.folder import adapter_folder
from dynrank.adapters.load import misfit
from dynrank.adapters.modelfile import modelfile
from dynrank.adapters.precision import FLOAT8, MOST_POWER, Rounding, balanced, check_file_dtype, power_of
from dynrank.adapters.read import Adapter, is_parameter, open_adapter
from dynrank.adapters.sidecar_files import new_adapter_folder, read_inputs
from dynrank.adapters.stored import Factors, StoredLayer, read_json, refuse_faults
from dynrank.adapters.write import rewrite_adapter
from dynrank.errors import ConfigurationError, Count, checked_call, train_packages
from dynrank.layers.finding import modules_by_name
from dynrank.linalg import finite
from dynrank.output.output_folder import check_free, new_file, whole_or_nothing
from dynrank.output.slots import slot_rank

Server = Literal["vllm", "gguf", "ollama", "padded"]
# For each server: its name, and the heads that it reads from modules_to_save.
_READERS: Mapping[Server, tuple[str, tuple[str, ...]]] = {
    "vllm": ("vLLM", ("score", "classifier")),
    "gguf": ("llama.cpp", ()),
    "ollama": ("Ollama", ()),
    "padded": ("a server of one rank", ()),
}


@dataclass(frozen=True)
class Exported:
    """The result of an export.

    Attributes:
        out: the written folder, or GGUF file.
        layers: {name: layer of the adapter}.
        rank: rank that the server reserves for every layer; None if each layer has its own.
        bytes: size of the written files.
        line: shell command that serves the adapter.
        rounding: what was lost to the dtype that was asked for; None if none was.
    """

    out: Path
    layers: dict[str, StoredLayer] = field(repr=False)
    rank: int | None
    bytes: int
    line: str
    rounding: Rounding | None


@checked_call
def export_adapter(
    source: str | Path,
    out: str | Path,
    *,
    to: Server,
    model: str | None = None,
    multiple: Count = 1,
    dtype: torch.dtype | None = None,
) -> Exported:
    """Write the adapter in ``source`` to ``out`` so that a server computes the same function as PEFT.

    An adapter that the server would read only in part or wrongly is refused. ``out`` is written whole or not at all.

    Args:
        source: folder of a PEFT LoRA adapter, or of the run that made it.
        out: new or empty folder; for "gguf" a file that does not exist.
        to: "vllm" writes PEFT's files at each layer's own rank, with one scaling for all, which every version of vLLM
            reads correctly; "gguf" writes one file for llama.cpp and programs built on it; "ollama" writes a folder
            with this file and a Modelfile; "padded" writes PEFT's files with one rank and one scaling for all, for
            SGLang, TGI and LoRAX.
        model: folder, GGUF file or hub name of the base; None: as the adapter names it.
        multiple: the rank of "padded" is rounded up to a multiple of it.
        dtype: dtype of the factors and heads: torch.float32, torch.bfloat16 or, only for "vllm", torch.float8_e4m3fn;
            None: as stored, but float8 becomes bfloat16, which every server reads; a GGUF file is in float32.

    Returns:
        What was written, and how it is served.

    Raises:
        ConfigurationError: if the adapter or an option cannot be used, the server cannot read such an adapter, or
            ``out`` is not free or cannot be written.

    >>> import tempfile, torch, dynrank
    >>> model = dynrank.add_lora(torch.nn.Sequential(torch.nn.Linear(8, 8)), rank=3)
    >>> folder = tempfile.mkdtemp()
    >>> dynrank.save_adapter(model, f"{folder}/adapter")
    >>> _ = export_adapter(f"{folder}/adapter", f"{folder}/padded", to="padded", multiple=4)
    >>> dynrank.inspect(f"{folder}/padded")[0].rank
    4
    """
    source = adapter_folder(Path(source))
    out = Path(out)
    if multiple > 1 and to != "padded":
        raise ConfigurationError(
            f'multiple goes with to="padded", got multiple={multiple} and to={to!r}', "multiple", "to"
        )
    check_file_dtype(dtype)
    if dtype == FLOAT8 and to != "vllm":
        raise ConfigurationError(
            f"dtype must be torch.float32 or torch.bfloat16 with to={to!r}, got {dtype}: only vLLM and PEFT read it",
            "dtype",
        )
    with open_adapter(source) as adapter:
        # PEFT also stores the unchanged base weight of an embedding that has LoRA; a server has it already.
        others = {
            name: key
            for name, key in adapter.others.items()
            if name.rpartition(".")[0].removesuffix(".base_layer") not in adapter.layers
        }
        _refuse_misread(to, adapter, others)
        revision = None if model else adapter.config.revision or None
        base = str(model or adapter.config.base_model_name_or_path or "")
        if to == "vllm" and base:
            _refuse_part(adapter, base, revision)
        if to in ("gguf", "ollama"):
            return _to_llama_cpp(adapter, out, base_name(adapter, model), dtype, ollama=to == "ollama")
        if dtype is None and adapter.float8:
            dtype = torch.bfloat16
        rank = max(layer.rank for layer in adapter.layers.values())
        factors = _one_scaling(adapter)
        name, place, base = (shlex.quote(text) for text in (out.absolute().name, str(out), base or "BASE"))
        base += f" --revision {shlex.quote(revision)}" if revision else ""
        if to == "vllm":
            rank = slot_rank(rank)
            modules = f"{name}={place}"
            if any(layer.experts > 1 for layer in adapter.layers.values()):
                request = {"name": out.absolute().name, "path": str(out), "is_3d_lora_weight": True}
                modules = f"{shlex.quote(json.dumps(request))} --enable-mixed-moe-lora-format"
            line = f"vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules {modules}"
        else:
            rank += -rank % multiple
            factors = {layer: _padded(*own, rank) for layer, own in factors.items()}
            line = f"python -m sglang.launch_server --model-path {base} --enable-lora --lora-paths {name}={place}"
        # SGLang does not accept a regular expression in target_modules.
        targets = [name for name in adapter.layers if not is_parameter(name, adapter.config)]
        listed = adapter.config.model_copy(update={"target_modules": targets})
        with new_adapter_folder(out, source) as folder:
            power = _power(factors, adapter) if dtype == FLOAT8 else None
            lost = rewrite_adapter(folder, replace(adapter, config=listed, others=others), factors, dtype, power)
        size = sum(file.stat().st_size for file in out.iterdir())
        return Exported(out, dict(adapter.layers), rank, size, line, lost)


def base_name(adapter: Adapter, given: str | None) -> str:
    """Folder, GGUF file or hub name of the base model: ``given`` by the user, or named by the adapter."""
    base = given or adapter.config.base_model_name_or_path
    if not isinstance(base, str) or not base:
        raise ConfigurationError(f"the adapter {adapter.source!r} names no base model; give model", "model")
    return base


def _config_of(base: str) -> Any:
    """The config of a model; no code of its folder is run."""
    # Only llama.cpp's file needs it, so other exports need no transformers.
    with train_packages("an export to llama.cpp"):
        from transformers import AutoConfig

    file = Path(base)
    place, options = (str(file.parent), {"gguf_file": file.name}) if base.endswith(".gguf") else (base, {})
    try:
        return AutoConfig.from_pretrained(place, trust_remote_code=False, **options)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        what = f"transformers cannot read the config of {base!r}: {' '.join(str(error).split()):.500}"
        raise ConfigurationError(f"{what}; give another model", "model") from error


def _misfits(config: Any, adapter: Adapter) -> list[str]:
    """What does not fit between the layers of ``adapter`` and those of a model with ``config``."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    modules = modules_by_name(model)
    # A model of another class, such as a classifier, may have other names.
    found = (misfit(name, modules[name], layer) for name, layer in adapter.layers.items() if name in modules)
    return [fault for fault in found if fault is not None]


def _refuse_misread(to: Server, adapter: Adapter, others: Iterable[str]) -> None:
    """Refuse an adapter that a server would read only in part or wrongly; ``others`` are parameters stored whole."""
    server, whole = _READERS[to]
    modules = dict.fromkeys(name.rpartition(".")[0] for name in others)
    faults = [f"{name!r} is stored whole" for name in modules if name.rpartition(".")[2] not in whole]
    bare = [name for name in adapter.layers if is_parameter(name, adapter.config)]
    if to == "vllm":
        # vLLM requires LoRA in both stacks of experts. It treats a router as a layer.
        owners = Counter(name.rpartition(".")[0] for name in bare)
        bare = [n for n in bare if owners[n.rpartition(".")[0]] == 1 and not n.endswith(".weight")]
    faults += [f"{name!r} is a parameter of experts or of a router" for name in bare]
    faults += [f"{name!r} is a convolution" for name, layer in adapter.layers.items() if layer.kernel]
    refuse_faults(f"{server} cannot read this adapter", faults, "to", advice="\nmerge it instead: dynrank merge")


class _BaseConfig(BaseModel):
    """What a model's config.json says of its parts."""

    architectures: list[str] | None = None
    text_config: dict[str, Any] | None = None


def _refuse_part(adapter: Adapter, base: str, revision: str | None) -> None:
    """Refuse an adapter of the language model alone, if that is a part of ``base``, where its layers have other names.

    vLLM serves the whole base, and leaves out such an adapter without a word (its issues 34186 and 48019). Nothing is
    known of a base that is not on this machine.
    """
    file = _config_file(base, revision)
    config = _BaseConfig() if file is None else read_json(_BaseConfig, file)
    if config.text_config and any(name.startswith("model.layers.") for name in adapter.layers):
        raise ConfigurationError(
            f"vLLM serves {base!r} as {', '.join(config.architectures or ['a whole'])}, whose language model is a part "
            "with other names, and would leave out all layers of this adapter\nmerge it instead: dynrank merge",
            "to",
        )


def _config_file(base: str, revision: str | None) -> Path | None:
    """The config.json of a base that is on this machine, in a folder or, at a ``revision``, in the hub's cache."""
    file = Path(base, "config.json")
    if file.is_file():
        return file
    try:
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(base, "config.json", revision=revision)
    # Without the package there is no cache; and a path is no name on the hub.
    except (ImportError, ValueError):
        return None
    return Path(cached) if isinstance(cached, str) else None


def _one_scaling(adapter: Adapter) -> dict[str, Factors]:
    """The same updates, all with the smallest scaling, so that no number of lora_B underflows in half precision.

    A program that reads only the global ``lora_alpha / r`` gets this scaling, and so does one that reads patterns.
    """
    scaling = min((layer.scaling for layer in adapter.layers.values() if layer.scaling), key=abs, default=1.0)
    found = {}
    for name, layer in adapter.layers.items():
        lora_B, lora_A = adapter.factors(name)
        lora_B = lora_B * (layer.scaling / scaling)
        found[name] = lora_A, lora_B, scaling
        if not finite(lora_B):
            raise ConfigurationError(
                f"{name!r} is too large for {lora_B.dtype} with the scaling of all layers, {scaling}"
            )
    return found


def _power(factors: Mapping[str, Factors], adapter: Adapter) -> int:
    """The exponent for all layers, which keep one scaling, with which their factors fit float8."""
    powers = (
        power_of(*balanced(lora_B, lora_A, adapter.layers[name].experts))
        for name, (lora_A, lora_B, _) in factors.items()
    )
    # The largest number of all is put 8 times higher than that of a layer with its own exponent, but below 448.
    return min(min(powers) + 3, MOST_POWER)


def _padded(lora_A: Tensor, lora_B: Tensor, scaling: float, rank: int) -> Factors:
    """The same update at ``rank``: a program that divides alpha by the rows of each tensor needs one rank for all."""
    missing = rank - len(lora_A)
    return F.pad(lora_A, (0, 0, 0, missing)), F.pad(lora_B, (0, missing)), scaling


def _to_llama_cpp(adapter: Adapter, out: Path, origin: str, dtype: torch.dtype | None, *, ollama: bool) -> Exported:
    """A GGUF file for the base at ``origin``; or a folder with it and a Modelfile, for ``ollama create``."""
    # Names are of Ollama's own registry, not of the hub.
    if ollama and (not Path(origin).exists() or origin.endswith(".json")):
        raise ConfigurationError(
            f"Ollama needs the base as a folder or a GGUF file, got {origin!r}; download it, and give its folder",
            "model",
        )
    config = _config_of(origin)
    names = gguf_names(config, adapter.layers)
    faults = _misfits(config, adapter)
    refuse_faults(f"the adapter {adapter.source!r} was not trained on {origin!r}", faults, "model")
    if not ollama:
        with new_file(out) as part:
            lost = write_gguf(part, adapter, config, names, dtype)
        base = origin if origin.endswith(".gguf") else f"{Path(origin).name}.gguf"
        line = f"llama-server -m {shlex.quote(base)} --lora {shlex.quote(str(out))}"
        return Exported(out, dict(adapter.layers), None, out.stat().st_size, line, lost)
    source = Path(adapter.source)
    text = modelfile(origin, read_inputs(source))
    check_free(out, source)
    with whole_or_nothing(out) as folder:
        lost = write_gguf(folder / "adapter.gguf", adapter, config, names, dtype)
        (folder / "Modelfile").write_text(text, encoding="utf-8")
    name = shlex.quote(out.absolute().name)
    size = sum(file.stat().st_size for file in out.iterdir())
    line = f"ollama create {name} -f {shlex.quote(str(out / 'Modelfile'))} && ollama run {name}"
    return Exported(out, dict(adapter.layers), None, size, line, lost)
