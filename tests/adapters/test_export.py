"""An exported adapter is the same to readers of three kinds; what a server would drop or misread is refused by name."""

import json
import re

import pytest
import torch
import transformers as hf
from huggingface_hub import constants
from safetensors.torch import load_file

import dynrank
from dynrank.adapters.modelfile import modelfile
from dynrank.adapters.sidecar_files import Inputs, write_sidecar_files
from dynrank.errors import ConfigurationError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
UNLIKE = {r"0\..*q_proj": {"rank": 1, "alpha": 7}, r"1\..*v_proj": {"rank": 5, "alpha": 1}, "down_proj": 2}


def updates(folder, reader):
    """{layer: its update}, by a reader of patterns (P), of the global alpha / r (G), or of alpha / own rows (T)."""
    config = json.loads((folder / CONFIG).read_text())
    tensors = load_file(folder / WEIGHTS)
    found = {}
    for key in tensors:
        if key.endswith("lora_A.weight"):
            name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            lora_A = tensors[key].double()
            lora_B = tensors[key.replace("lora_A", "lora_B")].double()
            own = [value for pattern, value in config["alpha_pattern"].items() if re.match(pattern, name)]
            alpha = own[0] if own and reader == "P" else config["lora_alpha"]
            found[name] = alpha / (config["r"] if reader == "G" else len(lora_A)) * lora_B @ lora_A
    return found


@pytest.mark.parametrize(
    ("to", "right"),
    [(None, {"P"}), ("vllm", {"P", "G"}), ("padded", {"P", "G", "T"})],
    ids=["native", "vllm", "padded"],
)
def test_readers_find_the_same_updates(to, right, zoo, tmp_path):
    folder = zoo.saved(tmp_path / "adapter", "llama", rank_map=UNLIKE)
    expected = updates(folder, "P")
    if to is not None:
        dynrank.export_adapter(folder, tmp_path / "out", to=to)
        folder = tmp_path / "out"
    for reader in "PGT":
        error = max(float((delta - expected[name]).abs().max()) for name, delta in updates(folder, reader).items())
        assert error < 1e-6 if reader in right else error > 0.1
    if to == "vllm":
        assert {layer.rank for layer in dynrank.read_adapter(folder).layers.values()} == {1, 2, 3, 5}


def test_updates_in_float16_are_exact_where_an_alpha_is_small(zoo, tmp_path):
    folder = zoo.saved(tmp_path / "adapter", "llama", alpha=64, rank_map={r"0\..*q_proj": {"rank": 3, "alpha": 0.01}})

    def as_trained(tensors):
        """In float16, and lora_B as small as it is after a usual training."""
        tensors.update({key: (value * (0.01 if "lora_B" in key else 1)).half() for key, value in tensors.items()})

    zoo.edit_tensors(folder, as_trained)
    expected = updates(folder, "P")
    dynrank.export_adapter(folder, tmp_path / "out", to="vllm")
    for name, delta in updates(tmp_path / "out", "P").items():
        assert (delta - expected[name]).norm() <= torch.finfo(torch.float16).eps * expected[name].norm()


def test_the_unchanged_base_of_an_adapted_embedding_is_left_out(zoo, tmp_path):
    zoo.plain("llama").save_pretrained(tmp_path / "base")
    zoo.by_peft("llama", tmp_path / "adapter", target_modules=["embed_tokens", "q_proj"])
    name = "base_model.model.model.embed_tokens.base_layer.weight"
    assert name in load_file(tmp_path / "adapter" / WEIGHTS)
    for to in ("gguf", "vllm"):
        dynrank.export_adapter(tmp_path / "adapter", tmp_path / to, to=to, model=str(tmp_path / "base"))
    assert name not in load_file(tmp_path / "vllm" / WEIGHTS)
    theirs, ours = (dynrank.load_adapter(zoo.plain("llama"), tmp_path / place) for place in ("adapter", "vllm"))
    torch.testing.assert_close(zoo.outputs(ours), zoo.outputs(theirs))


def test_padded_has_one_rank_a_list_of_names_and_the_files_beside(zoo, tmp_path):
    folder = zoo.saved(tmp_path / "adapter", "llama", rank_map=UNLIKE)
    zoo.edit_config(folder, target_modules=r".*\.(q|v|down)_proj")
    (folder / "tokenizer_config.json").write_text("{}")
    before = dynrank.read_adapter(folder)
    done = dynrank.export_adapter(folder, tmp_path / "out", to="padded", multiple=16)
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert (config["r"], config["rank_pattern"], config["alpha_pattern"]) == (16, {}, {})
    assert config["target_modules"] == [*before.layers]
    assert {len(value) for key, value in load_file(tmp_path / "out" / WEIGHTS).items() if "lora_A" in key} == {16}
    assert {file.name for file in (tmp_path / "out").iterdir()} == {CONFIG, WEIGHTS, "tokenizer_config.json"}
    assert done.bytes == sum(file.stat().st_size for file in (tmp_path / "out").iterdir())


SIZES = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}


def save_llama(
    folder, base=hf.LlamaConfig, targets=("q_proj",), heads=(), cls=hf.LlamaForCausalLM, rank_map=None, **config
):
    """An adapter of a model that lies in ``folder``/base."""
    model = cls(base(**SIZES | config))
    model.save_pretrained(folder / "base")
    model.config.name_or_path = str(folder / "base")
    options = {"target_modules": [*targets], "modules_to_save": heads, "rank_map": rank_map}
    dynrank.add_lora(model, rank=2, alpha=4, **options)
    dynrank.save_adapter(model, folder / "adapter")


CLASSIFIER = {"cls": hf.LlamaForSequenceClassification}
OPT = {"base": hf.OPTConfig, "cls": hf.OPTForCausalLM, "ffn_dim": 12, "word_embed_proj_dim": 8}
TIED = {"tie_word_embeddings": True}
REFUSED = {
    "gguf, a norm": ("gguf", {"heads": ["model.norm"]}, r"'model\.norm' is stored whole.*dynrank merge"),
    "gguf, tied head": ("gguf", TIED | {"targets": ["lm_head"]}, r"'lm_head' is tied"),
    "gguf, no name": ("gguf", CLASSIFIER | {"targets": ["score"]}, r"'score' has no name in llama.cpp"),
    "gguf, another architecture": ("gguf", OPT, r"must be one of .*'llama'.*got 'opt'.*dynrank merge"),
    "vllm, a norm": ("vllm", {"heads": ["model.norm"]}, r"vLLM.*'model\.norm' is stored whole.*dynrank merge"),
    "padded, a head": ("padded", CLASSIFIER | {"heads": ["score"]}, r"one rank.*'score' is stored whole"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_server_would_drop_or_misread_is_refused_and_nothing_written(case, tmp_path):
    to, options, message = REFUSED[case]
    save_llama(tmp_path, **options)
    with pytest.raises(ConfigurationError, match=re.compile(message, re.DOTALL)):
        dynrank.export_adapter(tmp_path / "adapter", tmp_path / "new" / "out", to=to)
    assert {file.name for file in tmp_path.iterdir()} == {"adapter", "base"}


def test_vllm_leaves_out_an_adapter_of_the_language_model_that_is_a_part_of_its_base(tmp_path, monkeypatch):
    """As that of Qwen 3.5, which AutoModelForCausalLM loads alone."""
    save_llama(tmp_path, targets=["q_proj"])
    file = tmp_path / "base" / "config.json"
    own = json.loads(file.read_text())
    whole = {"architectures": ["Qwen3_5ForConditionalGeneration"], "model_type": "qwen3_5", "text_config": own}
    file.write_text(json.dumps(whole))
    words = r"as Qwen3_5ForConditionalGeneration, whose language model is a part .*dynrank merge"
    with pytest.raises(ConfigurationError, match=re.compile(words, re.DOTALL)):
        dynrank.export_adapter(tmp_path / "adapter", tmp_path / "out", to="vllm")
    dynrank.export_adapter(tmp_path / "adapter", tmp_path / "padded", to="padded")
    # The same base on the hub, at a commit.
    snapshot = tmp_path / "models--some--base" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    file.rename(snapshot / "config.json")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    config = tmp_path / "adapter" / "adapter_config.json"
    named = {"base_model_name_or_path": "some/base", "revision": snapshot.name}
    config.write_text(json.dumps(json.loads(config.read_text()) | named))
    with pytest.raises(ConfigurationError, match=re.compile(words, re.DOTALL)):
        dynrank.export_adapter(tmp_path / "adapter", tmp_path / "out", to="vllm")
    (snapshot / "config.json").unlink()
    made = dynrank.export_adapter(tmp_path / "adapter", tmp_path / "at a commit", to="vllm")
    assert f"vllm serve some/base --revision {snapshot.name} " in made.line
    # A name on the hub that this machine has not seen.
    dynrank.export_adapter(tmp_path / "adapter", tmp_path / "out", to="vllm", model="some/base")


@pytest.mark.parametrize("size", [{"num_attention_heads": 8}, {"hidden_size": 16}])
def test_a_base_of_other_shapes_is_refused_before_a_file_is_written(size, tmp_path):
    save_llama(tmp_path, targets=["q_proj", "down_proj"], hidden_size=12, head_dim=4)
    hf.LlamaConfig(**SIZES | {"head_dim": 4} | size).save_pretrained(tmp_path / "other")
    with pytest.raises(ConfigurationError, match=r"was not trained on '.*other':\s+'model\.layers\.0\..* in the model"):
        dynrank.export_adapter(tmp_path / "adapter", tmp_path / "a.gguf", to="gguf", model=str(tmp_path / "other"))
    assert not (tmp_path / "a.gguf").exists()


def test_vllm_takes_the_head_of_a_classifier(tmp_path):
    save_llama(tmp_path, **CLASSIFIER, heads=["score"])
    dynrank.export_adapter(tmp_path / "adapter", tmp_path / "out", to="vllm")
    name = "base_model.model.score.weight"
    assert torch.equal(load_file(tmp_path / "out" / WEIGHTS)[name], load_file(tmp_path / "adapter" / WEIGHTS)[name])


def test_convolutions_and_places_that_are_taken_are_refused(zoo, tmp_path):
    zoo.saved(tmp_path / "conv", "conv", modules_to_save=[])
    with pytest.raises(ConfigurationError, match="'stem' is a convolution"):
        dynrank.export_adapter(tmp_path / "conv", tmp_path / "out", to="vllm")
    save_llama(tmp_path)
    (tmp_path / "base.gguf").write_bytes(b"somebody's weights")
    with pytest.raises(ConfigurationError, match=r"new file, .*base\.gguf"):
        dynrank.export_adapter(tmp_path / "adapter", tmp_path / "base.gguf", to="gguf")
    with pytest.raises(ConfigurationError, match='multiple goes with to="padded"'):
        dynrank.export_adapter(tmp_path / "adapter", tmp_path / "out", to="vllm", multiple=2)
    assert (tmp_path / "base.gguf").read_bytes() == b"somebody's weights"
    assert not (tmp_path / "out").exists()


def test_command_prints_the_line_that_serves_it(launch, zoo, tmp_path):
    zoo.saved(tmp_path / "run" / "adapter", "llama", rank=8, rank_map={"q_proj": 2}, alpha=16)
    zoo.edit_config(tmp_path / "run" / "adapter", base_model_name_or_path="some/base")
    place = tmp_path / "mine"
    code, printed, _ = launch("export", tmp_path / "run", "--to", "vllm", "--out", place)
    assert code == 0
    assert f"vllm serve some/base --enable-lora --max-lora-rank 8 --lora-modules mine={place}\n" in printed
    assert "6, rank 2-8, 6.0 on average\n" in printed
    assert launch("export", tmp_path / "run", "--to", "tgi", "--out", tmp_path / "other")[0] == 2
    assert not (tmp_path / "other").exists()


# --- Ollama is no Python package, so no test runs it

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


@pytest.fixture
def chat(tmp_path):
    """The folder of an adapter that has learned a system prompt."""
    save_llama(tmp_path, targets=["q_proj", "v_proj"], rank_map={"q_proj": 1})
    write_sidecar_files(tmp_path / "adapter", None, None, Inputs("chat", {}, "Be kind."))
    return tmp_path / "adapter"


def test_ollama_gets_base_adapter_and_the_system_prompt_that_was_learned(chat, launch, tmp_path):
    code, printed, said = launch("export", chat, "--to", "ollama", "--out", tmp_path / "out")
    assert code == 0, said
    assert f"ollama create out -f {tmp_path / 'out' / 'Modelfile'} && ollama run out" in printed
    text = (tmp_path / "out" / "Modelfile").read_text()
    base = str((tmp_path / "base").resolve())
    assert parsed(text) == [("from", base), ("adapter", "./adapter.gguf"), ("system", "Be kind.")]
    dynrank.export_adapter(chat, tmp_path / "alone.gguf", to="gguf")
    assert (tmp_path / "out" / "adapter.gguf").read_bytes() == (tmp_path / "alone.gguf").read_bytes()
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"Modelfile", "adapter.gguf"}


@pytest.mark.parametrize("prompt", ['"whole"', " spaces ", "tab\tand\r\nend\n", '""\nx', "# none", "é 漢 😀"])
def test_a_system_prompt_is_parsed_as_it_was_learned(prompt):
    assert parsed(modelfile("/a b/base", Inputs("chat", {}, prompt)))[2:] == [("system", prompt)]


@pytest.mark.parametrize(("form", "template"), [("completion", 1), ("text", 1), ("chat", 0), ("", 0)])
def test_plain_prompts_are_sent_without_a_template(form, template):
    values = parsed(modelfile("base.gguf", Inputs(form)))[2:]
    assert values == [("template", "{{ .Prompt }}")] * template


def test_what_ollama_would_misread_is_refused_and_nothing_written(chat, launch, tmp_path):
    with pytest.raises(ConfigurationError, match="cannot be printed"):
        modelfile("base", Inputs("chat", {}, "a\u200bb"))
    with pytest.raises(ConfigurationError, match=r"folder or a GGUF file, got 'org/model'.*give its folder"):
        dynrank.export_adapter(chat, tmp_path / "out", to="ollama", model="org/model")
    (chat / "inputs.json").write_text(json.dumps({"form": "chat", "system": 'a """ b'}))
    code, _, said = launch("export", chat, "--to", "ollama", "--out", tmp_path / "out")
    assert (code, "three quotes" in said, "inputs.json" in said) == (2, True, True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", ["gguf", "vllm"])
def test_command_knows_a_base_by_its_short_name(to, launch, tmp_path):
    """A config that comes with dynrank stands for a model that a package or the hub has."""
    save_llama(tmp_path, targets=["down_proj"], hidden_size=576, intermediate_size=1536, num_attention_heads=9)
    code, printed, said = launch("export", tmp_path / "adapter", "--to", to, "--out", "out", "--model", "smollm2-135m")
    assert code == 0, said
    assert "smollm2-135m" in printed
