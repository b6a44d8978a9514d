"""Random validations and cuts: which of them must be the best, and when must early stopping stop?

The answer needs no callback: the best validation since the last cut, and the number of validations since it. It is
compared with Lightning's ModelCheckpoint, EarlyStopping and BestWeights, and with EarlyStoppingCallback and
load_best_model_at_end of transformers, in small runs that may be resumed at any step. Most cases call only the
Trainer's events.
"""

import contextlib
import functools
import io
import logging
import random
import tempfile
import types
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import lightning
import torch
import transformers
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

import dynrank
from dynrank.callbacks import BestWeights, RankScheduler, RankTrainerCallback
from dynrank.schedules import How, Stage
from dynrank.targets import GrowTo, Rank, Unchanged
from dynrank.triggers import At

TOTAL = 10


@dataclass
class Case:
    """A run of ten steps with a validation after each, whose value is given.

    Attributes:
        values: the metric of the validation after each step.
        mode: whether a smaller ("min") or a larger ("max") value is better.
        changes: {step: what happens to the rank before it: "cut", "balance" or "grow"}.
        patience: validations without a new best after which the run stops.
        keep: whether the best may be one of before a cut.
        resume: the step of the checkpoint from which the run goes on; None: it is not interrupted.
        first: whether dynrank's callbacks are the first of the list.
    """

    seed: int
    driver: str
    values: list
    mode: str
    changes: dict
    patience: int
    keep: bool
    resume: int | None = None
    first: bool = True


def make_case(seed):
    draw = random.Random(seed)
    driver = draw.choices(["events", "lightning", "trainer"], [84, 12, 4])[0]
    # Few different values, so that some are equal.
    values = [float(draw.randint(0, 9)) for _ in range(TOTAL)]
    steps = sorted(draw.sample(range(1, TOTAL), draw.choice([0, 1, 1, 2])))
    changes = {step: draw.choice(["cut", "cut", "balance", "grow"]) for step in steps}
    mode = draw.choice(["min", "max"])
    case = Case(seed, driver, values, mode, changes, draw.choice([2, 3, 99]), draw.random() < 0.2)
    case = replace(case, resume=draw.choice([None, draw.randrange(1, TOTAL)]))
    return replace(case, first=draw.random() < 0.5)


# The oracle


def better(case, one, other):
    return one < other if case.mode == "min" else one > other


def expected(case):
    """(the step of the best validation, the step after which the run stops)"""
    best = None
    step_of_best = None
    waited = 0
    for step in range(1, TOTAL + 1):
        # A change is made before the step, so its validation is one of after the change.
        if case.changes.get(step - 1) == "cut" and not case.keep:
            best = None
            step_of_best = None
            waited = 0
        value = case.values[step - 1]
        if best is None or better(case, value, best):
            best = value
            step_of_best = step
            waited = 0
        else:
            waited += 1
        if waited >= case.patience:
            return step_of_best, step
        # The Trainer forgets what its callbacks have counted, unless it makes all of them anew.
        waited = 0 if case.driver == "trainer" and step == case.resume else waited
    return step_of_best, TOTAL


def best_of_these_ranks(case, last):
    """The step of the best validation since the last change of any kind, in a run of ``last`` steps; None: no one."""
    start = max((step for step in case.changes if step <= last), default=0)
    steps = range(start + 1, last + 1)
    return (min if case.mode == "min" else max)(steps, key=lambda step: case.values[step - 1], default=None)


# Lightning


class Module(lightning.LightningModule):
    def __init__(self, case):
        super().__init__()
        torch.manual_seed(0)
        self.net = dynrank.add_lora(nn.Sequential(nn.Linear(8, 9)), rank=4, dtype=torch.float64).to(torch.float64)
        self.case = case

    def training_step(self, batch, batch_idx):
        return self.net(torch.linspace(-1, 1, 16, dtype=torch.float64).reshape(2, 8)).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("score", self.case.values[self.global_step - 1], batch_size=1)

    def configure_optimizers(self):
        return torch.optim.SGD(dynrank.adapter_parameters(self.net), lr=0.1)


QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
QUIET |= {"max_steps": TOTAL, "val_check_interval": 1, "num_sanity_val_steps": 0}


def stages_of(case):
    targets = []
    rank = 4
    for kind in case.changes.values():
        rank += {"cut": -1, "balance": 0, "grow": 1}[kind]
        targets.append({"cut": Rank(rank), "balance": Unchanged(), "grow": GrowTo(rank)}[kind])
    return [Stage(At(step=step), to, how=How()) for step, to in zip(case.changes, targets, strict=True)]


def options_of(verb):
    """Lightning takes an interval of one batch for one epoch."""
    return {f"{verb}_on_train_epoch_end": False}


class Killed(Exception):
    pass


class Killer(lightning.Callback):
    def __init__(self, step, file):
        self.step = step
        self.file = file

    def on_validation_end(self, trainer, pl_module):
        if trainer.global_step == self.step:
            self.due = True

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step and getattr(self, "due", False):
            trainer.save_checkpoint(self.file)
            raise Killed


def in_lightning(case):
    """{what: (found, expected)}"""
    step_of_best, last = expected(case)
    if case.changes.get(last) == "cut" and not case.keep:
        # Behind a step that was the last one by early stopping.
        step_of_best = None

    with tempfile.TemporaryDirectory() as folder:

        def go(*callbacks, **options):
            saver = ModelCheckpoint(
                Path(folder, "best"), "{step}", monitor="score", mode=case.mode, **options_of("save")
            )
            stopping = EarlyStopping("score", mode=case.mode, patience=case.patience, **options_of("check"))
            weights = BestWeights("score", case.mode)
            ranks = RankScheduler(stages_of(case), keep_best_before=case.keep)
            others = [saver, stopping, weights]
            ordered = [ranks, *others] if case.first else [*others, ranks]
            trainer = lightning.Trainer(callbacks=[*callbacks, *ordered], **QUIET)
            loaders = DataLoader(range(4)), DataLoader(range(1))
            trainer.fit(Module(case), *loaders, **options)
            best = Path(saver.best_model_path).stem
            return {
                "ModelCheckpoint": (best, "" if step_of_best is None else f"step={step_of_best}"),
                "EarlyStopping": (trainer.global_step, last),
                "BestWeights": (weights.step, best_of_these_ranks(case, last)),
            }

        if case.resume is None or case.resume >= last:
            return go()
        file = Path(folder, "killed.ckpt")
        try:
            go(Killer(case.resume, file))
        except Killed:
            return go(ckpt_path=file, weights_only=True)
        raise AssertionError("the run was not killed")


# transformers' Trainer, of which only the events of evaluations and cuts are called


@functools.cache
def trainer(mode, patience):
    net = nn.Linear(1, 1)
    arguments = {"metric_for_best_model": "score", "greater_is_better": mode == "max", "use_cpu": True}
    arguments |= {"eval_strategy": "steps", "save_strategy": "best", "eval_steps": 1, "report_to": []}
    stopping = transformers.EarlyStoppingCallback(patience)
    made = transformers.Trainer(
        net, transformers.TrainingArguments(tempfile.gettempdir(), **arguments), eval_dataset=[0]
    )
    return made, stopping


def by_events(case):
    made, _ = trainer(case.mode, case.patience)
    stopping = transformers.EarlyStoppingCallback(case.patience)
    made.state = transformers.TrainerState()
    made.state.is_world_process_zero = False
    control = transformers.TrainerControl()
    callback = RankTrainerCallback(stages_of(case), keep_best_before=case.keep)
    net = nn.Module()
    net.a = dynrank.add_lora(nn.Sequential(nn.Linear(8, 9)), rank=4)
    log = types.SimpleNamespace(log=lambda _: None, trainer=made, model=net)
    driver = callback.driver
    loop = dynrank.Training(net, [torch.optim.SGD(dynrank.adapter_parameters(net), lr=0.1)])
    loop.tell = lambda event: callback.on_rank_change(made.args, made.state, control, event=event, model=net)
    driver.start(loop, dynrank.triggers.Run(TOTAL))
    callback._run = log
    last = TOTAL
    for step in range(1, TOTAL + 1):
        driver.advance(loop)
        loop.step = made.state.global_step = step
        metrics = {"eval_score": case.values[step - 1]}
        # The Trainer's order.
        stopping.on_evaluate(made.args, made.state, control, metrics)
        made._determine_best_metric(metrics, None)
        if control.should_training_stop:
            last = step
            break
    driver.abort()
    step_of_best, stop = expected(case)
    return {"best": (made.state.best_global_step, step_of_best), "EarlyStoppingCallback": (last, stop)}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = dynrank.add_lora(nn.Sequential(nn.Linear(8, 9)), rank=4)

    def forward(self, labels=None):
        out = self.net(torch.linspace(-1, 1, 16).reshape(2, 8))
        return {"loss": out.square().mean(), "logits": labels}

    @property
    def update(self):
        return (self.net[0].lora_B @ self.net[0].lora_A).detach().clone()


class Updates(transformers.TrainerCallback):
    """{step: the update of the weight after it}; an exception ends the run after the checkpoint of step ``killed``."""

    def __init__(self, killed):
        self.killed = killed
        self.seen = {}

    def on_step_end(self, args, state, control, model=None, **_):
        self.seen[state.global_step] = model.update

    def on_save(self, args, state, control, **_):
        if state.global_step == self.killed:
            raise Killed


def in_trainer(case):
    """{what: (found, expected)}"""
    step_of_best, last = expected(case)
    every = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    every |= {"metric_for_best_model": "score", "greater_is_better": case.mode == "max", "load_best_model_at_end": True}
    options = {"max_steps": TOTAL, "use_cpu": True, "report_to": [], "disable_tqdm": True, "logging_strategy": "no"}
    seen = {}
    with tempfile.TemporaryDirectory() as folder:

        def go(killed=None, **start):
            updates = Updates(killed)
            net = Net()
            schedule = RankTrainerCallback(stages_of(case), keep_best_before=case.keep)
            made = transformers.Trainer(
                net,
                transformers.TrainingArguments(folder, **every, **options, per_device_train_batch_size=1),
                train_dataset=[{"labels": 0}] * TOTAL,
                eval_dataset=[{"labels": 0}],
                compute_metrics=lambda _: {"score": case.values[made.state.global_step - 1]},
                optimizers=(torch.optim.SGD(dynrank.adapter_parameters(net), lr=0.1), None),
                callbacks=[schedule, transformers.EarlyStoppingCallback(case.patience), updates],
            )
            made.remove_callback(transformers.PrinterCallback)
            try:
                made.train(**start)
            finally:
                seen.update(updates.seen)
            return made.state, net.update

        resumed = case.resume if case.resume is not None and case.resume < last else None
        try:
            state, update = go(resumed)
        except Killed:
            state, update = go(resume_from_checkpoint=f"{folder}/checkpoint-{resumed}")
    # A change that falls on the step where the run stops is made in the model that is loaded.
    same = last in case.changes or torch.allclose(update, seen[step_of_best], atol=1e-5)
    forgets = case.changes.get(last) == "cut" and not case.keep
    return {
        "best": (state.best_global_step, None if forgets else step_of_best),
        "EarlyStoppingCallback": (state.global_step, last),
        "loaded": (same, True),
    }


def judged(seed):
    """(the kind of the case, its fault or "")"""
    case = make_case(seed)
    for name in ("lightning.pytorch", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        runs = {"events": by_events, "lightning": in_lightning, "trainer": in_trainer}
        with contextlib.redirect_stdout(io.StringIO()):
            found = runs[case.driver](case)
    faults = [f"{what}: {is_}, expected {wanted}" for what, (is_, wanted) in found.items() if is_ != wanted]
    return case.driver, f"{'; '.join(faults)}; {case}" if faults else ""
