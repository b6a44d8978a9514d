"""The folder for Ollama: its Modelfile says the same to a parser of the documented grammar; the GGUF is llama.cpp's.

Ollama itself is no Python package, so no test runs it.
"""

import json
import re
import shutil

import pytest
import transformers as hf

import dynrank
from dynrank.adapters.sidecar_files import Inputs, modelfile, write_sidecar_files
from dynrank.errors import ConfigurationError

SIZES = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1}
SIZES |= {"num_attention_heads": 2}
INSTRUCTIONS = ("from", "license", "template", "system", "adapter", "parameter", "message")


def parsed(text):
    """[(instruction, value)] by the grammar: an instruction in each line, whose value may be in one or three quotes.

    As in Ollama, a value in quotes ends with the first line that ends with them, spaces around a value do not count,
    and characters that cannot be printed are dropped.
    """
    found = []
    lines = iter(re.split(r"(?<=[\n\r])", text))
    for line in lines:
        if not line.strip() or line.startswith("#"):
            continue
        name, value = line.split(maxsplit=1)
        assert name.lower() in INSTRUCTIONS
        quotes = next((quotes for quotes in ('"""', '"') if value.startswith(quotes)), "")
        while quotes and not (value.strip().endswith(quotes) and len(value.strip()) >= 2 * len(quotes)):
            value += next(lines)
        inner = value.strip()[len(quotes) : -len(quotes) or None]
        found.append((name.lower(), "".join(char for char in inner if char.isprintable() or char in "\n\r\t")))
    return found


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ollama")
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES))
    model.save_pretrained(folder / "base")
    model.config._name_or_path = str(folder / "base")
    dynrank.add_lora(model, rank=2, rank_map={"q_proj": 1})
    dynrank.save_adapter(model, folder / "adapter")
    write_sidecar_files(folder / "adapter", model, None, Inputs("chat", {}, "Be kind."))
    return folder / "adapter"


def test_the_folder_names_base_adapter_and_the_system_prompt_that_was_learned(adapter, launch, tmp_path):
    code, printed, said = launch("export", adapter, "--to", "ollama", "--out", tmp_path / "out")
    assert code == 0, said
    assert f"ollama create out -f {tmp_path / 'out' / 'Modelfile'} && ollama run out" in printed
    text = (tmp_path / "out" / "Modelfile").read_text()
    base = str((adapter.parent / "base").resolve())
    assert parsed(text) == [("from", base), ("adapter", "./adapter.gguf"), ("system", "Be kind.")]
    dynrank.export_adapter(adapter, tmp_path / "alone.gguf", to="gguf")
    assert (tmp_path / "out" / "adapter.gguf").read_bytes() == (tmp_path / "alone.gguf").read_bytes()
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"Modelfile", "adapter.gguf"}


def test_a_merged_model_has_a_modelfile_of_its_own_folder(adapter, launch, tmp_path):
    code, printed, said = launch("merge", adapter, "--out", tmp_path / "merged", "--ollama")
    assert code == 0, said
    assert f"ollama create merged -f {tmp_path / 'merged' / 'Modelfile'}" in printed
    text = (tmp_path / "merged" / "Modelfile").read_text()
    assert parsed(text) == [("from", "."), ("system", "Be kind.")]
    assert (tmp_path / "merged" / "model.safetensors").exists()


PROMPTS = [
    "two\nlines",
    'ends with "',
    '"whole"',
    " spaces ",
    "tab\tand\r\nend\n",
    'a ""',
    '""\nx',
    "# none",
    "é 漢 😀",
]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_system_prompt_is_parsed_as_it_was_learned(prompt):
    assert parsed(modelfile("/a b/base", Inputs("chat", {}, prompt)))[2:] == [("system", prompt)]


@pytest.mark.parametrize(("form", "template"), [("completion", 1), ("text", 1), ("chat", 0), ("", 0)])
def test_plain_prompts_are_sent_without_a_template(form, template):
    values = parsed(modelfile("base.gguf", Inputs(form)))[2:]
    assert values == [("template", "{{ .Prompt }}")] * template


def test_what_ollama_would_misread_is_refused_and_nothing_written(adapter, launch, tmp_path, monkeypatch):
    for prompt, what in (('a """ b', "three quotes"), ("a\u200bb", "cannot be printed")):
        with pytest.raises(ConfigurationError, match=what):
            modelfile("base", Inputs("chat", {}, prompt))
    shutil.copytree(adapter, tmp_path / "adapter")
    (tmp_path / "adapter" / "inputs.json").write_text(json.dumps({"form": "chat", "system": 'a """ b'}))
    code, _, said = launch("export", tmp_path / "adapter", "--to", "ollama", "--out", tmp_path / "out")
    assert (code, "inputs.json" in said) == (2, True)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr("dynrank.adapters.export.read_config", lambda *_: hf.LlamaConfig(**SIZES))
    with pytest.raises(ConfigurationError, match=r"folder or a GGUF file, got 'org/model'.*model DIR"):
        dynrank.export_adapter(adapter, tmp_path / "out", to="ollama", model="org/model")
