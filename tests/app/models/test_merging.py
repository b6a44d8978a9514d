"""Merged models: equal to the adapted ones in float64, to PEFT's merge, and to themselves when loaded from disk."""

import copy
import json
import shutil

import pytest
import torch
from huggingface_hub import constants
from peft import LoraConfig, PeftModel, get_peft_model
from torch.testing import assert_close
from trained import updated
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MarianConfig,
    MarianMTModel,
    MobileBertConfig,
    MobileBertForMaskedLM,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    T5Config,
    T5ForConditionalGeneration,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
    YolosConfig,
    YolosForObjectDetection,
)

import dynrank
from dynrank.app.models.merging import merge_adapter
from dynrank.app.models.names import ModelSettings
from dynrank.app.models.predicting import Prompts
from dynrank.app.models.pretrained import load_causal_lm
from dynrank.errors import ConfigurationError
from dynrank.layers.kinds import layer_class

ROUNDING = {"rtol": 1e-12, "atol": 1e-12}
IN_FLOAT32 = {"rtol": 1e-4, "atol": 1e-5}


def everything(model, tied=True):
    left_out = ("token_type_embeddings", *(() if tied else ("lm_head", "wte")))
    return [n for n, m in model.named_modules() if layer_class(m) and not n.endswith(left_out)]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "conv"])
def test_merge_equals_the_adapted_model_and_the_merge_of_peft_in_float64(kind, zoo, tmp_path):
    base = zoo.plain(kind).double()
    options = {"rslora": True, "modules_to_save": (), "dtype": torch.float64}
    model = zoo.adapted(kind, base=copy.deepcopy(base), target_modules=everything(base), **options)
    expected = zoo.outputs(model)
    assert_close(zoo.outputs(dynrank.merge(model)), expected, **ROUNDING)
    assert (expected - zoo.outputs(base)).abs().max() > 1e-2
    assert {p.dtype for p in model.parameters()} == {torch.float64}

    # PEFT's merge changes both ends of a tied weight
    model = zoo.adapted(kind, base=copy.deepcopy(base), target_modules=everything(base, tied=False), **options)
    dynrank.save_adapter(model, tmp_path)
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, autocast_adapter_dtype=False)
    theirs = theirs.double().merge_and_unload().state_dict()
    ours = dynrank.merge(model).state_dict()
    assert set(ours) == set(theirs)
    for name, value in ours.items():
        assert_close(value, theirs[name], **ROUNDING)


def test_adapter_of_the_texts_part_of_a_model_for_images_is_merged_as_by_peft(tmp_path):
    """The class for texts has a part of the config in the base's folder."""
    qwen = pytest.importorskip("transformers.models.qwen3_5")
    sizes = {"hidden_size": 32, "intermediate_size": 24, "num_attention_heads": 2}
    linear = {f"linear_{name}": 2 if name.startswith("num") else 8 for name in (
        "num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim")}  # fmt: skip
    text = {**sizes, **linear, "num_key_value_heads": 1, "head_dim": 16, "num_hidden_layers": 4, "vocab_size": 50}
    config = qwen.Qwen3_5Config(text_config=text, vision_config={"depth": 1, "out_hidden_size": 32})
    torch.manual_seed(0)
    base = tmp_path / "base"
    qwen.Qwen3_5ForConditionalGeneration(config).save_pretrained(base)
    model = updated(dynrank.add_lora(AutoModelForCausalLM.from_pretrained(base), rank=2)).eval()
    dynrank.save_adapter(model, tmp_path / "adapter")
    ids = torch.arange(1, 9)[None]
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter").eval()
    merge_adapter(tmp_path / "adapter", str(base), tmp_path / "merged")
    with torch.no_grad():
        expected = theirs(input_ids=ids).logits
        assert_close(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(input_ids=ids).logits, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_merge_keeps_the_dtype_and_rounds_once(dtype, zoo):
    base = zoo.plain("llama").to(dtype)
    model = zoo.adapted("llama", base=copy.deepcopy(base))
    layers = dict(dynrank.lora_layers(model))
    updates = {name: layer.scaling * layer.lora_B.double() @ layer.lora_A.double() for name, layer in layers.items()}
    dynrank.merge(model)
    for name, update in updates.items():
        exact = base.get_submodule(name).weight.double() + update
        found = model.get_submodule(name).weight
        assert found.dtype == dtype
        half_step = torch.finfo(dtype).eps / 2 * exact.abs() + torch.finfo(dtype).tiny
        # the sum is made in float32, with a few of its roundings
        assert ((found.double() - exact).abs() <= half_step + 4e-7 * exact.abs().max()).all()


@pytest.fixture
def stored(zoo, tmp_path):
    """(folder of a GPT-2, folder of an adapter for it, what it computes then); its tied head is adapted, too."""
    zoo.plain("gpt2").save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "tokenizer_config.json").write_text('{"model_max_length": 16}')
    model = zoo.adapted("gpt2", target_modules=["c_attn", "lm_head", "wte"], rank_map={"wte": 5})
    dynrank.save_adapter(model, tmp_path / "adapter")
    return tmp_path / "model", tmp_path / "adapter", zoo.outputs(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_command_writes_a_plain_model_of_the_dtype_of_the_files(stored, dtype, launch, zoo, tmp_path):
    model, adapter, expected = stored
    GPT2LMHeadModel.from_pretrained(model, dtype=dtype).save_pretrained(model)
    code, printed, _ = launch("merge", adapter, "--model", model, "--out", tmp_path / "merged")
    assert code == 0
    assert f"GPT2LMHeadModel, {str(dtype).removeprefix('torch.')}" in printed
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto").eval()
    assert {p.dtype for p in merged.parameters()} == {dtype}
    if dtype == torch.float32:
        assert_close(zoo.outputs(merged), expected, **IN_FLOAT32)
    assert json.loads((tmp_path / "merged" / "tokenizer_config.json").read_text()) == {"model_max_length": 16}


@pytest.mark.parametrize(
    ("cls", "changes", "labels"),
    # the last two have a head of the same shapes as the first: only the name, or PEFT's task, tells them apart
    [
        (BertForSequenceClassification, {}, 2),
        (BertForSequenceClassification, {"auto_mapping": None}, 3),
        (BertForTokenClassification, {}, 2),
        (BertForTokenClassification, {"auto_mapping": None, "task_type": "TOKEN_CLS"}, 2),
    ],
)
def test_merge_adapter_finds_the_class_and_takes_the_head_from_the_adapter(cls, changes, labels, zoo, tmp_path):
    """An encoder stored by itself, trained with a head that is in the adapter only."""
    zoo.plain("bert").bert.save_pretrained(tmp_path / "model")
    base = cls.from_pretrained(tmp_path / "model", num_labels=labels).eval()
    names = [f"bert.encoder.layer.{index}.attention.self.query" for index in (0, 1)]
    model = zoo.adapted("bert", base=base, target_modules=names)
    dynrank.save_adapter(model, tmp_path / "adapter")
    zoo.edit_config(tmp_path / "adapter", **changes)
    merged = merge_adapter(tmp_path / "adapter", str(tmp_path / "model"), tmp_path / "out")
    assert type(merged).__name__ == cls.__name__
    assert_close(zoo.outputs(cls.from_pretrained(tmp_path / "out").eval()), zoo.outputs(model), **IN_FLOAT32)


@pytest.mark.parametrize("resized", [False, True])
@pytest.mark.parametrize("trained", [None, ["embed_tokens", "lm_head"]])
def test_tokens_added_to_the_base_are_merged_with_their_rows(trained, resized, zoo, tmp_path):
    """Of an adapter of PEFT, into the base as it was, or as it is after another call of resize_token_embeddings."""

    def base(folder):
        model = LlamaForCausalLM.from_pretrained(folder)
        model.resize_token_embeddings(23, mean_resizing=False)
        return model

    plain = tmp_path / "plain"
    zoo.plain("llama").save_pretrained(plain)
    options = {"r": 3, "target_modules": ["q_proj"], "modules_to_save": trained, "task_type": "CAUSAL_LM"}
    theirs = zoo.trained(get_peft_model(base(plain), LoraConfig(**options)))
    theirs.save_pretrained(tmp_path / "adapter")
    base(plain).save_pretrained(tmp_path / "resized")
    merge_adapter(tmp_path / "adapter", str(tmp_path / "resized" if resized else plain), tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.tensor([[3, 22, 4, 20, 5]])
    with torch.no_grad():
        assert_close(merged(input_ids=ids).logits, theirs(input_ids=ids).logits, **IN_FLOAT32)


def test_merged_model_has_the_tokenizer_of_the_adapter_alone(tiny_llama, tmp_path):
    """Files of the base that the adapter lacks would change its special tokens, and its chat template."""
    base = shutil.copytree(tiny_llama, tmp_path / "base")
    model = dynrank.add_lora(AutoModelForCausalLM.from_pretrained(base), rank=2)
    dynrank.save_adapter(model, tmp_path / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(base)
    (base / "special_tokens_map.json").write_text(json.dumps({"eos_token": "of the base"}))
    (base / "chat_template.jinja").write_text("of the base")
    (base / "preprocessor_config.json").write_text("{}")
    merge_adapter(tmp_path / "adapter", str(base), tmp_path / "without")
    assert (tmp_path / "without" / "chat_template.jinja").read_text() == "of the base"
    tokenizer.eos_token = end = tokenizer.convert_ids_to_tokens(60)
    tokenizer.chat_template = {"default": "plain", "tool_use": "with tools"}
    tokenizer.save_pretrained(tmp_path / "adapter")
    dynrank.squeeze(tmp_path / "adapter", tmp_path / "small", rank=1)
    assert AutoTokenizer.from_pretrained(tmp_path / "small").chat_template == tokenizer.chat_template
    merge_adapter(tmp_path / "adapter", str(base), tmp_path / "out")
    merged = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (merged.eos_token, merged.chat_template) == (end, tokenizer.chat_template)
    # What is no tokenizer's is still the base's.
    assert (tmp_path / "out" / "preprocessor_config.json").exists()


SEVERAL = {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
SEVERAL |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
ONE = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
OF_T5 = {"vocab_size": 20, "d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 1, "num_heads": 2}
# Each has more weights that are tied than the one with LoRA; T5's are tied whatever its config says.
TIED = {
    "head": (BartForConditionalGeneration, BartConfig(vocab_size=20, **SEVERAL), ["q_proj", "lm_head"]),
    "embedding": (BertForMaskedLM, BertConfig(vocab_size=20, **ONE), ["query", "word_embeddings"]),
    "of T5": (T5ForConditionalGeneration, T5Config(**OF_T5), ["q", "lm_head"]),
}


@pytest.mark.parametrize("case", TIED)
def test_a_merged_model_with_lora_on_a_tied_weight_is_the_same_in_its_files(case, tmp_path):
    cls, config, targets = TIED[case]
    model = cls(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "base")
    adapted = updated(dynrank.add_lora(cls.from_pretrained(tmp_path / "base"), rank=2, target_modules=targets)).eval()
    dynrank.save_adapter(adapted, tmp_path / "adapter")
    merge_adapter(tmp_path / "adapter", str(tmp_path / "base"), tmp_path / "out")
    merged, info = cls.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    ids = torch.tensor([[3, 12, 4, 10, 5]])
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if config.is_encoder_decoder else {})
    with torch.no_grad():
        assert_close(merged.eval()(**inputs).logits, adapted(**inputs).logits, **IN_FLOAT32)


ADDED = {
    "marian": (MarianMTModel, MarianConfig(vocab_size=20, pad_token_id=19, decoder_start_token_id=19, **SEVERAL)),
    "mobilebert": (MobileBertForMaskedLM, MobileBertConfig(vocab_size=20, embedding_size=8, **ONE)),
}


@pytest.mark.parametrize("case", ADDED)
def test_models_that_are_given_tokens_in_their_own_way_are_merged_with_them(case, tmp_path):
    cls, config = ADDED[case]
    cls(config).save_pretrained(tmp_path / "base")
    model = cls.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(23)
    target = "q_proj" if case == "marian" else "query"
    adapted = updated(dynrank.add_lora(model, rank=2, target_modules=[target])).eval()
    dynrank.save_adapter(adapted, tmp_path / "adapter")
    merge_adapter(tmp_path / "adapter", str(tmp_path / "base"), tmp_path / "out")
    ids = torch.tensor([[3, 22, 4, 20, 5]])
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if config.is_encoder_decoder else {})
    with torch.no_grad():
        merged = cls.from_pretrained(tmp_path / "out").eval()
        assert_close(merged(**inputs).logits, adapted(**inputs).logits, **IN_FLOAT32)


def of_speech():
    layers = {"conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2}
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    return Wav2Vec2Config(**layers, **sizes, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, vocab_size=12)


def of_segments():
    sizes = {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 2, 2]}
    return SegformerConfig(**sizes, decoder_hidden_size=8, num_labels=3)


def of_boxes():
    return YolosConfig(**ONE, image_size=[32, 32], patch_size=16, num_detection_tokens=4, num_labels=3)


IMAGE = (1, 3, 32, 32)
FIVE = {"num_labels": 5}
# Heads whose shapes are not (classes, width): (class, config of the base, options of the model, layers, head, inputs).
HEADS = {
    "segments": (SegformerForSemanticSegmentation, of_segments, FIVE, "q_proj", "decode_head", IMAGE),
    "boxes": (YolosForObjectDetection, of_boxes, FIVE, "query", "class_labels_classifier", IMAGE),
    "speech": (Wav2Vec2ForCTC, of_speech, {"vocab_size": 17, "pad_token_id": 0}, "q_proj", "lm_head", (1, 400)),
}


@pytest.mark.parametrize("case", HEADS)
def test_heads_of_all_kinds_give_the_model_its_classes(case, tmp_path):
    cls, config, options, target, head, shape = HEADS[case]
    cls(config()).save_pretrained(tmp_path / "base")
    model = cls.from_pretrained(tmp_path / "base", ignore_mismatched_sizes=True, **options)
    model = updated(dynrank.add_lora(model, rank=2, target_modules=[target], modules_to_save=[head])).eval()
    dynrank.save_adapter(model, tmp_path / "adapter")
    merge_adapter(tmp_path / "adapter", str(tmp_path / "base"), tmp_path / "out")
    inputs = torch.randn(shape)
    with torch.no_grad():
        merged = cls.from_pretrained(tmp_path / "out").eval()
        assert_close(merged(inputs).logits, model(inputs).logits, **IN_FLOAT32)


def test_tokens_of_a_decoder_beside_an_encoder_of_images_are_merged(tmp_path):
    """As Donut and TrOCR are trained."""
    of_images = ViTConfig(**ONE, image_size=8, patch_size=4)
    of_texts = BertConfig(vocab_size=20, **ONE, is_decoder=True, add_cross_attention=True)
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(of_images, of_texts)
    VisionEncoderDecoderModel(config).save_pretrained(tmp_path / "base")
    model = VisionEncoderDecoderModel.from_pretrained(tmp_path / "base")
    model.decoder.resize_token_embeddings(23)
    model = updated(dynrank.add_lora(model, rank=2, target_modules=["query"])).eval()
    dynrank.save_adapter(model, tmp_path / "adapter")
    merge_adapter(tmp_path / "adapter", str(tmp_path / "base"), tmp_path / "out")
    inputs = {"pixel_values": torch.randn(1, 3, 8, 8), "decoder_input_ids": torch.tensor([[3, 22, 4]])}
    with torch.no_grad():
        merged = VisionEncoderDecoderModel.from_pretrained(tmp_path / "out").eval()
        assert_close(merged(**inputs).logits, model(**inputs).logits, **IN_FLOAT32)


def test_a_class_that_the_adapter_names_is_not_replaced_by_another(tmp_path):
    """A base without the pooler, which a classifier reads, and whose weights neither file has."""
    BertForMaskedLM(BertConfig(vocab_size=20, **ONE)).save_pretrained(tmp_path / "base")
    model = BertForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    options = {"target_modules": ["query"], "task_type": "SEQ_CLS"}
    get_peft_model(model, LoraConfig(r=2, **options)).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ConfigurationError, match=r"BertForSequenceClassification would have no weights \['bert.pooler"):
        merge_adapter(tmp_path / "adapter", str(tmp_path / "base"), tmp_path / "out")


def test_a_base_of_another_width_is_refused_for_a_model_whose_padding_is_no_first_token(tmp_path):
    """Classes are tried with fewer tokens, too, which this config does not allow."""
    for width in (8, 16):
        sizes = ONE | {"hidden_size": width}
        RobertaForMaskedLM(RobertaConfig(vocab_size=20, pad_token_id=1, **sizes)).save_pretrained(tmp_path / f"{width}")
    model = RobertaForSequenceClassification.from_pretrained(tmp_path / "8", num_labels=1)
    options = {"target_modules": ["query"], "task_type": "SEQ_CLS"}
    get_peft_model(model, LoraConfig(r=2, **options)).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ConfigurationError, match="was not trained on --model"):
        merge_adapter(tmp_path / "adapter", str(tmp_path / "16"), tmp_path / "out")


def test_rows_of_added_tokens_that_no_file_has_are_refused(zoo, tmp_path):
    """Of PEFT, where it did not know that the base has fewer tokens, and the embedding alone was trained."""
    zoo.plain("llama").save_pretrained(tmp_path / "base")
    model = zoo.plain("llama")
    model.resize_token_embeddings(23)
    options = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "task_type": "CAUSAL_LM"}
    get_peft_model(model, LoraConfig(r=2, **options)).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ConfigurationError, match=r"have no rows of 'lm_head\.weight' for the tokens that were"):
        merge_adapter(tmp_path / "adapter", str(tmp_path / "base"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """The folder of a model in the hub's cache, without a network; its name is org/model."""
    folder = tmp_path / "models--org--model" / "snapshots" / ("a" * 40)
    folder.mkdir(parents=True)
    refs = tmp_path / "models--org--model" / "refs"
    refs.mkdir()
    (refs / "main").write_text("a" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return folder


@pytest.mark.parametrize("own", [None, "tokenizer", "processor"])
def test_merged_model_has_the_files_of_inputs_of_a_base_that_is_named(own, cached, tiny_llama, tmp_path):
    """As of a base whose folder is given: the adapter's own tokenizer, or the base's, and the base's processor."""
    shutil.copytree(tiny_llama, cached, dirs_exist_ok=True)
    (cached / "preprocessor_config.json").write_text('{"of": "the base"}')
    model = AutoModelForCausalLM.from_pretrained("org/model")
    dynrank.save_adapter(dynrank.add_lora(model, rank=2), tmp_path / "adapter")
    if own == "tokenizer":
        AutoTokenizer.from_pretrained(tiny_llama, model_max_length=7).save_pretrained(tmp_path / "adapter")
    elif own == "processor":
        (tmp_path / "adapter" / "preprocessor_config.json").write_text('{"of": "the adapter"}')
    for name, base in {"named": None, "given": str(cached)}.items():
        merge_adapter(tmp_path / "adapter", base, tmp_path / name)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / name)
        assert (tokenizer.model_max_length == 7) == (own == "tokenizer")
        processor = json.loads((tmp_path / name / "preprocessor_config.json").read_text())
        assert processor == {"of": "the adapter" if own == "processor" else "the base"}


def test_a_base_of_images_needs_no_tokenizer(cached, tmp_path):
    size = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    ViTForImageClassification(ViTConfig(**size, image_size=8, patch_size=4)).save_pretrained(cached)
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(cached)
    model = ViTForImageClassification.from_pretrained("org/model").eval()
    model = updated(dynrank.add_lora(model, rank=2, target_modules=["q_proj"]))
    dynrank.save_adapter(model, tmp_path / "adapter")
    merge_adapter(tmp_path / "adapter", None, tmp_path / "out")
    image = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        merged = ViTForImageClassification.from_pretrained(tmp_path / "out").eval()
        assert_close(merged(image).logits, model(image).logits, **IN_FLOAT32)
    assert (tmp_path / "out" / "preprocessor_config.json").exists()


def test_merge_adapter_refuses_a_head_that_no_file_holds(zoo, tmp_path):
    zoo.plain("bert").bert.save_pretrained(tmp_path / "model")
    zoo.saved(tmp_path / "adapter", "bert", target_modules=["query"], modules_to_save=())
    with pytest.raises(ConfigurationError, match=r"BertForSequenceClassification would have no weights \['classifier"):
        merge_adapter(tmp_path / "adapter", str(tmp_path / "model"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_command_refuses_what_it_cannot_use_runs_no_code_and_writes_nothing(stored, launch, zoo, tmp_path):
    model, _, _ = stored
    zoo.plain("llama").save_pretrained(tmp_path / "llama")
    shutil.copytree(model, tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"no model")
    shutil.copytree(model, tmp_path / "own")
    config = json.loads((model / "config.json").read_text())
    # With this width all classes are tried, those too that only the folder's code would have.
    config |= {"architectures": [], "n_embd": 4, "auto_map": {"AutoModelForSeq2SeqLM": "code.Mine"}}
    (tmp_path / "own" / "config.json").write_text(json.dumps(config))
    (tmp_path / "own" / "code.py").write_text("open('ran', 'w')\nclass Mine: pass\n")
    before = sorted(tmp_path.rglob("*"))
    for base, out, message in (
        ("model", "model", "out must be another folder than the one to read, got 'model' for both (--out)"),
        ("llama", "out", "LlamaForCausalLM has no module 'transformer."),
        ("./absent", "out", "--model"),
        ("broken", "out", "--model"),
        ("own", "out", "--model"),
    ):
        code, _, said = launch("merge", "adapter", "--model", base, "--out", out)
        assert (code, message in said) == (2, True), said
        assert sorted(tmp_path.rglob("*")) == before


def test_tokenizer_files_are_no_links_out_of_the_model_or_its_hubs_cache(stored, tmp_path):
    model, adapter, _ = stored
    (tmp_path / "secret").write_text("of mine")
    (model / "chat_template.jinja").symlink_to(tmp_path / "secret")
    with pytest.raises(ConfigurationError, match="chat_template.jinja' must not be a link"):
        merge_adapter(adapter, str(model), tmp_path / "out")
    (model / "chat_template.jinja").unlink()
    blobs = tmp_path / "models--mine" / "blobs"
    snapshot = tmp_path / "models--mine" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in model.iterdir():
        file.rename(blobs / file.name)
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    merge_adapter(adapter, str(snapshot), tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer_config.json").read_text() == '{"model_max_length": 16}'


def test_the_base_of_an_adapter_is_of_the_commit_on_which_it_was_trained(tiny_llama, monkeypatch, tmp_path):
    """The hub's cache has a newer one, which the user may name."""
    old, new = "a" * 40, "b" * 40
    home = tmp_path / "models--org--tiny"
    for commit in (old, new):
        shutil.copytree(tiny_llama, home / "snapshots" / commit)
    newer = AutoModelForCausalLM.from_pretrained(tiny_llama)
    torch.nn.init.normal_(newer.lm_head.weight)
    newer.save_pretrained(home / "snapshots" / new)
    (home / "snapshots" / old / "chat_template.jinja").write_text("a template of then")
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(new)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    model = load_causal_lm("org/tiny", settings=ModelSettings(revision=old))
    head = model.lm_head.weight.detach().clone()
    dynrank.save_adapter(dynrank.add_lora(model, rank=2, target_modules=["q_proj"]), tmp_path / "adapter")
    assert torch.equal(merge_adapter(tmp_path / "adapter", None, tmp_path / "out").lm_head.weight, head)
    adapter = dynrank.read_adapter(tmp_path / "adapter")
    assert Prompts(adapter, None, None).tokenizer.chat_template == "a template of then"
    assert Prompts(adapter, "org/tiny", None).tokenizer.chat_template is None
    named = merge_adapter(tmp_path / "adapter", "org/tiny", tmp_path / "named")
    assert torch.equal(named.lm_head.weight, newer.lm_head.weight)
