"""What several test files share: a small LightningModule of a user's, small models, one whole run, the commands."""

import gc
import inspect
import logging
import resource
import shutil
import signal
import sys
from pathlib import Path

import forked
import lightning
import pytest
import torch
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, default_collate

import dynrank
from dynrank.app.tasks.loader import ResumableLoader
from dynrank.callbacks import StepSeed

# Programs that a shell starts in the background ignore Ctrl-C, which tests send to themselves.
signal.signal(signal.SIGINT, signal.default_int_handler)

# What scripts/test --quick runs: the maths, small runs of schedules, round trips with PEFT, and bad input.
QUICK = (
    "test_layering.py",
    "test_linalg.py",
    "test_errors.py",
    "test_rank_map.py",
    "targets/",
    "triggers/",
    "schedules/",
    "change/test_resize.py",
    "driver/test_driver.py",
    "adapters/test_peft.py",
)


def pytest_collection_modifyitems(items):
    for item in items:
        if str(item.path.relative_to(Path(__file__).parent)).startswith(QUICK):
            item.add_marker(pytest.mark.quick)
    # The longest test comes first, so that no process is left with it when the other has ended.
    items.sort(key=lambda item: item.path.name != "test_notebooks.py")


def pytest_collection_finish():
    _forget_imports()


@pytest.fixture(autouse=True, scope="module")
def _imports_of_file():
    yield
    _forget_imports()


def _forget_imports():
    """What tests have imported is never garbage; libraries look for garbage often, as after each of their runs."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed():
    """A test draws the same numbers, whichever tests ran before it in its process."""
    torch.manual_seed(0)


class Regression(lightning.LightningModule):
    """Learns a linear map with dropout in between; as plain as a user's first module."""

    def __init__(self, rank=6, **options):
        super().__init__()
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(12, 24), nn.Dropout(0.2), nn.Linear(24, 6))
        self.net = dynrank.add_lora(net, rank=rank, alpha=2 * rank, **options)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.mse_loss(self.net(x), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val/loss", nn.functional.mse_loss(self.net(x), y))

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 60)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def regression_data():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(80, 12, generator=generator)
    data = TensorDataset(x, x @ torch.randn(12, 6, generator=generator))
    return ResumableLoader(data, [1] * 80, 8, 3, default_collate), DataLoader(data, batch_size=40)


def quiet_trainer(**options):
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return lightning.Trainer(**{**defaults, **options})


@pytest.fixture(scope="session")
def regression():
    """(module class, data function, trainer function)."""
    return Regression, regression_data, quiet_trainer


@pytest.fixture(scope="session")
def fit(regression):
    """Trains 24 steps with these callbacks, and validates after every fifth; returns (module, trainer).

    Where ``saved`` is a folder, a callback of class ``kind`` leaves step=N.ckpt there after every step.
    """
    make, data, trainer = regression

    def run(*callbacks, module=None, saved=None, kind=ModelCheckpoint, ckpt_path=None, **options):
        callbacks = [*callbacks, StepSeed(0)]
        module = module or make()
        if saved is not None:
            every = {"every_n_train_steps": 1, "save_top_k": -1, "save_on_train_epoch_end": False}
            callbacks.append(kind(saved, filename="{step}", **every))
        options = {"max_steps": 24, "val_check_interval": 5, "num_sanity_val_steps": 0, **options}
        saves = any(isinstance(callback, Checkpoint) for callback in callbacks)
        fitted = trainer(callbacks=callbacks, enable_checkpointing=saves, **options)
        fitted.fit(module, *data(), ckpt_path=ckpt_path)
        return module, fitted

    return run


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory):
    """The folder of a random BERT of two layers without dropout, with MiniLM's tokenizer; for ``task.model``."""
    # transformers loads slowly, and few tests need it.
    from transformers import BertConfig, BertForSequenceClassification

    from dynrank.app.models.pretrained import load_tokenizer

    folder = tmp_path_factory.mktemp("bert")
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = BertConfig(**size, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    BertForSequenceClassification(config).save_pretrained(folder)
    load_tokenizer("minilm").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory):
    """The folder of a random Llama of two layers with a tokenizer made of Python; for ``task.model``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("llama")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    options = {"special_tokens": ["<|end|>"], "initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    tokenizer.train_from_iterator([inspect.getsource(shutil)], trainers.BpeTrainer(vocab_size=600, **options))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>").save_pretrained(folder)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    size |= {"vocab_size": 600, "bos_token_id": None, "eos_token_id": 0, "initializer_range": 0.3}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**size)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_moe():
    """A function from the name of an architecture to a random model of two layers with four experts, in float32."""
    import transformers

    size = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    size |= {"num_attention_heads": 2, "num_key_value_heads": 1, "num_experts_per_tok": 2}
    size |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3}
    narrow = {"moe_intermediate_size": 12}
    attention = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
    groups = {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
    options = {
        "Mixtral": {"num_local_experts": 4},
        "Qwen3Moe": {"num_experts": 4, "head_dim": 8, **narrow},
        "Qwen3_5Moe": {"num_experts": 4, "head_dim": 8, "shared_expert_intermediate_size": 12, **narrow},
        "GptOss": {"num_local_experts": 4, "head_dim": 8},
        "GraniteMoe": {"num_local_experts": 4},
        "DeepseekV3": groups | attention | narrow,
        "Llama4": {"num_local_experts": 4, "num_experts_per_tok": 1, "head_dim": 8, "intermediate_size_mlp": 24},
    }
    options["Qwen3_5Moe"]["layer_types"] = ["full_attention"] * 2

    def build(kind, **changes):
        text = "Text" if kind in ("Qwen3_5Moe", "Llama4") else ""
        if not hasattr(transformers, f"{kind}ForCausalLM"):
            pytest.skip(f"this transformers has no {kind}")
        config = getattr(transformers, f"{kind}{text}Config")(**size | options[kind] | changes)
        torch.manual_seed(0)
        model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
        if not any(name.endswith(".experts.gate_up_proj") for name, _ in model.named_parameters()):
            pytest.skip(f"in this transformers {kind} has its experts in another form")
        return model

    return build


@pytest.fixture(scope="session")
def zoo():
    """Models of four kinds, and adapters for them by dynrank and by PEFT."""
    # PEFT and transformers load slowly, and few tests need them.
    from zoo import Zoo

    return Zoo


@pytest.fixture
def full_disk():
    """No file can become larger than a page, as on a disk that is full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)


# All layers go to one rank, by their singular values.
ALIKE = ("schedule=after_convergence", "schedule.shared=false")


@pytest.fixture(scope="session")
def smoke_run(tmp_path_factory):
    """The folder of one short but whole run of the default task, to rank 16 in every layer, and what it printed."""
    folder = tmp_path_factory.mktemp("smoke") / "run"
    # 16 terms a split, since validations of more take most of the time.
    arguments = ["debug=smoke", "task.limit=16", *ALIKE, f"hydra.run.dir={folder}"]
    code, printed = forked.run(forked.TRAIN, *arguments, cwd=folder.parent)
    assert code == 0, printed
    return folder, printed


@pytest.fixture
def launch(monkeypatch, tmp_path, capsys):
    """Runs an entry point of ours in this process, in an empty folder: (exit code, its stdout, its stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(main, *arguments):
        monkeypatch.setattr(sys, "argv", [main.__module__, *map(str, arguments)])
        # main() sets this variable, and the fixture takes it back.
        monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
        code = 0
        handlers = [*logging.root.handlers]
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
        finally:
            # One that a logger has left writes to this test's stderr, which is closed when a later test logs.
            logging.root.handlers[:] = handlers
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        assert code != 2 or "error" in printed.err.lower()
        return code, printed.out, printed.err

    return call
