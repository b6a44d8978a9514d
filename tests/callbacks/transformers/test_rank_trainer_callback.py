"""The schedule in a real transformers.Trainer, for dynrank's layers and for PEFT's, and its resume."""

import math
import pickle
import statistics
from types import SimpleNamespace

import datasets
import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from small_trainer import CUT, EVALUATING, SAVING, SIZE, STAGES, STEPS, Hearing, base, data, own, trainer, wrapped
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from trained import ranks, watched
from transformers import TrainerCallback

import dynrank
from dynrank.callbacks import RankTrainerCallback
from dynrank.distributed.accelerated import check_arguments
from dynrank.errors import ConfigurationError
from dynrank.layers import peft_op
from dynrank.schedules import How, Stage, early_budget
from dynrank.targets import Budget, Rank
from dynrank.triggers import At, Gap, Plateau


def tied():
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(intermediate_size=24, tie_word_embeddings=True, **SIZE))
    return dynrank.add_lora(model, rank=4, alpha=4, target_modules=["q_proj", "lm_head"])


def checkpoint(folder, step):
    """The folder of a checkpoint; None: a run begins at the start."""
    return str(folder / f"checkpoint-{step}") if step else None


SETS = {"evaluated": {"a": data(4), "b": data(8)}}
STREAM = datasets.IterableDataset.from_generator(lambda: iter(data(4 * STEPS)))
ON_START = {"eval_strategy": "steps", "eval_steps": 3, "eval_on_start": True}

# For each: the model, the stages, options of the Trainer, and the steps of the changes.
RUNS = {
    "a head tied to the embedding": (tied, STAGES, {}, [4, 7]),
    # The optimizer keeps the last updates, of which importance is made, in numbers of this dtype.
    "importance in bfloat16": (lambda: own().bfloat16(), early_budget(2, at=0.6), {}, [6]),
    "importance, without state": (own, early_budget(2, at=0.6), {"optim": "sgd", "learning_rate": 1.0}, [6]),
    # At step 4 one evaluation of both sets is still to come, and at 6 the change is decided and not made.
    "a plateau": (own, [Stage(Plateau("eval_b_loss", min_delta=0.9), Rank(2))], EVALUATING | SETS, [6]),
    # A resumed run evaluates once more.
    "evaluated on start": (own, [Stage(Plateau(min_delta=0.9, patience=2), Rank(2))], ON_START, [9]),
    # Checkpoints lie between two looks, and not all steps of the loss so far have been logged.
    "the loss": (own, [Stage(Plateau("train/loss", min_delta=0.9, patience=1), Rank(2))], {"logging_steps": 3}, [6]),
    # ``max_steps`` alone tells the length of the run.
    "streamed data": (own, [Stage(At(fraction=0.3), Rank(2))], {"dataset": STREAM}, [3]),
}


@pytest.mark.parametrize("name", RUNS)
def test_ranks_follow_the_schedule_and_a_resumed_run_has_the_same_weights(name, assert_same, tmp_path):
    make, stages, options, steps = RUNS[name]
    model = make()
    whole = RankTrainerCallback(stages)
    trainer(tmp_path, model, whole, **options, **SAVING).train()
    assert [event.step for event in whole.history] == steps
    for start in (4, 6):
        again = make()
        resumed = RankTrainerCallback(stages)
        trainer(tmp_path, again, resumed, **options).train(resume_from_checkpoint=checkpoint(tmp_path, start))
        assert resumed.history == whole.history
        assert_same(again, model, start)


@pytest.mark.parametrize("make", [own, wrapped])
def test_attached_callback_and_models_of_model_init_end_as_the_constructor_s(make, assert_same, tmp_path, monkeypatch):
    """Also resumed before the first change, at it, and after the second one; attach() needs no walk of the stack."""
    model = make()
    # Layers of dynrank have the op already.
    kernel = make is wrapped
    schedule, kept = (RankTrainerCallback(STAGES, kernel=kernel) for _ in range(2))
    trainer(tmp_path, model, schedule, **SAVING).train()
    anew = trainer(tmp_path, None, kept, model_init=make)
    for start in (2, None, 4, 8):
        source = checkpoint(tmp_path, start)
        anew.train(resume_from_checkpoint=source)
        assert [event.step for event in kept.history] == [4, 7]
        # One that begins at the start draws other numbers, because the Trainer makes its model within train().
        if start:
            assert kept.history == schedule.history
            assert_same(anew.model, model, start)
        made = trainer(tmp_path, make(), None)
        attached = RankTrainerCallback(STAGES, kernel=kernel)
        assert attached.attach(made) is attached
        with monkeypatch.context() as patched:
            patched.delattr("dynrank.callbacks.transformers.rank_trainer_callback.calling_trainer")
            made.train(resume_from_checkpoint=source)
        assert attached.history == schedule.history
        assert_same(made.model, model, start)
        for each in (model, anew.model, made.model) if kernel else ():
            assert {type(layer) for layer in each.modules() if isinstance(layer, LoraLayer)} == {peft_op.Linear}


@pytest.mark.filterwarnings("ignore")
def test_trials_of_a_search_begin_at_the_full_rank_and_are_judged_by_their_evaluations(tmp_path):
    """A trigger begins anew, too: it would fire earlier in the second trial if it remembered the first one."""
    hearing = Hearing()
    # Each trial has five evaluations, of which none but the first is better.
    schedule = RankTrainerCallback(Stage(Plateau("eval_loss", min_delta=9.0, patience=3), Rank(2)))
    made = trainer(tmp_path, None, schedule, model_init=lambda trial: wrapped(), **EVALUATING)
    made.add_callback(hearing)
    found = made.hyperparameter_search(
        lambda trial: {"learning_rate": trial.suggest_float("rate", 1e-3, 1e-2)}, n_trials=3
    )
    assert [(step, {*event.ranks_before}, now) for step, event, now in hearing.heard] == [(8, {4}, {2})] * 3
    # The objective of a Trainer without metrics is the loss of a trial's last evaluation.
    assert found.objective == min(loss for step, loss in hearing.evaluated if step == STEPS)


def test_callback_that_was_added_late_is_refused_with_the_cure(tmp_path):
    schedule = RankTrainerCallback(CUT)
    # Another Trainer that was given it properly changes nothing for this one.
    other = trainer(tmp_path, own(), schedule)
    made = trainer(tmp_path, own(), None)
    made.add_callback(schedule)
    with pytest.raises(ConfigurationError, match=r"RankTrainerCallback\(\.\.\.\)\.attach\(trainer\)") as raised:
        made.train()
    assert (raised.value.arguments, made.state.global_step) == (("callbacks",), 0)
    schedule.attach(made)
    assert made.callback_handler.callbacks.count(schedule) == 1
    made.train()
    assert (ranks(made.model), ranks(other.model)) == ({2}, {4})


def test_what_cannot_work_is_refused_before_the_first_step(tmp_path):
    checked, of_training = (
        trainer(tmp_path, own(), RankTrainerCallback(stage))
        for stage in (Stage(At(step=4), Rank(2), how=How(max_regression=0.1)), Stage(Plateau("train/f1"), Rank(2)))
    )
    checked.eval_dataset = of_training.eval_dataset = None
    with pytest.raises(ConfigurationError, match="give the Trainer an eval_dataset"):
        checked.train()
    with pytest.raises(ConfigurationError, match="^Plateau must .*got 'train/f1'.*log it in each validation"):
        of_training.train()
    next(layer for _, layer in dynrank.lora_layers(of_training.model)).base.weight.requires_grad_(True)
    with pytest.raises(ConfigurationError, match=r"q_proj\.weight' and 0 other parameters of layers with LoRA are"):
        RankTrainerCallback(CUT).attach(trainer(tmp_path, of_training.model, None)).trainer.train()
    assert (checked.state.global_step, of_training.state.global_step) == (0, 0)
    both = RankTrainerCallback(CUT).attach(trainer(tmp_path, own(), RankTrainerCallback(CUT))).trainer
    with pytest.raises(ConfigurationError, match="another rank schedule drives this optimizer; join the stages of bo"):
        both.train()
    with pytest.raises(ConfigurationError, match=r"set to 2 GPUs.*torchrun"):
        check_arguments(SimpleNamespace(n_gpu=2))


def test_callback_can_be_pickled_before_its_run():
    """As programs do that start the run in another process."""
    copied = pickle.loads(pickle.dumps(RankTrainerCallback(CUT, rank_map={"o_proj": {"pinned": True}})))
    assert repr(copied.driver.stages) == repr(RankTrainerCallback(CUT).driver.stages)


# What is logged and printed


def logged(made, name):
    """{step: value} of the records that have it."""
    return {row["step"]: row[name] for row in made.state.log_history if name in row}


def test_learning_rate_is_the_program_s_and_lr_adapter_what_adapters_had_in_the_step(tmp_path):
    plain, made = (trainer(tmp_path, own(), callback) for callback in (None, RankTrainerCallback(CUT)))
    for each in (plain, made):
        each.train()
    assert logged(made, "learning_rate") == logged(plain, "learning_rate")
    assert made.lr_scheduler.state_dict() == plain.lr_scheduler.state_dict()
    raised = {step + 1: 2 * 1e-2 * (1 - step / STEPS) for step in range(4, STEPS)}
    assert logged(made, "lr/adapter") == pytest.approx(raised)


def test_changes_are_told_and_logged_in_records_of_their_own(tmp_path, monkeypatch):
    """Also the one of the last step, after which TensorBoard's file is closed."""
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    schedule = RankTrainerCallback([CUT, Stage(At(fraction=1.0), Rank(1))])
    made = trainer(tmp_path, wrapped(), schedule, report_to=["tensorboard"])
    hearing = Hearing()
    made.add_callback(hearing)
    made.train()
    cut, last = schedule.history
    assert hearing.heard == [(4, cut, {2}), (STEPS, last, {1})]
    (file,) = (tmp_path / "board").rglob("*tfevents*")
    board = EventAccumulator(str(file)).Reload()
    size = sum(factor.numel() for factor in dynrank.adapter_parameters(made.model))
    for name, unit in (("rank/mean", 1), ("rank/max", 1), ("rank/parameters", size)):
        expected = {0: 4 * unit, 4: 2 * unit, STEPS: unit}
        assert logged(made, name) == expected
        assert {point.step: point.value for point in board.Scalars(f"train/{name}")} == expected


def test_what_is_printed_begins_with_the_slot_and_says_what_changes_cost(tmp_path, capsys):
    worse = iter(range(10, 20))
    model = get_peft_model(base(), LoraConfig(r=16, target_modules="all-linear"))
    costly = Stage(Plateau(min_delta=0.9, patience=1), Budget(final_rank=2), how=How(max_regression=0.0))
    evaluate = {"evaluate": lambda: {"eval_loss": float(next(worse))}}
    measured = early_budget(4, at=0.2, how=How("sqrt", max_regression=math.inf))
    schedule = RankTrainerCallback([*measured, costly], **evaluate)
    trainer(tmp_path, model, schedule, **EVALUATING).train()
    cut, undone = schedule.history
    assert (cut.undone, undone.undone, undone.reason) == (False, True, "plateau of val/loss")
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.startswith("a server reserves the highest rank of the adapter in every layer, up to 16; ")
    assert printed.count("a server reserves") == 1
    assert f"rank change at step 2: {cut.reason_and_cost}; adapter's rate × {cut.lr_factor:.3g} from here" in printed


# Evaluations


def test_validations_for_a_change_leave_nothing(assert_same, tmp_path):
    """No record, nothing that callbacks hear, and no random numbers of the dropout to come."""

    def trained(*stages):
        model = own()
        schedule = RankTrainerCallback([*stages])
        made = trainer(tmp_path, model, schedule, **EVALUATING)
        # A cut is always worse.
        made.compute_metrics = lambda _: {"ranks": min(ranks(model))}
        hearing = Hearing()
        made.add_callback(hearing)
        made.train()
        rows = [sorted(row) for row in made.state.log_history]
        return model, (rows, hearing.evaluated, hearing.logged), [event.undone for event in schedule.history]

    how = How(max_regression=0.0, check_monitor="eval_ranks", check_mode="max")
    plain, left, _ = trained()
    checked, left_too, undone = trained(*(Stage(At(step=step), Rank(1), how=how) for step in (3, 5)))
    assert undone == [True, True]
    assert_same(checked, plain)
    assert left_too == left


def test_changes_are_judged_by_a_data_set_of_several(tmp_path):
    """Two have two losses, of which none is eval_loss: that is missed at the first evaluation."""

    def made(monitor):
        how = How(max_regression=9.0, check_monitor=monitor)
        schedule = RankTrainerCallback(Stage(At(fraction=1.0), Rank(1), how=how))
        return schedule, trainer(tmp_path, own(), schedule, **EVALUATING, **SETS)

    schedule, judged = made("eval_b_loss")
    judged.train()
    measured = schedule.history[0].measured
    assert (measured.metric, measured.after) == ("eval_b_loss", judged.evaluate()["eval_b_loss"])
    _, missing = made("val/loss")
    with pytest.raises(ConfigurationError, match="got 'val/loss'; logged: .*'eval_a_loss'.*'eval_b_loss'"):
        missing.train()
    assert missing.state.global_step == 2


# A trigger, stages before it, and for each step at which it looks those of the logged losses of which it has the mean.
GAP, LOSS = Gap("train/loss", "eval_loss", window=9), Plateau("train/loss", patience=9)
LOOKS = [
    # Evaluations at 2 and 4 come before the first log, and a value says nothing twice.
    (GAP, [], {"eval_steps": 2, "logging_steps": 5}, {2: [], 4: [], 6: [5], 8: [], 10: [10]}),
    # Without evaluations each log is a look.
    (LOSS, [], {"eval_strategy": "no", "logging_steps": 4}, {4: [4], 8: [8]}),
    # The change at 4 lies between two logs, or within the steps of one.
    (LOSS, [CUT], {"eval_steps": 3}, {6: [5, 6], 9: [7, 8, 9], 10: [10]}),
    (GAP, [CUT], {"eval_steps": 3, "logging_steps": 3}, {6: [], 9: [9], 10: []}),
]


@pytest.mark.parametrize(("trigger", "before", "options", "looks"), LOOKS)
def test_trigger_reads_the_mean_of_the_losses_that_were_logged_since_its_last_look(
    trigger, before, options, looks, tmp_path
):
    """And none that is also of steps before a change."""
    schedule = RankTrainerCallback([*before, Stage(trigger, Rank(1))])
    seen = watched(schedule.driver)
    made = trainer(tmp_path, own(), schedule, **{"eval_strategy": "steps"} | options)
    with pytest.warns(UserWarning, match=f"training ended before stage {len(before) + 1}"):
        made.train()
    losses = logged(made, "loss")
    means = {at: statistics.mean([losses[step] for step in steps] or [torch.nan]) for at, steps in looks.items()}
    assert {step: loss for step, loss, *_ in seen} == pytest.approx(means, nan_ok=True)
    assert len(seen) == len(looks)


def test_trigger_reads_neither_evaluations_of_other_data_nor_validations_for_a_change(tmp_path):
    class Evaluating(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step in (1, 5):
                made.evaluate(data(4), metric_key_prefix="other")

    stages = [Stage(At(step=2), Rank(3), how=How(max_regression=9.0)), Stage(Plateau(patience=9), Rank(2))]
    schedule = RankTrainerCallback(stages, evaluate=lambda: made.evaluate())
    seen = watched(schedule.driver)
    made = trainer(tmp_path, own(), schedule, eval_strategy="steps", eval_steps=4)
    made.add_callback(Evaluating())
    with pytest.warns(UserWarning, match="training ended before stage 2"):
        made.train()
    losses = logged(made, "eval_loss")
    assert [*losses] == [2, 4, 8, STEPS]
    assert seen == [*losses.items()][1:]
    assert [*logged(made, "other_loss")] == [1, 5]
