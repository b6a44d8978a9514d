"""The schedule in a real transformers.Trainer, for dynrank's layers and for PEFT's, and its resume."""

import itertools
import json
import shutil
import statistics
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
import transformers as hf
from by_hand import ByHand
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import Subset
from trained import ranks
from transformers import Trainer, TrainerCallback, TrainingArguments

import dynrank
from dynrank.callbacks import RankTrainerCallback
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


def experts():
    torch.manual_seed(0)
    size = {"moe_intermediate_size": 24, "num_key_value_heads": 2, "head_dim": 8}
    return hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(num_experts=3, num_experts_per_tok=2, **SIZE, **size))


def wrapped_experts():
    options = {"target_modules": ["q_proj", "o_proj"], "target_parameters": ["gate_up_proj", "down_proj"]}
    return get_peft_model(experts(), LoraConfig(r=4, lora_alpha=8, **options))


MISNAMED = {"max_regression": 1, "check_monitor": "val_loss"}
TOO_COSTLY = {"max_regression": 0.1, "check_monitor": "eval_loss"}
SAVING = {"save_strategy": "steps", "save_steps": 2}
EVALUATING = {"eval_strategy": "steps", "eval_steps": 2}
SHRINK_AND_GROW = [Stage(At(step=4), Rank(2)), Stage(At(step=7), GrowTo(3))]


def data(count=16):
    rows = torch.randint(40, (count, 6), generator=torch.Generator().manual_seed(1)).tolist()
    return [{"input_ids": row, "labels": row} for row in rows]


def trainer(folder, model, callback, dataset=None, **options):
    defaults = {"max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1}
    defaults |= {"seed": 0, "use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no"}
    arguments = TrainingArguments(output_dir=str(folder), **{**defaults, **options})
    dataset = dataset or data()
    return Trainer(model, arguments, train_dataset=dataset, eval_dataset=dataset, callbacks=[callback])


def callback(stages=SHRINK_AND_GROW, **how):
    return RankTrainerCallback([replace(stage, how=How(**how)) if how else stage for stage in stages])


def test_trainer_ends_where_a_loop_with_resize_ends(tmp_path):
    """Two batches a step, clipped, a linear decay: as the Trainer documents it."""
    model = dynrank.add_lora(base(), rank=4, alpha=8)
    stages = [Stage(At(step=3), Rank(2))]
    options = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.5, "optim": "adamw_torch", "weight_decay": 0.0}
    schedule = callback(stages)
    trainer(tmp_path, model, schedule, max_steps=6, **options).train()
    other = dynrank.add_lora(base(), rank=4, alpha=8)
    same_order = trainer(tmp_path, other, callback([]), max_steps=6, **options)
    batches = []
    for epoch in range(3):
        loader = same_order.get_train_dataloader()
        loader.set_epoch(epoch)
        batches += list(loader)
    trained = [p for p in other.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
    hand = ByHand(other)
    for step in range(6):
        if step == 3:
            sums = [sum(hand.terms(report.layer)) for report in schedule.history[0].layers]
            assert [report.brought for report in schedule.history[0].layers] == pytest.approx(sums, rel=1e-3)
            dynrank.resize(other, 2, optimizers=[optimizer], generator=torch.Generator().manual_seed(3))
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - step / 6)
        for batch in batches[2 * step : 2 * step + 2]:
            (other(**batch).loss / 2).backward()
        torch.nn.utils.clip_grad_norm_(trained, 0.5)
        optimizer.step()
        hand.end_step()
        optimizer.zero_grad()
    for (name, value), (_, expected) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5, msg=name)


RAISED = {"lr_factor": 2.0}
RUNS = [(own, RAISED), (wrapped_experts, {})]


@pytest.mark.parametrize(("make", "how"), RUNS)
def test_ranks_follow_the_schedule_and_a_resumed_run_has_the_same_weights(make, how, assert_same, tmp_path):
    """From the first change, and between two."""
    model = make()
    whole = callback(**how)
    made = trainer(tmp_path, model, whole, **SAVING)
    made.train()
    changes = [(event.step, event.layers[0].rank_before, event.layers[0].rank_after) for event in whole.history]
    assert changes == [(4, 4, 2), (7, 2, 3)]
    assert [(row["step"], row["rank/mean"]) for row in made.state.log_history if "rank/mean" in row] == [(4, 2), (7, 3)]
    for _, layer in dynrank.lora_layers(model):
        for parameter in (layer.lora_A, layer.lora_B):
            assert made.optimizer.state[parameter]["exp_avg"].shape == parameter.shape
            assert int(made.optimizer.state[parameter]["step"]) == STEPS
    for start in (4, 6):
        again = make()
        schedule = callback(**how)
        made = trainer(tmp_path / "again", again, schedule)
        made.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{start}"))
        assert [event.step for event in schedule.history] == [4, 7]
        assert_same(again, model, start)


def test_plateau_reads_the_evaluations_and_survives_a_resume(tmp_path):
    """A model that stands still is at a plateau: at the third evaluation with a patience of 2."""
    options = {**EVALUATING, "learning_rate": 0.0}
    stages = [Stage(Plateau(patience=2, warmup_steps=0), Rank(2))]
    first = callback(stages)
    trainer(tmp_path, own(), first, **options, **SAVING).train()
    (event,) = first.history
    assert (event.step, event.reason) == (6, "plateau of val/loss")
    # At 4 one evaluation is still to come, and at 6 the change is decided and not made.
    for start in (4, 6):
        second = callback(stages)
        made = trainer(tmp_path / "again", own(), second, **options)
        made.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{start}"))
        assert [event.step for event in second.history] == [6]


SCORING = {"metric_for_best_model": "score", "greater_is_better": True, "load_best_model_at_end": True}


def scored(folder, model, schedule, first=9, **options):
    """A Trainer of which each evaluation has a worse score than the one before; it saves after each."""
    scores = itertools.count(first, -1)
    made = trainer(folder, model, schedule, **SCORING, **EVALUATING, **SAVING, **options)
    made.compute_metrics = lambda _: {"score": float(next(scores))}
    return made


@pytest.mark.filterwarnings("ignore:the (best|last) checkpoint")
def test_best_model_of_before_a_cut_comes_back_with_its_own_ranks_if_asked(tmp_path):
    model = own()
    schedule = RankTrainerCallback(Stage(At(step=4), Rank(2)), keep_best_before=True)
    made = scored(tmp_path, model, schedule)
    made.train()
    assert made.state.best_model_checkpoint.endswith("checkpoint-2")
    assert (len(schedule.history), ranks(model)) == (1, {4})


def test_best_model_is_the_best_of_after_the_cut_also_after_a_resume(tmp_path, capsys):
    for start in (None, 2, 4, 6):
        model = wrapped()
        schedule = callback([Stage(At(step=4), Rank(2))])
        made = scored(tmp_path / f"from {start}", model, schedule, first=9 - (start or 0) // 2)
        source = tmp_path / "from None" / f"checkpoint-{start}"
        made.train(resume_from_checkpoint=str(source) if start else None)
        if start != 6:
            words = "best so far: step 2 at rank 4; from here on the best of rank 2 counts"
            assert words in " ".join(capsys.readouterr().out.split())
        assert made.state.best_global_step == 6
        assert ranks(model) == {2}
        made.save_model(str(tmp_path / "end"))
        assert ranks(PeftModel.from_pretrained(base(), tmp_path / "end")) == {2}


def test_early_stopping_begins_anew_after_the_cut(tmp_path):
    """With a patience of 2 and the best score in the first evaluation, training stops at the third one."""
    ends = []
    for stages in ([], [Stage(At(step=4), Rank(2))]):
        made = scored(tmp_path, own(), callback(stages), max_steps=20)
        made.add_callback(hf.EarlyStoppingCallback(early_stopping_patience=2))
        made.train()
        ends.append(made.state.global_step)
    assert ends == [6, 10]


def test_cut_behind_the_last_step_is_saved_and_the_other_files_are_named(tmp_path):
    """The best one is loaded first."""
    model = wrapped()
    schedule = callback([Stage(At(step=4), Rank(3)), Stage(At(fraction=1.0), Rank(2))])
    made = scored(tmp_path, model, schedule)
    words = r"the last checkpoint, '.*checkpoint-10', has rank 3, but the trained model has rank 2:.*save_model"
    with pytest.warns(UserWarning, match=words):
        made.train()
    assert made.state.best_model_checkpoint is None
    made.save_model(str(tmp_path / "end"))
    assert ranks(PeftModel.from_pretrained(base(), tmp_path / "end")) == {2}


class Hearing(TrainerCallback):
    def __init__(self):
        self.heard = []

    def on_rank_change(self, args, state, control, event, model, **_):
        self.heard.append((state.global_step, event, ranks(model)))


def test_changes_are_logged_printed_and_told_to_other_callbacks(tmp_path, capsys, monkeypatch):
    """Also the one behind the last step, after which TensorBoard's file is closed."""
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    schedule = callback([Stage(At(step=4), Rank(2)), Stage(At(fraction=1.0), Rank(1))])
    hearing = Hearing()
    model = own()
    made = trainer(tmp_path, model, schedule, report_to=["tensorboard"])
    made.add_callback(hearing)
    made.train()
    assert hearing.heard == [(4, schedule.history[0], {2}), (STEPS, schedule.history[1], {1})]
    printed = " ".join(capsys.readouterr().out.split())
    assert "rank change at step 4: step 4" in printed
    assert str(schedule.history[0]) == "rank change at step 4: step 4 (rank 4 → rank 2 in 7 layers)"
    assert "self_attn.q_proj" in list(schedule.history[0].table().columns[0].cells)
    assert "│ all │ 7 │ 4 → 2 │" in printed
    parameters = sum(factor.numel() for factor in dynrank.adapter_parameters(model))
    files = [*(tmp_path / "board").rglob("*tfevents*")]
    assert len(files) == 1
    shown = EventAccumulator(str(files[0])).Reload()
    expected = {"rank/mean": (2, 1), "rank/max": (2, 1), "rank/parameters": (2 * parameters, parameters)}
    for name, (first, last) in expected.items():
        points = [(point.step, point.value) for point in shown.Scalars(f"train/{name}")]
        assert points == [(4, first), (STEPS, last)], name
        rows = [(row["step"], row[name]) for row in made.state.log_history if name in row]
        assert rows == points


class Stopping(TrainerCallback):
    """Ends training at the fourth evaluation."""

    def __init__(self):
        self.evaluated = []

    def on_evaluate(self, args, state, control, **_):
        self.evaluated.append(state.global_step)
        control.should_training_stop |= len(self.evaluated) == 4


def test_evaluations_of_a_check_are_heard_by_nobody_and_leave_nothing(tmp_path):
    """Not even in the random numbers of the dropout to come."""

    def trained(stages):
        worse = itertools.count(1)
        model = own()
        stopping = Stopping()
        schedule = RankTrainerCallback(stages, evaluate=lambda: made.evaluate() | {"eval_loss": float(next(worse))})
        made = trainer(tmp_path, model, schedule, eval_strategy="steps", eval_steps=4)
        made.add_callback(stopping)
        made.train()
        assert (made.state.global_step, stopping.evaluated) == (STEPS, [4, 8, STEPS])
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
    made = trainer(folder, own(), callback(), **SAVING)
    made.train()
    return folder, made


def test_checkpoint_made_without_the_callback_is_refused(finished, tmp_path):
    file = shutil.copytree(finished[0] / "checkpoint-2", tmp_path / "checkpoint-2") / "trainer_state.json"
    content = json.loads(file.read_text())
    del content["stateful_callbacks"]["RankTrainerCallback"]
    file.write_text(json.dumps(content))
    with pytest.raises(ConfigurationError, match=r"step 2 has no state of a.*resume_from_checkpoint"):
        trainer(tmp_path, own(), callback()).train(resume_from_checkpoint=str(file.parent))


@pytest.mark.parametrize(
    ("options", "make", "message"),
    [
        ({}, lambda: callback(**TOO_COSTLY), r"evaluate=lambda: trainer.evaluate\(\)"),
        ({"optim": "rmsprop", "optim_args": "centered=True"}, callback, r"RMSprop\(centered\) cannot be carried"),
        ({"optim": "ademamix_8bit"}, callback, r"AdEMAMix cannot be carried .*transformers\.Adafactor"),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_step(options, make, message, tmp_path):
    made = trainer(tmp_path, own(), make(), **options)
    with pytest.raises(ConfigurationError, match=message):
        made.train()
    assert made.state.global_step == 0


@pytest.mark.parametrize("setting", [{"n_gpu": 2}, {"deepspeed": {"zero_optimization": {"stage": 2}}}])
def test_sharding_and_copies_by_arguments_are_refused(setting, tmp_path):
    """As the Trainer would have it in several processes: before the first step, and nothing has changed."""
    model = own()
    schedule = callback()
    made = trainer(tmp_path, model, schedule)
    args = SimpleNamespace(**{"n_gpu": 1, "deepspeed": None, **setting})
    events = {"model": model, "optimizer": made.create_optimizer(), "train_dataloader": made.get_train_dataloader()}
    with pytest.raises(ConfigurationError, match=r"set to (DEEPSPEED|2 GPUs).*torchrun"):
        schedule.on_train_begin(args, made.state, made.control, **events)
    assert ranks(model) == {4}


def test_streamed_data_train_as_the_same_rows_in_that_order_do(assert_same, tmp_path):
    """By steps, and by a share of the run, which ``max_steps`` alone tells; and resumed."""
    stages = [Stage(At(fraction=0.3), Rank(3)), Stage(At(step=7), Rank(2))]
    listed = own()
    streamed = own()
    resumed = own()
    whole = trainer(tmp_path, listed, callback(stages), train_sampling_strategy="sequential")
    whole.train()
    rows = datasets.IterableDataset.from_generator(lambda: iter(data()))
    made = trainer(tmp_path / "stream", streamed, callback(stages), rows, **SAVING)
    made.train()
    again = trainer(tmp_path / "again", resumed, callback(stages), rows)
    again.train(resume_from_checkpoint=str(tmp_path / "stream" / "checkpoint-4"))
    assert_same(streamed, listed)
    assert_same(resumed, listed)


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


def tied():
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(intermediate_size=24, tie_word_embeddings=True, **SIZE))
    return dynrank.add_lora(model, rank=4, target_modules=["q_proj", "lm_head"])


def test_head_tied_to_the_embedding_is_saved_and_resumed(assert_same, tmp_path):
    model = tied()
    trainer(tmp_path, model, callback(), **SAVING).train()
    again = tied()
    trainer(tmp_path / "again", again, callback()).train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert_same(again, model)


def test_checkpoint_lacks_the_frozen_base_and_refuses_another(finished, tmp_path):
    file = finished[0] / "checkpoint-2" / "model.safetensors"
    assert not [name for name in load_file(file) if name.endswith("base.weight")]
    other = own()
    other.model.norm.weight.data.mul_(2)
    with pytest.raises(ConfigurationError, match=r"another base: 'model\.norm\.weight'"):
        trainer(tmp_path / "again", other, callback()).train(resume_from_checkpoint=str(file.parent))


def test_model_that_saves_itself_into_a_folder_alone_is_saved_for_peft_too(tmp_path):
    """As sentence-transformers' models do, whose Trainer passes nothing else."""

    class Plain(torch.nn.Sequential):
        def save_pretrained(self, folder):
            (Path(folder) / "whole").write_text("")

    model = dynrank.add_lora(Plain(torch.nn.Linear(4, 4)), rank=2)
    args = SimpleNamespace(n_gpu=1, deepspeed=None)
    callback().on_init_end(args, None, None, model=model)
    model.save_pretrained(str(tmp_path))
    assert {file.name for file in tmp_path.iterdir()} == {"whole", "adapter_config.json", "adapter_model.safetensors"}


def test_evaluations_of_several_data_sets_are_seen_together(tmp_path):
    seen = []

    class Seeing(Plateau):
        def observe(self, step, *values):
            seen.append((step, *values))
            return super().observe(step, *values)

    schedule = callback([Stage(Seeing("eval_b_loss", warmup_steps=0), Rank(2), deadline=1.0)])
    made = trainer(tmp_path, own(), schedule, eval_strategy="steps", eval_steps=4)
    made.eval_dataset = {"a": data(4), "b": data(8)}
    made.train()
    losses = [(row["step"], row["eval_b_loss"]) for row in made.state.log_history if "eval_b_loss" in row]
    assert seen == losses != []


class Rates(TrainerCallback):
    """What the optimizer's groups are inside its steps: the rate of each parameter."""

    def __init__(self):
        self.seen = []

    def on_step_begin(self, args, state, control, optimizer, lr_scheduler, **_):
        # This hook has to come after those of the schedule.
        if state.global_step == STEPS - 2:
            inner = optimizer.optimizer
            planned = lr_scheduler.get_last_lr()
            inner.register_step_pre_hook(lambda *_: self.seen.append((planned, self.of(inner))))

    def of(self, optimizer):
        return {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}


class Taking(TrainerCallback):
    """The rate of each step, as the optimizer had it."""

    def on_train_begin(self, args, state, control, optimizer, **_):
        self.taken = []
        inner = optimizer.optimizer
        inner.register_step_post_hook(lambda *_: self.taken.append(inner.param_groups[0]["lr"]))


def test_rate_that_the_trainer_logs_is_the_one_that_the_steps_take(tmp_path):
    """Of a PEFT model, with a linear decay; and after a resume behind the change."""

    def run(folder, **options):
        schedule = callback([Stage(At(step=4), Rank(2))], lr_factor=2.0)
        made = trainer(folder, wrapped(), schedule, **SAVING)
        taking = Taking()
        made.add_callback(taking)
        made.train(**options)
        logged = [row["learning_rate"] for row in made.state.log_history if "learning_rate" in row]
        assert not any("lr/adapter" in row for row in made.state.log_history)
        return logged, taking.taken

    logged, taken = run(tmp_path)
    assert taken == pytest.approx([1e-2 * (1 - step / STEPS) * (2 if step >= 4 else 1) for step in range(STEPS)])
    # The Trainer logs the rate of the step that comes next or of the one that was made, by version.
    assert logged[5:9] in (pytest.approx(taken[5:9]), pytest.approx(taken[6:10]))
    assert run(tmp_path / "again", resume_from_checkpoint=str(tmp_path / "checkpoint-6"))[1] == taken[6:]


def test_tensorboard_and_wandb_store_the_ranks_and_the_rate_of_the_steps(tmp_path, monkeypatch, wandb_run):
    """Read back from the files of both."""
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    taking = Taking()
    schedule = callback([Stage(At(step=4), Rank(2))], lr_factor=2.0)
    made = trainer(tmp_path, wrapped(), schedule, report_to=["tensorboard", "wandb"])
    made.add_callback(taking)
    made.train()
    stored = wandb_run[1]()
    (change,) = [row for row in stored if "train/rank/mean" in row]
    assert [change[f"train/{name}"] for name in ("global_step", "rank/mean", "rank/max")] == [4, 2, 2]
    rates = [row["train/learning_rate"] for row in stored if "train/learning_rate" in row]
    # Which of the two is logged depends on the version, as above.
    assert rates[5:9] in (pytest.approx(taking.taken[5:9]), pytest.approx(taking.taken[6:10]))
    assert taking.taken[6] == pytest.approx(2 * 1e-2 * (1 - 6 / STEPS))
    board = EventAccumulator(str(tmp_path / "board")).Reload()
    assert [point.value for point in board.Scalars("train/learning_rate")] == pytest.approx(rates)


@pytest.mark.filterwarnings("ignore")
def test_dpo_trainer_has_the_best_of_after_the_cut_the_used_rate_and_the_ranks(tiny_llama, tmp_path, capsys):
    """TRL's, with PEFT's adapter; each evaluation has a worse score than the one before."""
    # trl loads slowly.
    import trl

    scores = itertools.count(9, -1)

    class Worsening(trl.DPOTrainer):
        def evaluate(self, *args, **options):
            return super().evaluate(*args, **options) | {"eval_score": float(next(scores))}

    sums = [{"prompt": f"{i} and {i} is", "chosen": f" {i + i}", "rejected": f" {i}"} for i in range(16)]
    options = {"max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1}
    options |= {"report_to": [], "disable_tqdm": True, "use_cpu": True, "bf16": False, "gradient_checkpointing": False}
    schedule = callback([Stage(At(step=4), Rank(2))], lr_factor=2.0)
    hearing = Hearing()
    taking = Taking()
    made = Worsening(
        model=hf.AutoModelForCausalLM.from_pretrained(tiny_llama),
        args=trl.DPOConfig(str(tmp_path), **options, **SCORING, **EVALUATING, **SAVING),
        train_dataset=datasets.Dataset.from_list(sums),
        eval_dataset=datasets.Dataset.from_list(sums[:4]),
        processing_class=hf.AutoTokenizer.from_pretrained(tiny_llama, pad_token="<|end|>"),
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"),
        callbacks=[schedule, hearing, taking],
    )
    made.train()
    printed = " ".join(capsys.readouterr().out.split())
    assert "best so far: step 2 at rank 4; from here on the best of rank 2 counts" in printed
    assert (made.state.best_global_step, ranks(made.model)) == (6, {2})
    made.save_model(str(tmp_path / "end"))
    loaded = PeftModel.from_pretrained(hf.AutoModelForCausalLM.from_pretrained(tiny_llama), tmp_path / "end")
    assert ranks(loaded) == {2}

    rates = [row["learning_rate"] for row in made.state.log_history if "learning_rate" in row]
    assert taking.taken == pytest.approx([1e-2 * (1 - step / STEPS) * (1 + (step >= 4)) for step in range(STEPS)])
    assert rates[5:9] in (pytest.approx(taking.taken[5:9]), pytest.approx(taking.taken[6:10]))

    assert hearing.heard == [(4, schedule.history[0], {2})]
    assert [(row["step"], row["rank/mean"]) for row in made.state.log_history if "rank/mean" in row] == [(4, 2)]
    assert "rank change at step 4: step 4" in printed


@pytest.mark.parametrize(
    "stage", [Stage(Plateau("val_loss"), Rank(2)), Stage(At(step=9), Rank(2), how=How(**MISNAMED))]
)
def test_metric_that_no_evaluation_has_is_named_at_the_first_one(stage, tmp_path):
    schedule = RankTrainerCallback(stage, evaluate=lambda: made.evaluate())
    made = trainer(tmp_path, own(), schedule, **EVALUATING)
    with pytest.raises(ConfigurationError, match="must name a metric that is logged, got 'val_loss'; .*'eval_loss'"):
        made.train()
    assert made.state.global_step == 2


def test_metric_of_a_search_is_missed_at_the_first_evaluation(tmp_path):
    """Two data sets have two losses, of which none is eval_loss; a user's function may return one all the same."""

    def run(**more):
        schedule = RankTrainerCallback(auto(0.3, at=0.5), evaluate=lambda: made.evaluate() | more)
        made = trainer(tmp_path, own(), schedule, eval_strategy="steps", eval_steps=4)
        made.eval_dataset = {"a": data(4), "b": data(8)}
        made.train()
        return schedule

    with pytest.raises(ConfigurationError, match="check_monitor .*got 'val/loss'; logged: .*'eval_a_loss'") as raised:
        run()
    assert "eval_b_loss" in str(raised.value)
    assert run(eval_loss=1.0).history


def test_recommended_schedule_raises_the_adapter_s_rate_and_never_the_head_s(assert_same, tmp_path):
    def run(folder, **options):
        torch.manual_seed(0)
        config = hf.LlamaConfig(intermediate_size=24, pad_token_id=0, **SIZE)
        model = hf.LlamaForSequenceClassification(config)
        model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=8, target_modules="all-linear"))
        rows = [{"input_ids": row["input_ids"], "labels": i % 2} for i, row in enumerate(data())]
        made = trainer(folder, model, RankTrainerCallback(2), rows, **SAVING)
        rates = Rates()
        made.add_callback(rates)
        made.train(**options)
        return model, made, rates

    model, made, rates = run(tmp_path)
    adapters = {id(p) for p in dynrank.adapter_parameters(model)}
    factor = (8 / statistics.mean(layer.rank for _, layer in dynrank.lora_layers(model))) ** 0.5
    planned, seen = rates.seen[0]
    assert factor > 1.5
    assert len(seen) > len(adapters)
    for parameter, rate in seen.items():
        expected = planned[0] * (factor if parameter in adapters else 1.0)
        assert rate == pytest.approx(expected), parameter in adapters
    logged = [row["lr/adapter"] for row in made.state.log_history if "lr/adapter" in row]
    shown = [row["learning_rate"] for row in made.state.log_history if "learning_rate" in row]
    assert logged == pytest.approx([factor * rate for rate in shown[-len(logged) :]])
    assert 0 < len(logged) < len(shown) == STEPS
    saved = torch.load(tmp_path / f"checkpoint-{STEPS}" / "optimizer.pt")
    # One group has weight decay, and the other has none.
    assert len(saved["param_groups"]) == len(made.optimizer.param_groups) == 2
    again, *_ = run(tmp_path / "again", resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert_same(again, model)


def test_cost_of_a_change_is_that_of_evaluations_directly_before_and_after_it(tmp_path):
    losses = []

    def evaluate():
        losses.append(made.evaluate()["eval_loss"])
        return {"eval_loss": losses[-1]}

    schedule = RankTrainerCallback([Stage(At(step=4), Rank(1))], evaluate=evaluate, measure=True)
    made = trainer(tmp_path, own(), schedule, max_steps=6)
    made.train()
    (event,) = schedule.history
    assert len(losses) == 2
    assert (event.measured.metric, event.measured.before, event.measured.after) == ("val/loss", *losses)
    assert losses[0] != losses[1]


@pytest.mark.parametrize("several", [False, True], ids=["one set", "two sets"])
def test_cost_of_a_change_is_measured_on_a_share_of_long_evaluation_sets(tmp_path, several):
    asked = []

    def evaluate():
        sets = made.eval_dataset if several else {"": made.eval_dataset}
        asked.append({name: len(rows) for name, rows in sets.items()})
        return made.evaluate() if not several else {"eval_loss": made.evaluate()["eval_a_loss"]}

    schedule = RankTrainerCallback([Stage(At(step=4), Rank(1))], evaluate=evaluate, measure=True)
    made = trainer(tmp_path, own(), schedule, max_steps=6, per_device_eval_batch_size=1)
    whole = made.eval_dataset
    made.eval_dataset = {"a": whole, "b": Subset(whole, range(8))} if several else whole
    given = made.eval_dataset
    made.train()
    assert made.eval_dataset is given
    # One change of a short run gets 4 batches, rounded to rows at equal distances.
    assert asked == asked[:1] * 2
    assert 0 < sum(asked[0].values()) <= 4 + several < len(whole)
    assert not schedule.history[0].measured.whole
