"""What transformers' Trainer takes for the best model, and its end, beside changes of rank."""

import itertools
import warnings

import pytest
import transformers as hf
from peft import PeftModel
from small_trainer import CUT, EVALUATING, SAVING, STEPS, Hearing, base, own, trainer, wrapped
from trained import ranks

from dynrank.callbacks import RankTrainerCallback
from dynrank.schedules import How, Stage, auto
from dynrank.targets import Rank
from dynrank.triggers import At

SCORING = {"metric_for_best_model": "score", "greater_is_better": True, **EVALUATING, **SAVING}


def scored(folder, schedule, scores=None, make=wrapped, **options):
    """A Trainer whose evaluations have these scores; by default each is worse than the one before it."""
    scores = scores or itertools.count(9, -1)
    made = trainer(folder, make(), schedule, **SCORING, **options)
    made.compute_metrics = lambda _: {"score": float(next(scores))}
    return made


def saved_ranks(folder):
    return ranks(PeftModel.from_pretrained(base(), folder))


@pytest.mark.parametrize("keep", [False, True])
def test_reduction_on_a_plateau_waits_anew_after_a_cut(tmp_path, capsys, keep):
    """Each evaluation of after the cut is better than the one before it, and worse than those of before the cut.

    The oracle has what the Trainer takes for its best model, and EarlyStoppingCallback.
    """
    options = {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"mode": "max", "patience": 0}}
    schedule = RankTrainerCallback(CUT, keep_best_before=keep)
    made = scored(tmp_path, schedule, iter([8.0, 9.0, *range(1, 10)]), make=own, **options)
    made.train()
    assert (made.optimizer.param_groups[0]["lr"] < 1e-2) == keep
    words = "best so far, at rank 4: 9; from here on the best of rank 2 counts"
    assert (words in " ".join(capsys.readouterr().out.split())) != keep


@pytest.mark.parametrize("stages", [auto(9.0, share=0.5), [CUT, Stage(At(fraction=1.0), Rank(1))]])
def test_cut_of_the_last_step_is_in_the_last_evaluation_and_checkpoint_and_may_be_the_best(stages, tmp_path):
    schedule = RankTrainerCallback(stages)
    made = trainer(tmp_path, wrapped(), schedule, load_best_model_at_end=True, **EVALUATING, **SAVING)
    hearing = Hearing()
    made.add_callback(hearing)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=UserWarning, message=".*(rank|checkpoint)")
        made.train()
    assert schedule.history[-1].step == STEPS
    assert (made.state.best_global_step, saved_ranks(tmp_path / f"checkpoint-{STEPS}")) == (STEPS, ranks(made.model))
    assert max(ranks(made.model)) < max(schedule.history[-1].ranks_before)
    assert hearing.evaluated[-1] == (STEPS, made.evaluate()["eval_loss"])


def test_run_that_is_stopped_early_is_cut_at_its_end_with_one_warning(tmp_path):
    """Its best weights, of other ranks, are loaded first, and the cut is judged by them."""
    how = How(max_regression=1, check_monitor="eval_score", check_mode="max")
    schedule = RankTrainerCallback([CUT, Stage(At(fraction=1.0), Rank(1), how=how)], keep_best_before=True)
    made = scored(tmp_path, schedule, load_best_model_at_end=True)
    made.add_callback(hf.EarlyStoppingCallback(early_stopping_patience=2))
    with pytest.warns(UserWarning, match="ranks were changed after training had ended at step 6, so no check") as told:
        made.train()
    assert sum("rank" in str(warning.message) for warning in told) == 1
    # Evaluations at 2, 4 and 6 had 9, 8 and 7.
    _, event = schedule.history
    assert (event.step, event.measured.before, event.measured.after, ranks(made.model)) == (6, 6.0, 5.0, {1})
    assert {*event.ranks_before} == {4}
