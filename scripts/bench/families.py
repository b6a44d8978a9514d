"""Does every family of models of transformers train, resume and go to PEFT and back as it should?

A tiny model is made from each family's configuration, with random weights; nothing is downloaded. transformers' Trainer
trains it for four steps with a cut of ranks after the second. "before" and "after" say whether a run that is resumed
before and after the cut ends with the same adapter, "best" whether load_best_model_at_end restores the adapter of step
1, "to PEFT" and "from PEFT" whether the other library computes the same outputs with the adapter. Families that
results/families.csv has already are not run again.
Run: .venv/bin/python scripts/bench/families.py [FAMILY ...] [--out FILE] [--minutes 60]
"""

import argparse
import copy
import csv
import logging
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers as hf
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import dynrank
from dynrank.callbacks import RankTrainerCallback
from dynrank.schedules import Stage
from dynrank.targets import Rank
from dynrank.triggers import At

RESULTS = Path(__file__).parent / "results" / "families.csv"
CHECKS = ["before", "after", "best", "to PEFT", "from PEFT"]
COLUMNS = ["family", "model", "parameters", "layers", *CHECKS, "reason"]
# The first of these tasks that a family has gives its class.
TASKS = [
    "CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "SEQ_TO_SEQ_CAUSAL_LM", "MASKED_LM", "SPEECH_SEQ_2_SEQ", "CTC",
    "IMAGE_CLASSIFICATION", "AUDIO_CLASSIFICATION", "VIDEO_CLASSIFICATION", "MULTIMODAL_LM",
]  # fmt: skip
# The sizes of a tiny model: the first part of a name that fits decides.
SIZES: dict[str, int] = {
    "vocab_size": 64, "num_hidden_layers": 2, "num_layers": 2, "n_layers": 2, "n_layer": 2, "encoder_layers": 2,
    "decoder_layers": 2, "depth": 2, "num_key_value_heads": 2, "num_heads": 4, "attention_heads": 4, "n_head": 4,
    "n_heads": 4, "head_dim": 16, "intermediate_size": 96, "ffn_dim": 96, "d_ff": 96, "d_kv": 16, "d_model": 64,
    "n_embd": 64, "embed_dim": 64, "embedding_size": 64, "hidden_size": 64, "hidden_dim": 64, "projection_dim": 64,
    "num_experts_per_tok": 2, "top_k": 2, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4,
    "n_group": 1, "topk_group": 1, "lora_rank": 16, "image_size": 64, "patch_size": 8, "max_position_embeddings": 64,
    "window_size": 2, "num_mel_bins": 16, "max_source_positions": 32, "max_target_positions": 32, "max_length": 32,
    "num_frames": 2, "rotary_dim": 16, "dim": 64, "shared_expert_intermediate_size": 96,
}  # fmt: skip
LISTS = {"depths": 1, "num_heads": 2, "num_attention_heads": 2, "hidden_sizes": 64, "embed_dims": 64, "dims": 64}
MOST_PARAMETERS = 20_000_000


class Untried(Exception):
    """A family for which this script makes no tiny model."""


def families() -> dict[str, str]:
    """{family: the name of its class}, those first whose parameters transformers renames on saving."""
    found: dict[str, str] = {}
    for task in TASKS:
        for family, name in getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES").items():
            found.setdefault(family, name if isinstance(name, str) else name[0])
    for family, name in modeling_auto.MODEL_MAPPING_NAMES.items():
        found.setdefault(family, name if isinstance(name, str) else name[0])
    return dict(sorted(found.items(), key=lambda each: not get_checkpoint_conversion_mapping(each[0])))


def tiny_settings(config: Any) -> dict[str, Any]:
    """Arguments that make ``config`` and the configurations inside it tiny."""
    small: dict[str, Any] = {}
    token = 63
    for key, value in vars(config).items():
        if isinstance(value, hf.PreTrainedConfig):
            small[key] = {"model_type": value.model_type, **tiny_settings(value)}
        elif isinstance(value, bool) or key.startswith("_"):
            continue
        elif isinstance(value, int) and key.endswith(("_token_id", "_token_index")):
            if value > 40:
                small[key] = token
                token = token - 1
        elif isinstance(value, int) and value > 0:
            fitting = [size for name, size in SIZES.items() if key == name or key.endswith(f"_{name}")]
            if fitting:
                small[key] = min(value, fitting[0])
        elif isinstance(value, dict) and "rope_theta" in value:
            # Its sum is half of head_dim.
            small[key] = value | {"mrope_section": [4, 2, 2]}
        elif isinstance(value, list | tuple) and value and all(isinstance(entry, int) for entry in value):
            fitting = [size for name, size in LISTS.items() if key == name or key.endswith(f"_{name}")]
            small |= {key: [min(entry, fitting[0]) for entry in value]} if fitting else {}
    fixed = {"head_dim": 16, "use_cache": False, "first_k_dense_replace": 1}
    small |= {key: value for key, value in fixed.items() if key in vars(config)}
    # Multi-head latent attention has as many keys as queries.
    if "kv_lora_rank" in small and "num_key_value_heads" in small:
        small["num_key_value_heads"] = small["num_attention_heads"]
    return small


def make_model(family: str, name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A tiny model of ``family`` and one example for it; the same values in each call."""
    cls = getattr(hf, name)
    config_class = CONFIG_MAPPING[family]
    settings = tiny_settings(config_class())
    config = config_class(**settings)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in cls(config).parameters())
    if size > MOST_PARAMETERS:
        raise Untried(f"{size:,} parameters")
    torch.manual_seed(0)
    model = cls(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Some classes leave parameters as memory holds them.
            parameter.nan_to_num_(0, 0, 0).clamp_(-2, 2)
    return model, example_for(model)


def example_for(model: Any) -> dict[str, Tensor]:
    """The first of some usual examples that ``model`` takes."""
    faults = []
    for example in examples(model.config):
        try:
            with torch.no_grad():
                output_of(model, {key: value[None] for key, value in example.items()})
        except Exception as fault:
            faults.append(
                f"{[*example]}: {type(fault).__name__}: {str(fault).splitlines()[0][:80] if str(fault) else ''}"
            )
        else:
            return example
    main = [fault for fault in faults if f"['{model.main_input_name}'" in fault]
    raise Untried("no example fits: " + "; ".join((main or faults)[:2]))


def examples(config: Any) -> Iterator[dict[str, Tensor]]:
    """Usual examples: token ids, images, videos, sounds, and pairs of these."""
    inner = [config, *(value for value in vars(config).values() if isinstance(value, hf.PreTrainedConfig))]

    def found(*names: str, default: int) -> int:
        values = [getattr(each, name, None) for each in inner for name in names]
        sizes = [value[0] if isinstance(value, list | tuple) else value for value in values]
        return next((size for size in sizes if isinstance(size, int)), default)

    drawn = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 30, (8,), generator=drawn)
    side = found("image_size", default=64)
    channels = found("num_channels", "in_channels", "in_chans", default=3)
    pixels = torch.randn(channels, side, side, generator=drawn)
    video = torch.randn(found("num_frames", default=2), channels, side, side, generator=drawn)
    sound = torch.randn(4000, generator=drawn)
    bins = found("num_mel_bins", "feature_size", default=16)
    length = found("max_length", default=32)
    yield {"input_ids": ids}
    yield {"input_ids": ids, "decoder_input_ids": ids}
    yield {"pixel_values": pixels}
    yield {"input_ids": ids, "pixel_values": pixels}
    yield {"pixel_values": pixels, "decoder_input_ids": ids}
    yield {"pixel_values": video}
    yield {"pixel_values_videos": video}
    yield {"input_values": sound}
    yield {"input_values": sound, "decoder_input_ids": ids}
    yield {"input_values": torch.randn(length, bins, generator=drawn)}
    for frames in (64, 32):
        yield {"input_features": torch.randn(bins, frames, generator=drawn), "decoder_input_ids": ids}
        yield {"input_features": torch.randn(frames, bins, generator=drawn)}
        yield {"input_features": torch.randn(frames, bins, generator=drawn), "decoder_input_ids": ids}


def output_of(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """The first tensor of numbers in the model's output."""
    output = model(**inputs)
    values = output.values() if isinstance(output, Mapping) else output
    return next(value for value in values if isinstance(value, Tensor) and value.is_floating_point())


class Tried(hf.Trainer):  # type: ignore[misc]
    """Trains without labels, and finds every step worse than the one before."""

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        return output_of(model, inputs).square().mean()

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        metrics = {"eval_score": -float(self.state.global_step)}
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class Keeping(hf.TrainerCallback):  # type: ignore[misc]
    """Keeps the adapter after each step."""

    def __init__(self) -> None:
        self.adapters: dict[int, dict[str, Tensor]] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.adapters[state.global_step] = adapter_of(model)


def adapter_of(model: nn.Module) -> dict[str, Tensor]:
    """The factors of every layer."""
    return {
        f"{name}.{factor}": getattr(layer, factor).detach().clone()
        for name, layer in dynrank.lora_layers(model)
        for factor in ("lora_A", "lora_B")
    }


def check(plain: nn.Module, example: Mapping[str, Tensor]) -> dict[str, Any]:
    """The columns of a row: "equal", or how they differ, for each check."""

    def adapted(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model = dynrank.add_lora(copy.deepcopy(plain), rank=4)
        for parameter in dynrank.adapter_parameters(model):
            nn.init.normal_(parameter, std=0.05)
        return model

    def train(model: nn.Module, folder: str, *, resume: str | None = None, best: bool = False) -> Keeping:
        keeping = Keeping()
        options = {"load_best_model_at_end": True, "metric_for_best_model": "score"} if best else {}
        arguments = hf.TrainingArguments(
            folder, max_steps=4, per_device_train_batch_size=2, learning_rate=1e-3, save_steps=1, eval_steps=1,
            save_strategy="steps" if best else "no", eval_strategy="steps" if best else "no", seed=0, use_cpu=True,
            report_to=[], disable_tqdm=True, remove_unused_columns=False, logging_strategy="no", **options,
        )  # fmt: skip
        # The best model is the first one, whose ranks come back with it.
        ranks = RankTrainerCallback([Stage(At(step=2), Rank(2))], keep_best_before=True)
        data = [dict(example)] * 4
        trainer = Tried(model, arguments, train_dataset=data, eval_dataset=data, callbacks=[keeping, ranks])
        trainer.remove_callback(hf.PrinterCallback)
        trainer.train(resume_from_checkpoint=resume)
        return keeping

    row: dict[str, Any] = {}
    with TemporaryDirectory() as folder:
        model = adapted(1)
        row["layers"] = len([*dynrank.lora_layers(model)])
        whole = train(model, folder, best=True).adapters
        row["best"] = verdict(lambda: compare(adapter_of(model), whole[1]))
        for column, step in (("before", 1), ("after", 3)):
            row[column] = verdict(
                lambda step=step: compare(
                    train(adapted(2), f"{folder}/again", resume=f"{folder}/checkpoint-{step}").adapters[4], whole[4]
                )
            )

        def outputs(model: nn.Module) -> dict[str, Tensor]:
            torch.manual_seed(0)
            with torch.no_grad():
                return {"output": output_of(model.eval(), {key: value[None] for key, value in example.items()})}

        def to_peft() -> str:
            dynrank.save_adapter(model, f"{folder}/ours")
            base = copy.deepcopy(plain)
            # No adapter contains the statistics of batches.
            base.load_state_dict(dict(model.named_buffers()), strict=False)
            theirs = PeftModel.from_pretrained(base, f"{folder}/ours")
            return compare(outputs(theirs), outputs(model))

        def from_peft() -> str:
            theirs = get_peft_model(copy.deepcopy(plain), LoraConfig(r=4, target_modules="all-linear"))
            for _, layer in dynrank.lora_layers(theirs):
                nn.init.normal_(layer.lora_B, std=0.05)
            theirs.save_pretrained(f"{folder}/theirs")
            return compare(outputs(dynrank.load_adapter(copy.deepcopy(plain), f"{folder}/theirs")), outputs(theirs))

        row["to PEFT"] = verdict(to_peft)
        row["from PEFT"] = verdict(from_peft)
    return row


def verdict(comparison: Callable[[], str]) -> str:
    """What ``comparison`` returns, or the error that it raises."""
    try:
        return comparison()
    except Exception as fault:
        return f"{type(fault).__name__}: {' '.join(str(fault).split())[:160]}"


def compare(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """Whether they are "equal", or the greatest difference."""
    if found.keys() != expected.keys() or any(found[name].shape != expected[name].shape for name in found):
        return "other shapes"
    differences = {name: float((found[name] - value).abs().max()) for name, value in expected.items()}
    scale = max(float(value.abs().max()) for value in expected.values())
    name = max(differences, key=lambda name: differences[name])
    # The comparison is false for NaN, too.
    return "equal" if differences[name] <= 5e-5 * max(scale, 1e-3) else f"{name} differs by {differences[name]:.2g}"


def row_of(family: str, name: str, seconds: int = 120) -> dict[str, Any]:
    """The row of a family; what hinders it is its reason."""

    def ring(*_: Any) -> None:
        raise TimeoutError(f"more than {seconds} seconds")

    signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    row: dict[str, Any] = {"family": family, "model": name}
    try:
        plain, example = make_model(family, name)
        row["parameters"] = sum(parameter.numel() for parameter in plain.parameters())
        row |= check(plain, example)
    except Exception as fault:
        kind = "" if isinstance(fault, Untried) else f"{type(fault).__name__}: "
        row["reason"] = kind + " ".join(str(fault).split())[:200]
    finally:
        signal.alarm(0)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="all, if none is named")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--minutes", type=float, default=60.0)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    for name in ("transformers", "dynrank"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    hf.utils.logging.disable_progress_bar()
    known = families()
    end = time.monotonic() + 60 * arguments.minutes
    rows = [*csv.DictReader(arguments.out.open())] if arguments.out.exists() else []
    rows = [row for row in rows if row["family"] not in arguments.families]
    done = {row["family"] for row in rows}
    for family in arguments.families or known:
        if family in done or time.monotonic() > end:
            continue
        row = row_of(family, known[family])
        print({key: value for key, value in row.items() if value != "equal"}, flush=True)
        rows.append(row)
        with arguments.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(sorted(rows, key=lambda row: row["family"]))


if __name__ == "__main__":
    main()
