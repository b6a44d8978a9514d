"""The schedule in a real transformers.Trainer, for dynrank's layers and for PEFT's, and its resume."""

import copy
import itertools
import pickle
import statistics
from functools import wraps
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
import transformers as hf
from peft import LoraConfig, PeftModel, get_peft_model
from small_trainer import (
    CUT,
    EVALUATING,
    SAVING,
    SHRINK_AND_GROW,
    SIZE,
    STEPS,
    Hearing,
    base,
    data,
    own,
    trainer,
    wrapped,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import IterableDataset
from trained import ranks
from transformers import Trainer, TrainerCallback

import dynrank
from dynrank.callbacks import RankTrainerCallback
from dynrank.errors import ConfigurationError
from dynrank.schedules import How, Stage, auto, early_budget
from dynrank.targets import Budget, Rank
from dynrank.triggers import At, Gap, Plateau


def wrapped_experts():
    torch.manual_seed(0)
    size = {"moe_intermediate_size": 24, "num_key_value_heads": 2, "head_dim": 8}
    model = hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(num_experts=3, num_experts_per_tok=2, **SIZE, **size))
    options = {"target_modules": ["q_proj", "o_proj"], "target_parameters": ["gate_up_proj", "down_proj"]}
    return get_peft_model(model, LoraConfig(r=4, lora_alpha=8, **options))


def tied():
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(intermediate_size=24, tie_word_embeddings=True, **SIZE))
    return dynrank.add_lora(model, rank=4, alpha=4, target_modules=["q_proj", "lm_head"])


MISNAMED = {"max_regression": 1, "check_monitor": "val_loss"}
TOO_COSTLY = {"max_regression": 0.1, "check_monitor": "eval_loss"}
SETS = {"evaluated": {"a": data(4), "b": data(8)}}
STREAM = datasets.IterableDataset.from_generator(lambda: iter(data(4 * STEPS)))

ON_START = {"eval_strategy": "steps", "eval_steps": 3, "eval_on_start": True}

# For each: the model, the stages, options of the Trainer, and the changes.
RUNS = {
    "own layers": (own, SHRINK_AND_GROW, {}, [(4, 4, 2), (7, 2, 3)]),
    "experts of PEFT": (wrapped_experts, SHRINK_AND_GROW, {}, [(4, 4, 2), (7, 2, 3)]),
    "a head tied to the embedding": (tied, SHRINK_AND_GROW, {}, [(4, 4, 2), (7, 2, 3)]),
    # At step 4 one evaluation of both sets is still to come, and at 6 the change is decided and not made.
    "a plateau": (own, [Stage(Plateau("eval_b_loss", min_delta=0.9), Rank(2))], EVALUATING | SETS, [(6, 4, 2)]),
    # A resumed run evaluates once more.
    "evaluated on start": (own, [Stage(Plateau(min_delta=0.9, patience=2), Rank(2))], ON_START, [(9, 4, 2)]),
    # ``max_steps`` alone tells the length of the run.
    "streamed data": (own, [Stage(At(fraction=0.3), Rank(2))], {"dataset": STREAM}, [(3, 4, 2)]),
}


@pytest.mark.parametrize("name", RUNS)
def test_ranks_follow_the_schedule_and_a_resumed_run_has_the_same_weights(name, assert_same, tmp_path):
    make, stages, options, changes = RUNS[name]
    model = make()
    whole = RankTrainerCallback(stages)
    trainer(tmp_path, model, whole, **options, **SAVING).train()
    assert [(event.step, event.layers[0].rank_before, event.layers[0].rank_after) for event in whole.history] == changes
    for start in (4, 6):
        again = make()
        resumed = RankTrainerCallback(stages)
        made = trainer(tmp_path / "again", again, resumed, **options)
        made.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{start}"))
        assert resumed.history == whole.history
        assert_same(again, model, start)


@pytest.mark.parametrize("make", [own, wrapped])
def test_attached_callback_does_what_the_constructor_s_does_also_in_a_resumed_run(
    make, assert_same, tmp_path, monkeypatch
):
    """And no stack is walked."""
    reference = make()
    schedule = RankTrainerCallback(SHRINK_AND_GROW)
    trainer(tmp_path / "reference", reference, schedule).train()
    monkeypatch.delattr("dynrank.callbacks.transformers.rank_trainer_callback.calling_trainer")
    # Checkpoints before the first change, at it, and after the second one.
    for start in (None, 2, 4, 8):
        model = make()
        made = trainer(tmp_path, model, None, **SAVING)
        attached = RankTrainerCallback(SHRINK_AND_GROW)
        assert attached.attach(made) is attached
        made.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{start}") if start else None)
        assert attached.history == schedule.history
        assert_same(model, reference, start)


@pytest.mark.parametrize("make", [own, wrapped])
def test_each_model_of_model_init_has_the_whole_schedule_and_takes_the_ranks_of_a_checkpoint(
    make, assert_same, tmp_path
):
    """The Trainer makes its model anew in each training, and loads the checkpoint right after that."""
    schedule = RankTrainerCallback(SHRINK_AND_GROW)
    made = trainer(tmp_path, None, schedule, model_init=make, **SAVING)
    made.train()
    model = made.model
    history = schedule.history
    assert [(event.step, event.layers[0].rank_before) for event in history] == [(4, 4), (7, 2)]
    # Without a checkpoint, and from those before the first change, at it, and after the second one.
    for start in (None, 2, 4, 8):
        made.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{start}") if start else None)
        assert made.model is not model
        assert schedule.history == history
        assert_same(made.model, model, start)
        fresh = RankTrainerCallback(SHRINK_AND_GROW)
        again = trainer(tmp_path, None, fresh, model_init=make, **SAVING)
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{start}") if start else None)
        assert fresh.history == history
        assert_same(again.model, model, start)


@pytest.mark.parametrize("last", [1, 5])
def test_training_that_begins_again_with_less_in_a_batch_goes_on_with_the_schedule(tmp_path, last):
    """After an error of memory, auto_find_batch_size trains the same model again from step 0: before or after a cut."""

    class Exhausted(TrainerCallback):
        def __init__(self):
            self.steps = []

        def on_step_end(self, args, state, control, **_):
            self.steps.append(state.global_step)
            if self.steps == [*range(1, last + 1)]:
                raise RuntimeError("CUDA out of memory.")

    schedule = RankTrainerCallback(CUT)
    made = trainer(tmp_path, own(), schedule, auto_find_batch_size=True)
    exhausted = Exhausted()
    made.add_callback(exhausted)
    made.train()
    assert exhausted.steps == [*range(1, last + 1), *range(1, STEPS + 1)]
    assert [event.step for event in schedule.history] == [CUT.when.step]
    assert ranks(made.model) == {2}
    # A second training of the same model is refused as before.
    with pytest.raises(ConfigurationError, match=f"this schedule is at step {STEPS} of another run"):
        made.train()


@pytest.mark.filterwarnings("ignore")
def test_trials_of_a_search_begin_at_the_full_rank_and_are_judged_by_their_evaluations(tmp_path):
    """A trigger begins anew, too: it would fire earlier in the second trial if it remembered the first one."""
    hearing = Hearing()
    # Each trial has five evaluations, of which none but the first is better.
    schedule = RankTrainerCallback(Stage(Plateau("eval_loss", min_delta=9.0, patience=3), Rank(2)))
    made = trainer(tmp_path, None, schedule, model_init=lambda trial: wrapped(), **EVALUATING)
    made.add_callback(hearing)
    losses = []
    evaluate = made.evaluate
    made.evaluate = lambda *args, **options: losses.append(evaluate(*args, **options)) or losses[-1]
    found = made.hyperparameter_search(
        lambda trial: {"learning_rate": trial.suggest_categorical("learning_rate", [1e-3, 1e-2])},
        n_trials=3,
        backend="optuna",
    )
    assert [(step, {*event.ranks_before}, now) for step, event, now in hearing.heard] == [(8, {4}, {2})] * 3
    # The objective of a Trainer without metrics is the loss of a trial's last evaluation.
    ends = [metrics["eval_loss"] for metrics in losses if metrics["epoch"] == max(m["epoch"] for m in losses)]
    assert len(ends) == 3
    assert found.objective == min(ends)


def test_callback_that_was_added_late_is_refused_with_the_cure(tmp_path):
    schedule = RankTrainerCallback(CUT)
    # Another Trainer that was given it properly changes nothing for this one.
    trainer(tmp_path, own(), schedule)
    made = trainer(tmp_path, own(), None)
    made.add_callback(schedule)
    with pytest.raises(ConfigurationError, match=r"RankTrainerCallback\(\.\.\.\)\.attach\(trainer\)") as raised:
        made.train()
    assert raised.value.arguments == ("callbacks",)
    assert made.state.global_step == 0
    schedule.attach(made)
    made.train()
    assert ranks(made.model) == {2}


def test_callback_can_be_pickled_before_its_run():
    """As programs do that start the run in another process."""
    copied = pickle.loads(pickle.dumps(RankTrainerCallback(CUT, rank_map={"o_proj": {"pinned": True}})))
    assert repr(copied.driver.stages) == repr(RankTrainerCallback(CUT).driver.stages)


def test_attaching_checks_the_arguments_and_adds_the_callback_once(tmp_path):
    made = trainer(tmp_path, own(), None, restore_callback_states_from_checkpoint=True)
    with pytest.raises(ConfigurationError, match="set it to False") as raised:
        RankTrainerCallback(CUT).attach(made)
    assert raised.value.arguments == ("restore_callback_states_from_checkpoint",)
    schedule = RankTrainerCallback(CUT)
    made = trainer(tmp_path, own(), schedule)
    schedule.attach(made)
    assert made.callback_handler.callbacks.count(schedule) == 1
    made.train()
    assert len(schedule.history) == 1


def test_callback_of_two_trainers_belongs_to_the_one_that_trains(tmp_path):
    schedule = RankTrainerCallback(CUT)
    first = trainer(tmp_path, own(), None)
    schedule.attach(first)
    second = trainer(tmp_path, own(), schedule)
    second.train()
    assert schedule.trainer is second
    assert ranks(second.model) == {2}
    assert ranks(first.model) == {4}


def test_a_callback_that_waits_never_looks_through_the_modules(tmp_path, monkeypatch):
    """While it trains, evaluates and accumulates."""
    walks = []
    named_modules = torch.nn.Module.named_modules

    def counted(module, *args, **options):
        if isinstance(module, PeftModel):
            walks.append(module)
        return named_modules(module, *args, **options)

    monkeypatch.setattr(torch.nn.Module, "named_modules", counted)

    def run(steps, *stages):
        walks.clear()
        schedule = RankTrainerCallback([*stages]) if stages else None
        options = {"gradient_accumulation_steps": 2, **EVALUATING}
        trainer(tmp_path, wrapped(), schedule, max_steps=steps, **options).train()
        return len(walks)

    waiting = Stage(At(fraction=1.0), Rank(3))
    assert run(10, waiting) - run(2, waiting) == run(10) - run(2)


class Taking(TrainerCallback):
    """{id of a parameter: its rate} in each step, as the optimizer has it."""

    def __init__(self):
        self.rates = []

    def on_step_begin(self, args, state, control, optimizer, **_):
        # The last hook sees what the schedule's hook has set.
        self.hook = optimizer.optimizer.register_step_pre_hook(lambda inner, *_: self.rates.append(self.of(inner)))

    def on_step_end(self, *_, **__):
        self.hook.remove()

    def of(self, optimizer):
        return {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}


def test_changes_and_the_rate_of_the_steps_are_told_printed_and_stored(tmp_path, capsys, monkeypatch, wandb_run):
    """By TensorBoard and W&B; also the change behind the last step, after which TensorBoard's file is closed."""
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))

    def run(folder, start=None, **options):
        model = wrapped()
        schedule = RankTrainerCallback([CUT, Stage(At(fraction=1.0), Rank(1))])
        made = trainer(folder, model, schedule, **options)
        listeners = Hearing(), Taking()
        for listener in listeners:
            made.add_callback(listener)
        made.train(resume_from_checkpoint=start)
        taken = [max(rates.values()) for rates in listeners[1].rates]
        return made, schedule.history, listeners[0].heard, taken

    made, (cut, last), heard, taken = run(tmp_path, report_to=["tensorboard", "wandb"], **SAVING)
    assert heard == [(4, cut, {2}), (STEPS, last, {1})]
    printed = " ".join(capsys.readouterr().out.split())
    assert "rank change at step 4: step 4" in printed
    assert "│ all │ 7 │ 4 → 2 │" in printed
    parameters = sum(factor.numel() for factor in dynrank.adapter_parameters(made.model))
    (file,) = (tmp_path / "board").rglob("*tfevents*")
    board = EventAccumulator(str(file)).Reload()
    stored = wandb_run[1]()
    expected = dict.fromkeys(["rank/mean", "rank/max"], [4, 2, 1])
    expected |= {"rank/parameters": [4 * parameters, 2 * parameters, parameters]}
    for name, values in expected.items():
        points = board.Scalars(f"train/{name}")
        # Once at the start, with each log, at each change, and with the results at the end.
        steps = [0, 1, 2, 3, 4, 4, 5, 6, 7, 8, 9, STEPS, STEPS, STEPS]
        assert [point.step for point in points] == steps
        start, middle, end = values
        assert [point.value for point in points] == [start] * 5 + [middle] * 8 + [end]
        assert [row[f"train/{name}"] for row in stored if f"train/{name}" in row] == [point.value for point in points]

    logged = [row["learning_rate"] for row in made.state.log_history if "learning_rate" in row]
    assert taken == pytest.approx([1e-2 * (1 - step / STEPS) * (2 if step >= 4 else 1) for step in range(STEPS)])
    # The Trainer logs the rate of the step that comes next or of the one that was made, by version.
    assert logged[5:9] in (pytest.approx(taken[5:9]), pytest.approx(taken[6:10]))
    assert [point.value for point in board.Scalars("train/learning_rate")] == pytest.approx(logged)
    assert [row["train/learning_rate"] for row in stored if "train/learning_rate" in row] == pytest.approx(logged)
    assert not any("lr/adapter" in row for row in made.state.log_history)
    *_, resumed = run(tmp_path / "again", str(tmp_path / "checkpoint-6"))
    assert resumed == taken[6:]


def test_evaluations_of_a_check_are_heard_by_nobody_and_leave_nothing(tmp_path):
    """Not even in the random numbers of the dropout to come."""

    def trained(stages):
        worse = itertools.count(1)
        model = own()
        hearing = Hearing()
        schedule = RankTrainerCallback(stages, evaluate=lambda: made.evaluate() | {"eval_loss": float(next(worse))})
        made = trainer(tmp_path, model, schedule, eval_strategy="steps", eval_steps=4)
        made.add_callback(hearing)
        made.train()
        assert hearing.evaluated == [4, 8, STEPS]
        rows = [sorted(row) for row in made.state.log_history]
        return rows, model.state_dict(), [event.undone for event in schedule.history]

    how = How(**TOO_COSTLY | {"max_regression": 0.0})
    plain, checked = (trained(stages) for stages in ([], [Stage(At(step=step), Rank(1), how=how) for step in (3, 5)]))
    assert checked[2] == [True] * 2
    assert plain[0] == checked[0]
    for name, value in plain[1].items():
        assert torch.equal(checked[1][name], value), name


def test_what_is_printed_has_the_trainer_s_names_and_begins_with_the_slot(tmp_path, capsys):
    worse = itertools.count(10)
    model = get_peft_model(base(), LoraConfig(r=16, target_modules="all-linear"))
    costly = Stage(Plateau(min_delta=0.9, patience=1), Budget(final_rank=2), how=How(max_regression=0.0))
    evaluate = {"evaluate": lambda: {"eval_loss": float(next(worse))}}
    schedule = RankTrainerCallback([*early_budget(4, at=0.2), costly], measure=True, **evaluate)
    trainer(tmp_path, model, schedule, **EVALUATING).train()
    cut, undone = schedule.history
    assert (cut.measured.metric, undone.measured.metric, undone.undone) == ("eval_loss", "eval_loss", True)
    assert undone.reason == f"undone: {undone.measured} (plateau of eval_loss)"
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.startswith("a server reserves the highest rank in every layer, up to 16; highest=8 limits it")
    assert printed.count("a server reserves") == 1
    assert "val/loss" not in printed
    assert f"adapter's rate × {cut.lr_factor:.3g} from here" in printed


@pytest.mark.parametrize(
    ("options", "stage", "message"),
    [
        ({}, Stage(At(step=4), Rank(2), how=How(**TOO_COSTLY)), "give the Trainer an eval_dataset"),
        ({"optim": "rmsprop", "optim_args": "centered=True"}, CUT, r"RMSprop\(centered\) cannot be carried"),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_step(options, stage, message, tmp_path):
    made = trainer(tmp_path, own(), RankTrainerCallback(stage), **options)
    made.eval_dataset = None
    with pytest.raises(ConfigurationError, match=message):
        made.train()
    made.add_callback(RankTrainerCallback(stage))
    with pytest.raises(ConfigurationError, match="one RankTrainerCallback .*, got several.*join their stages"):
        made.train()
    assert made.state.global_step == 0


def test_callbacks_that_a_resume_would_make_anew_are_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="restore_callback_states_from_checkpoint makes.* set it to False"):
        trainer(tmp_path, own(), RankTrainerCallback(CUT), restore_callback_states_from_checkpoint=True)


def test_copies_by_arguments_are_refused():
    """As the Trainer would have it with two GPUs: first of all."""
    with pytest.raises(ConfigurationError, match=r"set to 2 GPUs.*torchrun"):
        RankTrainerCallback(CUT).on_train_begin(SimpleNamespace(n_gpu=2), None, None)


@pytest.mark.parametrize(
    "stage", [Stage(Plateau("val_loss"), Rank(2)), Stage(At(step=9), Rank(2), how=How(**MISNAMED))]
)
def test_metric_that_no_evaluation_has_is_named_at_the_first_one(stage, tmp_path):
    made = trainer(tmp_path, own(), RankTrainerCallback(stage), **EVALUATING)
    with pytest.raises(ConfigurationError, match="must name a metric that is logged, got 'val_loss'; .*'eval_loss'"):
        made.train()
    assert made.state.global_step == 2


@pytest.mark.parametrize(
    ("train", "val", "options", "stop", "missed"),
    [
        ("loss", "eval_loss", {}, 10, None),
        ("los", "eval_loss", {}, 6, "got 'los'"),
        ("loss", "eval_los", {}, 2, "got 'eval_los'"),
        ("loss", "eval_loss", {"logging_strategy": "no"}, 2, "got 'loss'"),
    ],
)
def test_gap_waits_for_the_first_loss_that_training_logs(train, val, options, stop, missed, tmp_path):
    """Evaluations at 2 and 4 come before the first log, at 5."""
    schedule = RankTrainerCallback(Stage(Gap(train, val, window=10), Rank(2)))
    made = trainer(tmp_path, own(), schedule, **EVALUATING, **{"logging_steps": 5, **options})
    unreached = pytest.warns(UserWarning, match="training ended before stage 1")
    with pytest.raises(ConfigurationError, match=missed) if missed else unreached:
        made.train()
    assert made.state.global_step == stop
    assert len(schedule.driver.stages[0].when.state_dict()["_gaps"]) == (0 if missed else 3)


def observed(schedule, trigger):
    """Let ``schedule`` note in a list what ``trigger`` observes: (step, value)."""
    seen = []
    (stage,) = [stage for stage in schedule.driver.stages if type(stage.when) is trigger]
    observe = stage.when.observe
    stage.when.observe = lambda step, *values: seen.append((step, *values)) or observe(step, *values)
    return seen


def test_trigger_reads_each_value_that_training_logs_once(tmp_path):
    """At evaluations, which are more frequent; where there are none, at each log."""
    for options, steps in (({**EVALUATING, "logging_steps": 5}, [6, 10]), ({"logging_steps": 4}, [4, 8])):
        schedule = RankTrainerCallback(Stage(Plateau("loss", patience=9), Rank(2)))
        seen = observed(schedule, Plateau)
        made = trainer(tmp_path, own(), schedule, **options)
        with pytest.warns(UserWarning, match="training ended before stage 1"):
            made.train()
        losses = [log["loss"] for log in made.state.log_history if "loss" in log]
        assert seen == list(zip(steps, losses, strict=True))
    # A metric of evaluations may still come where the Trainer makes none; it is not refused.
    schedule = RankTrainerCallback(Stage(Plateau("eval_loss"), Rank(2), deadline=0.5))
    trainer(tmp_path, own(), schedule).train()
    assert [event.step for event in schedule.history] == [STEPS // 2]


# Step of the evaluation, and of the last loss; the Trainer also evaluates at the end.
@pytest.mark.parametrize(("every", "steps"), [(3, [(9, 9), (10, 9)]), (2, [(6, 6), (8, 8), (10, 10)])])
def test_trigger_reads_no_loss_of_steps_before_a_change(every, steps, tmp_path):
    """The Trainer logs a mean over the steps since its last log, and the change comes within those, or between them."""
    schedule = RankTrainerCallback([CUT, Stage(Gap("loss", "eval_loss", window=9), Rank(1))])
    seen = observed(schedule, Gap)
    made = trainer(tmp_path, own(), schedule, logging_steps=every, eval_strategy="steps", eval_steps=every)
    with pytest.warns(UserWarning, match="training ended before stage 2"):
        made.train()
    losses = {log["step"]: log["loss"] for log in made.state.log_history if "loss" in log}
    assert [(step, loss) for step, loss, _ in seen] == [(step, losses[at]) for step, at in steps]


@pytest.mark.parametrize("kind", ["evaluates", "logs"])
def test_metric_that_the_program_measures_by_itself_is_read_when_it_comes(kind, tmp_path):
    """The Trainer does not evaluate, and its first logs come before the first of these metrics."""

    class Measuring(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step in (3, 7):
                kept = copy.copy(control)
                if kind == "logs":
                    made.log({"val/loss": 10.0 * state.global_step})
                else:
                    made.evaluate(data(4), metric_key_prefix="dev")
                vars(control).update(vars(kept))

    trigger = Plateau("dev_loss", patience=9) if kind == "evaluates" else Gap("loss", "val/loss", window=9)
    schedule = RankTrainerCallback(Stage(trigger, Rank(2)))
    seen = observed(schedule, type(trigger))
    made = trainer(tmp_path, own(), schedule, logging_steps=2)
    made.add_callback(Measuring())
    with pytest.warns(UserWarning, match="training ended before stage 1"):
        made.train()
    logs = made.state.log_history
    if kind == "evaluates":
        assert seen == [(log["step"], log["dev_loss"]) for log in logs if "dev_loss" in log]
    else:
        losses = {log["step"]: log["loss"] for log in logs if "loss" in log}
        assert seen == [(3, losses[2], 30.0), (7, losses[6], 70.0)]
    assert len(seen) == 2


@pytest.mark.parametrize("first", [1, 5])
def test_evaluation_of_other_data_with_a_prefix_of_its_own_is_none_of_the_trigger_s(first, tmp_path):
    """It begins before or after the Trainer's own, whose metric it must not repeat."""

    class Other(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step >= first:
                kept = copy.copy(control)
                made.evaluate(data(4), metric_key_prefix="train")
                vars(control).update(vars(kept))

    schedule = RankTrainerCallback(Stage(Plateau("eval_loss", patience=9), Rank(2)))
    seen = observed(schedule, Plateau)
    made = trainer(tmp_path, own(), schedule, eval_strategy="steps", eval_steps=4)
    made.add_callback(Other())
    with pytest.warns(UserWarning, match="training ended before stage 1"):
        made.train()
    losses = [(log["step"], log["eval_loss"]) for log in made.state.log_history if "eval_loss" in log]
    assert len(losses) >= 2
    assert seen == losses


@pytest.mark.parametrize("kind", [np.float32, torch.tensor, lambda value: np.array([value])])
def test_own_evaluation_may_return_what_numpy_and_torch_compute(kind, tmp_path):
    schedule = RankTrainerCallback(CUT, measure=True, evaluate=lambda: {"val/loss": kind(0.25), "kind": "none"})
    trainer(tmp_path, own(), schedule).train()
    assert (schedule.history[0].measured.before, schedule.history[0].measured.metric) == (0.25, "val/loss")


@pytest.mark.parametrize(("stages", "measure"), [(auto(0.3, at=0.5), False), (CUT, True)])
def test_metric_of_a_check_is_missed_at_the_first_evaluation(stages, measure, tmp_path):
    """Two data sets have two losses, of which none is eval_loss; a user's function may return one all the same."""
    asked = []

    def run(**more):
        def evaluate():
            asked.append(made.state.global_step)
            return made.evaluate() | more

        schedule = RankTrainerCallback(stages, evaluate=evaluate, measure=measure)
        made = trainer(tmp_path, own(), schedule, eval_strategy="steps", eval_steps=2, **SETS)
        made.train()
        return schedule

    with pytest.raises(ConfigurationError, match="check_monitor .*got 'val/loss'; logged: .*'eval_a_loss'") as raised:
        run()
    assert "eval_b_loss" in str(raised.value)
    assert asked == [2]
    assert run(eval_loss=1.0).history


def test_recommended_schedule_raises_the_adapter_s_rate_and_never_the_head_s(assert_same, tmp_path):
    def run(folder, **options):
        torch.manual_seed(0)
        config = hf.LlamaConfig(intermediate_size=24, pad_token_id=0, **SIZE)
        model = hf.LlamaForSequenceClassification(config)
        model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=8, target_modules="all-linear"))
        rows = [{"input_ids": row["input_ids"], "labels": i % 2} for i, row in enumerate(data())]
        made = trainer(folder, model, RankTrainerCallback(2), rows, **SAVING)
        taking = Taking()
        made.add_callback(taking)
        made.train(**options)
        return model, made, taking.rates

    model, made, rates = run(tmp_path)
    adapters = {id(p) for p in dynrank.adapter_parameters(model)}
    factor = (8 / statistics.mean(layer.rank for _, layer in dynrank.lora_layers(model))) ** 0.5
    assert factor > 1.5
    assert len(rates[-2]) > len(adapters)
    for parameter, rate in rates[-2].items():
        assert rate == pytest.approx(2e-3 * (factor if parameter in adapters else 1.0)), parameter in adapters
    shown = [row for row in made.state.log_history if "learning_rate" in row]
    raised = [row for row in shown if "lr/adapter" in row]
    assert 0 < len(raised) < len(shown) == STEPS
    # In one record both rates are of one step.
    assert [row["lr/adapter"] for row in raised] == pytest.approx([factor * row["learning_rate"] for row in raised])
    again, *_ = run(tmp_path / "again", resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert_same(again, model)


@pytest.mark.parametrize("several", [False, True], ids=["one set", "two sets"])
def test_cost_of_a_change_is_measured_on_a_share_of_long_evaluation_sets(tmp_path, several, monkeypatch):
    asked = []
    losses = []
    name = "eval_a_loss" if several else "eval_loss"
    evaluate = Trainer.evaluate

    # It is still a function of transformers.
    @wraps(evaluate)
    def watched(self, **named):
        found = evaluate(self, **named)
        # For each of several sets it calls itself.
        if not named:
            sets = self.eval_dataset if several else {"": self.eval_dataset}
            asked.append({key: len(part) for key, part in sets.items()})
            losses.append(found[name])
        return found

    monkeypatch.setattr(Trainer, "evaluate", watched)
    monitor = name if several else "val/loss"
    stage = Stage(At(step=4), Rank(1), how=How(check_monitor=monitor))
    schedule = RankTrainerCallback([stage], measure=True)
    given = {"a": data(), "b": data(8)} if several else data()
    workers = {"dataloader_persistent_workers": True, "dataloader_num_workers": 1}
    made = trainer(tmp_path, own(), schedule, evaluated=given, max_steps=6, per_device_eval_batch_size=1, **workers)
    made.train()
    assert made.eval_dataset is given
    # Nor does the Trainer keep the loader of the share.
    assert len(made.get_eval_dataloader("a" if several else None)) == 16
    # One change of a short run gets 4 batches, rounded to rows at equal distances.
    assert asked == asked[:1] * 2
    assert 0 < sum(asked[0].values()) <= 4 + several < 16
    measured = schedule.history[0].measured
    assert (measured.metric, measured.before, measured.after, measured.all_data) == (name, *losses, False)
    assert losses[0] != losses[1]


class Streamed(IterableDataset):
    """Rows that can be read in order alone, and their number, as webdataset's."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)

    def __len__(self):
        return len(self.rows)


class OwnRows(Trainer):
    def get_eval_dataloader(self, eval_dataset=None):
        return super().get_eval_dataloader(data())


@pytest.mark.parametrize("who", ["a function", "a class", "a stream"])
def test_cost_of_a_change_is_measured_on_all_rows_where_others_may_be_evaluated(tmp_path, who):
    own_function = {"evaluate": lambda: made.evaluate(data())} if who == "a function" else {}
    schedule = RankTrainerCallback([Stage(At(step=4), Rank(1))], measure=True, **own_function)
    options = {"evaluated": Streamed(data()) if who == "a stream" else data(), "max_steps": 6}
    kind = {"kind": OwnRows} if who == "a class" else {}
    made = trainer(tmp_path, own(), schedule, per_device_eval_batch_size=1, **options, **kind)
    made.train()
    measured = schedule.history[0].measured
    assert measured.all_data
    # The weights are those after the change, as training goes on.
    assert measured.before != measured.after


class Taken(TrainerCallback):
    """{the step: its rate}"""

    def __init__(self):
        self.rates = {}

    def on_pre_optimizer_step(self, args, state, control, optimizer, **_):
        self.rates[state.global_step] = optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize("limit", [{"min_lr": 4e-3}, {"min_lr_rate": 0.4}])
@pytest.mark.parametrize("kind", ["cosine_with_min_lr", "cosine_warmup_with_min_lr"])
def test_lowest_rate_of_a_scheduler_stays_and_its_share_follows_the_base_rate(tmp_path, kind, limit):
    def run(callback, start=None, **options):
        taken = Taken()
        options = {"lr_scheduler_type": kind, "warmup_steps": 3, **SAVING, **options}
        made = trainer(tmp_path / str(start), own(), callback, **options)
        made.add_callback(taken)
        source = tmp_path / "None" / f"checkpoint-{start}"
        made.train(resume_from_checkpoint=str(source) if start else None)
        return taken.rates

    before = run(None, lr_scheduler_kwargs=limit)
    share = {"min_lr_rate": 0.2 if "min_lr" in limit else 0.4}
    after = run(None, lr_scheduler_kwargs=share, learning_rate=2e-2)
    expected = {step: (before if step < 4 else after)[step] for step in range(STEPS)}
    assert run(RankTrainerCallback(CUT), lr_scheduler_kwargs=limit) == pytest.approx(expected)
    rest = run(RankTrainerCallback(CUT), start=6, lr_scheduler_kwargs=limit)
    assert rest == pytest.approx({step: expected[step] for step in range(6, STEPS)})
    two = [
        Stage(At(step=step), Rank(rank), how=How(lr_factor=factor)) for step, rank, factor in ((2, 3, 4.0), (4, 2, 0.5))
    ]
    found = run(RankTrainerCallback(two), lr_scheduler_kwargs=limit)
    assert {step: found[step] for step in range(4, STEPS)} == pytest.approx({s: expected[s] for s in range(4, STEPS)})


def test_rate_that_a_callback_sets_is_raised(tmp_path):
    class Setting(TrainerCallback):
        def on_step_begin(self, args, state, control, optimizer, **_):
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 * 0.9**state.global_step

    used = {}

    def watch(optimizer, *_):
        used[len(used)] = optimizer.param_groups[0]["lr"]

    class Watching(TrainerCallback):
        def on_train_begin(self, args, state, control, optimizer, **_):
            getattr(optimizer, "optimizer", optimizer).register_step_pre_hook(watch)

    made = trainer(tmp_path, own(), RankTrainerCallback(CUT))
    made.add_callback(Setting())
    made.add_callback(Watching())
    made.train()
    assert used == pytest.approx({step: 1e-2 * 0.9**step * (2 if step >= 4 else 1) for step in range(STEPS)})


# Single layers


def llama_of_peft():
    """As :func:`wrapped`, of rank 12 and with a rank_pattern of its own."""
    options = {"r": 12, "lora_alpha": 12, "target_modules": "all-linear", "rank_pattern": {"up_proj": 10}}
    return get_peft_model(base(), LoraConfig(**options))


STEERED = {"o_proj": {"pinned": True}, "mlp": {"highest": 8}, "attention": {"lowest": 3}}


def steered(folder, rank_map=STEERED, **options):
    """(the ranks at the end by the last part of the name, the callback)"""
    stages = early_budget(7, at=0.3) + early_budget(5, at=0.7)
    callback = RankTrainerCallback(stages, rank_map=rank_map)
    model = llama_of_peft()
    trainer(folder, model, callback, save_strategy="steps", save_steps=5).train(**options)
    return {name.rpartition(".")[2]: layer.rank for name, layer in dynrank.lora_layers(model)}, callback


def test_single_layers_of_a_peft_model_are_steered_and_a_resume_goes_on(tmp_path):
    ends, callback = steered(tmp_path)
    assert ends["o_proj"] == 12
    assert max(ends[name] for name in ("gate_proj", "up_proj", "down_proj")) <= 8
    assert min(ends[name] for name in ("q_proj", "k_proj", "v_proj")) >= 3
    first, second = callback.history
    assert not any("o_proj" in report.layer for event in (first, second) for report in event.layers)
    # The first cut has left no layer of the MLP above 8.
    assert max(report.rank_after for report in first.layers if ".mlp." in report.layer) <= 8
    again, resumed = steered(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert again == ends
    assert resumed.history == callback.history
    with pytest.raises(
        ConfigurationError, match=r"under another rank_map: .*'mlp': RankBounds\(highest=8\).*here .*none"
    ):
        steered(tmp_path, None, resume_from_checkpoint=str(tmp_path / "checkpoint-5"))


@pytest.mark.parametrize(
    ("rank_map", "message"),
    [
        ({"o_prj": {"pinned": True}}, r"'o_prj' matches no LoRA layer; nearest: \['o_proj'"),
        ({".*proj": {"highest": 8}, "o_proj": {"pinned": True}}, r"'o_proj' is hidden by '\.\*proj'"),
        ({"up_proj": {"lowest": 11}}, "up_proj': lowest=11 is above its rank 10, and no stage raises it"),
    ],
)
def test_a_rank_map_that_does_not_fit_ends_the_training_before_its_first_step(rank_map, message, tmp_path):
    model = llama_of_peft()
    run = trainer(tmp_path, model, RankTrainerCallback(4, rank_map=rank_map))
    with pytest.raises(ConfigurationError, match=message):
        run.train()
    assert run.state.global_step == 0
