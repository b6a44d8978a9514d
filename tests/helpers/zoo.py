"""Models of four kinds, the same on every call, and adapters for them by dynrank and by PEFT."""

import json

import pytest
import torch
import transformers as hf
from peft import LoraConfig, TaskType, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import dynrank
from dynrank.errors import ConfigurationError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
TINY = {"vocab_size": 20, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3], [5, 8, 9, 7, 9]])


class ScaledHead(nn.Module):
    """A head with a parameter of its own beside a layer."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.linear = nn.Linear(8, 4)

    def forward(self, x):
        return self.scale * self.linear(x)


class ConvNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 9, 3, stride=2, padding=1)
        self.point = nn.Conv2d(9, 8, 1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.head = ScaledHead()

    def forward(self, image):
        return self.head(self.norm(self.point(self.stem(image).relu())).mean((2, 3)))


class Zoo:
    """Functions for the tests; a kind is one of ``models``."""

    models = {
        "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**TINY, **SIZES)),
        "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**TINY, n_embd=8, n_layer=2, n_head=2, n_positions=16)),
        "bert": lambda: hf.BertForSequenceClassification(hf.BertConfig(**TINY, **SIZES, num_labels=3)),
        "distilbert": lambda: hf.DistilBertForSequenceClassification(
            hf.DistilBertConfig(**TINY, dim=8, hidden_dim=12, n_layers=2, n_heads=2)
        ),
        "conv": ConvNet,
    }
    targets = {
        "llama": ["q_proj", "v_proj", "down_proj"],
        "gpt2": ["c_attn", "c_proj", "wte", "lm_head"],
        "bert": ["query", "value", "dense"],
        "distilbert": ["q_lin"],
        "conv": ["stem", "point"],
    }
    # The norm has a whole number among its tensors. PEFT takes DistilBERT's "pre_classifier" for a "classifier", too.
    heads = {"bert": ["classifier"], "distilbert": ["classifier"], "conv": ["norm", "head"]}

    @classmethod
    def plain(cls, kind):
        torch.manual_seed(0)
        return cls.models[kind]().eval()

    @staticmethod
    @torch.no_grad()
    def outputs(model):
        if any(isinstance(module, nn.Conv2d) for module in model.modules()):
            dtype = next(model.parameters()).dtype
            return model(torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(5)).to(dtype))
        return model(input_ids=IDS).logits

    @staticmethod
    def trained(model, seed=1, std=0.3):
        """Factors and heads are no longer what they were made as."""
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_(std=std)
        return model.eval()

    @classmethod
    def adapted(cls, kind, seed=1, base=None, **options):
        defaults = {"rank": 3, "alpha": 5, "target_modules": cls.targets[kind]}
        defaults["modules_to_save"] = cls.heads.get(kind, ())
        return cls.trained(dynrank.add_lora(base or cls.plain(kind), **(defaults | options)), seed)

    @classmethod
    def saved(cls, folder, kind, seed=1, **options):
        dynrank.save_adapter(cls.adapted(kind, seed, **options), folder)
        return folder

    @classmethod
    def by_peft(cls, kind, folder, **options):
        """A PEFT model, whose adapter is in ``folder`` afterwards."""
        defaults = {"r": 3, "lora_alpha": 5, "target_modules": cls.targets[kind]}
        # The list is a copy, because PEFT appends to it.
        defaults["modules_to_save"] = [*cls.heads.get(kind, ())] or None
        if "bert" in kind:
            defaults["task_type"] = TaskType.SEQ_CLS
        model = cls.trained(get_peft_model(cls.plain(kind), LoraConfig(**(defaults | options))))
        model.save_pretrained(folder)
        return model

    @staticmethod
    def state(model):
        """All that a change which is refused must leave: modules, tensors, their values, and what trains."""
        tensors = [*model.named_parameters(), *model.named_buffers()]
        return [id(module) for module in model.modules()], [
            (name, id(value), value.requires_grad, value.detach().numpy().tobytes()) for name, value in tensors
        ]

    @classmethod
    def assert_refused(cls, model, adapter, message, change=dynrank.load_adapter):
        before = cls.state(model)
        with pytest.raises(ConfigurationError, match=message):
            change(model, adapter)
        assert cls.state(model) == before

    @staticmethod
    def edit_config(folder, **changes):
        file = folder / CONFIG
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    @staticmethod
    def edit_tensors(folder, change):
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)
