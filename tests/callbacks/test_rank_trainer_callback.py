"""The schedule in a real transformers.Trainer, for dynrank's layers and for PEFT's, and its resume."""

import itertools
import json
import re
import shutil
import statistics
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
import transformers as hf
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from trained import ranks
from transformers import Trainer, TrainerCallback, TrainingArguments

import dynrank
from dynrank.callbacks import RankTrainerCallback
from dynrank.callbacks.transformers import follow
from dynrank.errors import ConfigurationError
from dynrank.schedules import How, Stage, auto
from dynrank.targets import GrowTo, Rank
from dynrank.triggers import At, Plateau

STEPS = 10
SIZE = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def base():
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(hf.LlamaConfig(intermediate_size=24, **SIZE))


def own():
    return dynrank.add_lora(base(), rank=4, alpha=8, dropout=0.1)


def wrapped():
    model = base()
    return get_peft_model(model, LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules="all-linear"))


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
SAVING = {"save_strategy": "steps", "save_steps": 2}
EVALUATING = {"eval_strategy": "steps", "eval_steps": 2}
CUT = Stage(At(step=4), Rank(2), how=How(lr_factor=2.0))
SHRINK_AND_GROW = [CUT, Stage(At(step=7), GrowTo(3))]


def data(count=16):
    rows = torch.randint(40, (count, 6), generator=torch.Generator().manual_seed(1)).tolist()
    return [{"input_ids": row, "labels": row} for row in rows]


SETS = {"evaluated": {"a": data(4), "b": data(8)}}
STREAM = datasets.IterableDataset.from_generator(lambda: iter(data(4 * STEPS)))


def trainer(folder, model, callback, dataset=None, evaluated=None, **options):
    defaults = {"max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1}
    defaults |= {"seed": 0, "use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no"}
    arguments = TrainingArguments(output_dir=str(folder), **{**defaults, **options})
    dataset = dataset or data()
    evaluated = evaluated or dataset
    return Trainer(model, arguments, train_dataset=dataset, eval_dataset=evaluated, callbacks=[callback])


# For each: the model, the stages, options of the Trainer, and the changes.
RUNS = {
    "own layers": (own, SHRINK_AND_GROW, {}, [(4, 4, 2), (7, 2, 3)]),
    "experts of PEFT": (wrapped_experts, SHRINK_AND_GROW, {}, [(4, 4, 2), (7, 2, 3)]),
    "a head tied to the embedding": (tied, SHRINK_AND_GROW, {}, [(4, 4, 2), (7, 2, 3)]),
    # At step 4 one evaluation of both sets is still to come, and at 6 the change is decided and not made.
    "a plateau": (own, [Stage(Plateau("eval_b_loss", min_delta=0.9), Rank(2))], EVALUATING | SETS, [(6, 4, 2)]),
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
    said = "\n".join(str(warning.message) for warning in caught)
    for kind, step, rank in (("last", 10, 3), ("best", 2, 4))[: 1 + keep]:
        words = f"the {kind} checkpoint, '.*checkpoint-{step}', has rank {rank}, but the trained model has rank 2:"
        assert re.search(rf"{words}.*save_model", said)
    assert (made.state.best_model_checkpoint is None) != keep
    made.save_model(str(tmp_path / "end"))
    assert ranks(PeftModel.from_pretrained(base(), tmp_path / "end")) == {2}


class Hearing(TrainerCallback):
    def __init__(self):
        self.heard = []
        self.evaluated = []

    def on_rank_change(self, args, state, control, event, model, **_):
        self.heard.append((state.global_step, event, ranks(model)))

    def on_evaluate(self, args, state, control, **_):
        self.evaluated.append(state.global_step)


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
    expected = {"rank/mean": [2, 1], "rank/max": [2, 1], "rank/parameters": [2 * parameters, parameters]}
    for name, values in expected.items():
        points = board.Scalars(f"train/{name}")
        assert [point.step for point in points] == [4, STEPS]
        assert [point.value for point in points] == values
        assert [row[f"train/{name}"] for row in stored if f"train/{name}" in row] == values

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
        rows = [sorted(row) for row in made.state.log_history if "rank/mean" not in row]
        return rows, model.state_dict(), [event.undone for event in schedule.history]

    how = How(**TOO_COSTLY | {"max_regression": 0.0})
    plain, checked = (trained(stages) for stages in ([], [Stage(At(step=step), Rank(1), how=how) for step in (3, 5)]))
    assert checked[2] == [True] * 2
    assert plain[0] == checked[0]
    for name, value in plain[1].items():
        assert torch.equal(checked[1][name], value), name


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(folder of the checkpoints of a run of dynrank's layers, its trainer)."""
    folder = tmp_path_factory.mktemp("finished")
    made = trainer(folder, own(), RankTrainerCallback(SHRINK_AND_GROW), **SAVING)
    made.train()
    return folder, made


def test_checkpoint_made_without_the_callback_is_refused(finished, tmp_path):
    file = shutil.copytree(finished[0] / "checkpoint-2", tmp_path / "checkpoint-2") / "trainer_state.json"
    content = json.loads(file.read_text())
    del content["stateful_callbacks"]["RankTrainerCallback"]
    file.write_text(json.dumps(content))
    with pytest.raises(ConfigurationError, match=r"step 2 has no state of a.*resume_from_checkpoint"):
        trainer(tmp_path, own(), RankTrainerCallback(SHRINK_AND_GROW)).train(resume_from_checkpoint=str(file.parent))


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


@pytest.mark.parametrize("setting", [{"n_gpu": 2}, {"deepspeed": {"zero_optimization": {"stage": 2}}}])
def test_sharding_and_copies_by_arguments_are_refused(setting):
    """As the Trainer would have it in several processes: first of all."""
    args = SimpleNamespace(**{"n_gpu": 1, "deepspeed": None, **setting})
    with pytest.raises(ConfigurationError, match=r"set to (DEEPSPEED|2 GPUs).*torchrun"):
        RankTrainerCallback(CUT).on_train_begin(args, None, None)


def test_model_of_add_lora_is_saved_for_peft_too(finished, tmp_path):
    """In every checkpoint, and by ``save_model``; at the ranks that it has then."""
    folder, made = finished
    made.save_model(str(tmp_path / "last"))
    inputs = torch.arange(12).view(2, 6)
    with torch.no_grad():
        expected = made.model.eval()(inputs).logits
        loaded = PeftModel.from_pretrained(base(), tmp_path / "last")
        torch.testing.assert_close(loaded.eval()(inputs).logits, expected)
    found = {step: PeftModel.from_pretrained(base(), folder / f"checkpoint-{step}") for step in (2, 6)}
    assert [ranks(found[step]) for step in (2, 6)] == [{4}, {2}]


def test_checkpoint_lacks_the_frozen_base_and_refuses_another(finished, tmp_path):
    file = finished[0] / "checkpoint-2" / "model.safetensors"
    assert not [name for name in load_file(file) if name.endswith("base.weight")]
    other = own()
    other.model.norm.weight.data.mul_(2)
    with pytest.raises(ConfigurationError, match=r"another base: 'model\.norm\.weight'"):
        trainer(tmp_path, other, RankTrainerCallback(CUT)).train(resume_from_checkpoint=str(file.parent))


def test_model_that_saves_itself_into_a_folder_alone_is_saved_for_peft_too(tmp_path):
    """As sentence-transformers' models do, whose Trainer passes nothing else."""

    class Plain(torch.nn.Sequential):
        def save_pretrained(self, folder):
            (Path(folder) / "whole").write_text("")

    model = dynrank.add_lora(Plain(torch.nn.Linear(4, 4)), rank=2, alpha=2)
    follow(model)
    model.save_pretrained(str(tmp_path))
    assert {file.name for file in tmp_path.iterdir()} == {"whole", "adapter_config.json", "adapter_model.safetensors"}


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
    assert [(row["step"], row["rank/mean"]) for row in made.state.log_history if "rank/mean" in row] == [(4, 2)]


@pytest.mark.parametrize(
    "stage", [Stage(Plateau("val_loss"), Rank(2)), Stage(At(step=9), Rank(2), how=How(**MISNAMED))]
)
def test_metric_that_no_evaluation_has_is_named_at_the_first_one(stage, tmp_path):
    made = trainer(tmp_path, own(), RankTrainerCallback(stage), **EVALUATING)
    with pytest.raises(ConfigurationError, match="must name a metric that is logged, got 'val_loss'; .*'eval_loss'"):
        made.train()
    assert made.state.global_step == 2


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
    logged = [row["lr/adapter"] for row in made.state.log_history if "lr/adapter" in row]
    shown = [row["learning_rate"] for row in made.state.log_history if "learning_rate" in row]
    assert logged == pytest.approx([factor * rate for rate in shown[-len(logged) :]])
    assert 0 < len(logged) < len(shown) == STEPS
    again, *_ = run(tmp_path / "again", resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert_same(again, model)


@pytest.mark.parametrize("several", [False, True], ids=["one set", "two sets"])
def test_cost_of_a_change_is_measured_on_a_share_of_long_evaluation_sets(tmp_path, several):
    asked = []
    losses = []

    def evaluate():
        sets = made.eval_dataset if several else {"": made.eval_dataset}
        asked.append({name: len(rows) for name, rows in sets.items()})
        losses.append(made.evaluate()["eval_a_loss" if several else "eval_loss"])
        return {"eval_loss": losses[-1]}

    schedule = RankTrainerCallback([Stage(At(step=4), Rank(1))], evaluate=evaluate, measure=True)
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
    assert (measured.metric, measured.before, measured.after, measured.whole) == ("val/loss", *losses, False)
    assert losses[0] != losses[1]
