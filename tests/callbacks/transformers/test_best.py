"""What transformers' Trainer takes for the best model, beside changes of rank."""

import itertools
import re

import datasets
import pytest
import transformers as hf
from peft import LoraConfig, PeftModel
from small_trainer import (
    CUT,
    EVALUATING,
    SAVING,
    STEPS,
    Hearing,
    base,
    own,
    trainer,
    wrapped,
)
from trained import ranks

from dynrank.callbacks import RankTrainerCallback
from dynrank.schedules import How, Stage
from dynrank.targets import Rank
from dynrank.triggers import At

SCORING = {"metric_for_best_model": "score", "greater_is_better": True, "load_best_model_at_end": True}


def scored(folder, model, schedule, first=9, **options):
    """A Trainer of which each evaluation has a worse score than the one before; it saves after each."""
    scores = itertools.count(first, -1)
    made = trainer(folder, model, schedule, **SCORING, **EVALUATING, **SAVING, **options)
    made.compute_metrics = lambda _: {"score": float(next(scores))}
    return made


def test_best_model_is_the_best_of_after_the_cut_also_after_a_resume(tmp_path, capsys):
    """Patience begins anew, too: with the best score in the first evaluation, it would end at the third one."""
    for start in (None, 4):
        model = wrapped()
        made = scored(tmp_path / f"from {start}", model, RankTrainerCallback(CUT), first=9 - (start or 0) // 2)
        made.add_callback(hf.EarlyStoppingCallback(early_stopping_patience=2))
        source = tmp_path / "from None" / f"checkpoint-{start}"
        made.train(resume_from_checkpoint=str(source) if start else None)
        words = "best so far: step 2 at rank 4; from here on the best of rank 2 counts"
        assert words in " ".join(capsys.readouterr().out.split())
        assert (made.state.global_step, made.state.best_global_step) == (STEPS, 6)
        assert ranks(model) == {2}
        made.save_model(str(tmp_path / "end"))
        assert ranks(PeftModel.from_pretrained(base(), tmp_path / "end")) == {2}


@pytest.mark.parametrize("kind", ["reduce_lr_on_plateau", "greedy"])
@pytest.mark.parametrize("keep", [False, True])
def test_reduction_on_a_plateau_waits_anew_after_a_cut(tmp_path, kind, keep):
    """Each evaluation of after the cut is better than the one before it, and worse than those of before the cut."""
    scores = iter([8.0, 9.0, *range(1, 10)])
    options = {"lr_scheduler_type": kind, "lr_scheduler_kwargs": {"mode": "max", "patience": 0}}
    arguments = {"metric_for_best_model": "score", "greater_is_better": True, **EVALUATING, **options}
    made = trainer(tmp_path, own(), RankTrainerCallback(CUT, keep_best_before=keep), **arguments)
    made.compute_metrics = lambda _: {"score": float(next(scores))}
    made.train()
    fell = made.optimizer.param_groups[0]["lr"] < 1e-2
    assert fell == keep


@pytest.mark.parametrize("keep", [False, True])
def test_cut_behind_the_last_step_is_saved_and_the_other_files_are_named(keep, tmp_path):
    """The best one is loaded first, and evaluated anew for the check: the last evaluation was of other weights."""
    model = wrapped()
    how = How(max_regression=1, check_monitor="eval_score", check_mode="max")
    stages = [Stage(At(step=4), Rank(3)), Stage(At(fraction=1.0), Rank(2), how=how)]
    schedule = RankTrainerCallback(stages, keep_best_before=keep)
    made = scored(tmp_path, model, schedule)
    with pytest.warns(UserWarning, match="checkpoint") as caught:
        made.train()
    # Evaluations at 2, 4, 6, 8 and 10 had 9 to 5.
    assert (schedule.history[-1].measured.before, schedule.history[-1].measured.after) == (4, 3)
    messages = "\n".join(str(warning.message) for warning in caught)
    for kind, step, rank in (("last", 10, 3), ("best", 2, 4))[: 1 + keep]:
        words = f"the {kind} checkpoint, '.*checkpoint-{step}', has rank {rank}, but the trained model has rank 2:"
        assert re.search(rf"{words}.*save_model", messages)
    assert (made.state.best_model_checkpoint is None) != keep
    made.save_model(str(tmp_path / "end"))
    assert ranks(PeftModel.from_pretrained(base(), tmp_path / "end")) == {2}


@pytest.mark.filterwarnings("ignore")
def test_dpo_trainer_has_the_best_of_after_the_cut_and_the_ranks(tiny_llama, tmp_path):
    """Each evaluation has a worse score than the one before; keep_best_before is judged under FSDP2."""
    # trl loads slowly.
    import trl

    scores = itertools.count(9, -1)

    class Worsening(trl.DPOTrainer):
        def evaluate(self, *args, **options):
            return super().evaluate(*args, **options) | {"eval_score": float(next(scores))}

    sums = [{"prompt": f"{i} and {i} is", "chosen": f" {i + i}", "rejected": f" {i}"} for i in range(16)]
    options = {"max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1}
    options |= {"report_to": [], "disable_tqdm": True, "use_cpu": True, "bf16": False, "gradient_checkpointing": False}
    schedule = RankTrainerCallback(CUT)
    hearing = Hearing()
    made = Worsening(
        model=hf.AutoModelForCausalLM.from_pretrained(tiny_llama),
        args=trl.DPOConfig(str(tmp_path), **options, **SCORING, **EVALUATING, **SAVING),
        train_dataset=datasets.Dataset.from_list(sums),
        eval_dataset=datasets.Dataset.from_list(sums[:4]),
        processing_class=hf.AutoTokenizer.from_pretrained(tiny_llama, pad_token="<|end|>"),
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"),
        callbacks=[schedule, hearing],
    )
    made.train()
    assert (made.state.best_global_step, ranks(made.model)) == (6, {2})
    made.save_model(str(tmp_path / "end"))
    loaded = PeftModel.from_pretrained(hf.AutoModelForCausalLM.from_pretrained(tiny_llama), tmp_path / "end")
    assert ranks(loaded) == {2}
    assert hearing.heard == [(4, schedule.history[0], {2})]
    shown = {(row["step"], row["rank/mean"]) for row in made.state.log_history}
    assert shown == {(step, rank) for step in range(STEPS + 1) for rank in [4] * (step <= 4) + [2] * (step >= 4)}
