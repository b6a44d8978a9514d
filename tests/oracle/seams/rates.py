"""Random programs that set rates: each step of an adapter has the program's own rate times the factors so far.

The rate of a step is what the optimizer reads within it. The program's own is that of the same program without dynrank,
which is run beside it. Outside of steps nothing differs from that one, to the bit: no entry of a param group, no state
of a scheduler. Changes are made in a plain loop, which may be resumed at any step, under Lightning, automatic or
manual, and under transformers' Trainer.
"""

import contextlib
import copy
import io
import logging
import random
import tempfile
import warnings

import lightning
import torch
import transformers
from lightning.pytorch.tuner import Tuner
from torch import nn
from torch.optim import lr_scheduler as lr
from torch.utils.data import DataLoader

import dynrank
from dynrank.callbacks import RankScheduler, RankTrainerCallback
from dynrank.schedules import How, Stage
from dynrank.targets import Rank, Unchanged
from dynrank.triggers import At, Run

TOTAL = 12
RANK = 6


def watched(optimizer):
    """``optimizer``, which keeps {id of a parameter: its rate} of each step, read where torch's own code reads it."""
    optimizer.seen = []
    read = optimizer._init_group

    def reading(group, *args):
        # All groups of a step come in turn.
        if group is optimizer.param_groups[0]:
            optimizer.seen.append({})
        optimizer.seen[-1].update({id(parameter): float(group["lr"]) for parameter in group["params"]})
        return read(group, *args)

    optimizer._init_group = reading
    return optimizer


# From an optimizer and the highest rate of its groups.
SCHEDULERS = {
    "Lambda": lambda o, _: lr.LambdaLR(o, lambda step: 1 / (1 + 0.3 * step)),
    "Multiplicative": lambda o, _: lr.MultiplicativeLR(o, lambda step: 0.9),
    "Step": lambda o, _: lr.StepLR(o, 3, 0.5),
    "MultiStep": lambda o, _: lr.MultiStepLR(o, [2, 7], 0.3),
    "Constant": lambda o, _: lr.ConstantLR(o, 0.3, 4),
    "Linear": lambda o, _: lr.LinearLR(o, 0.3, total_iters=5),
    "Exponential": lambda o, _: lr.ExponentialLR(o, 0.9),
    "Polynomial": lambda o, _: lr.PolynomialLR(o, 15, 2.0),
    "Cosine": lambda o, _: lr.CosineAnnealingLR(o, 15, eta_min=0.02),
    "Restarts": lambda o, _: lr.CosineAnnealingWarmRestarts(o, 4, eta_min=0.01),
    "Cyclic": lambda o, rate: lr.CyclicLR(o, 0.2 * rate, rate, 3, mode="triangular2"),
    "OneCycle": lambda o, rate: lr.OneCycleLR(o, rate, total_steps=TOTAL + 1),
    "SWA": lambda o, _: torch.optim.swa_utils.SWALR(o, 0.01, anneal_epochs=4),
    "Plateau": lambda o, _: lr.ReduceLROnPlateau(o, factor=0.5, patience=1, min_lr=0.02),
    "Sequential": lambda o, _: lr.SequentialLR(o, [lr.LinearLR(o, 0.2), lr.CosineAnnealingLR(o, 12, 0.01)], [3]),
    "Chained": lambda o, _: lr.ChainedScheduler([lr.LinearLR(o, 0.2), lr.CosineAnnealingLR(o, 15, 0.02)]),
}
OF_TRANSFORMERS = {
    **dict.fromkeys(["linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt", "polynomial"], {}),
    "cosine_with_restarts": {"num_cycles": 2},
    "cosine_with_min_lr": {"min_lr_rate": 0.2},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.2},
    "warmup_stable_decay": {"num_decay_steps": 4, "min_lr_ratio": 0.1},
}


class Case:
    """A program that sets rates, and the changes of rank in its run, all drawn from ``seed``."""

    def __init__(self, seed):
        draw = random.Random(seed)
        self.seed = seed
        self.driver = draw.choice(["plain", "plain", "automatic", "manual", "finder", "trainer"])
        self.optimizer = draw.choice([torch.optim.SGD, torch.optim.AdamW])
        self.tensor = draw.random() < 0.2
        self.groups = draw.choice([["adapter"], ["adapter head"], ["adapter", "head"], ["first", "second head"]])
        self.scheduler = draw.choice([None, *SCHEDULERS, *OF_TRANSFORMERS])
        # {step: how the program sets rates before it}
        steps = draw.sample(range(TOTAL), draw.choice([0, 0, 1, 5]))
        self.own = {step: (draw.choice(["absolute", "relative"]), draw.uniform(0.3, 2.0)) for step in steps}
        self.closure = draw.random() < 0.5
        # {step: (whether ranks fall, the factor)}
        at = sorted(draw.sample(range(1, TOTAL), draw.choice([1, 2, 3])))
        self.changes = {step: (draw.random() < 0.7, draw.choice([2.0, 0.5, 1.0, 1.7])) for step in at}
        self.resume = draw.choice([None, *range(1, TOTAL)])

    def __repr__(self):
        return ", ".join(f"{name}={value!r}" for name, value in vars(self).items())

    def factor(self, step):
        """The product of the factors before the step with this number."""
        product = 1.0
        for at, (_, factor) in self.changes.items():
            product *= factor if at <= step else 1.0
        return product

    def stages(self):
        rank = RANK
        stages = []
        for step, (falls, factor) in self.changes.items():
            rank -= falls
            target = Rank(rank) if falls else Unchanged()
            stages.append(Stage(At(step=step), target, how=How(lr_factor=factor)))
        return stages

    def made(self, net):
        """The optimizer and its scheduler, or None."""
        own = [*dynrank.adapter_parameters(net)]
        parts = {"adapter": own, "first": own[:2], "second": own[2:], "head": [net.head.weight]}
        groups = [[p for name in names.split() for p in parts[name]] for names in self.groups]
        rate = torch.tensor(0.1) if self.tensor else 0.1
        optimizer = watched(self.optimizer([{"params": group} for group in groups], lr=rate))
        if self.scheduler in OF_TRANSFORMERS:
            more = OF_TRANSFORMERS[self.scheduler]
            made = transformers.get_scheduler(self.scheduler, optimizer, 2, TOTAL, scheduler_specific_kwargs=more)
            return optimizer, made
        if self.optimizer is torch.optim.SGD and self.scheduler in ("Cyclic", "OneCycle"):
            # They also move the momentum.
            for group in optimizer.param_groups:
                group["momentum"] = 0.9
        return optimizer, SCHEDULERS[self.scheduler](optimizer, 0.1) if self.scheduler else None

    def set_rates(self, optimizer, step):
        """What the program does by itself before a step."""
        kind, value = self.own.get(step, ("", 1.0))
        for group in optimizer.param_groups if kind else ():
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(value / 10 if kind == "absolute" else group["lr"] * value)
            else:
                group["lr"] = value / 10 if kind == "absolute" else group["lr"] * value


class Net(lightning.LightningModule):
    """Two layers with LoRA and a head; also a program under Lightning, whose steps tell how rates are outside."""

    def __init__(self, case, ranks=None):
        super().__init__()
        torch.manual_seed(0)
        self.net = dynrank.add_lora(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), rank=RANK)
        self.head = nn.Linear(8, 1, bias=False)
        self.case = case
        self.ranks = ranks
        self.automatic_optimization = case.driver != "manual"
        self.trace = []

    def forward(self, labels=None):
        return {"loss": self.head(self.net(torch.ones(2, 8))).sin().mean()}

    def configure_optimizers(self):
        optimizer, scheduler = self.case.made(self)
        self.optimizer, self.scheduler = optimizer, scheduler
        if scheduler is None:
            return optimizer
        return [optimizer], [{"scheduler": scheduler, "interval": "step", "monitor": "metric", "strict": False}]

    def on_train_batch_start(self, batch, batch_idx):
        self.case.set_rates(self.optimizer, self.global_step)

    def training_step(self, batch, batch_idx):
        self.log("metric", 5.0 - self.global_step % 4)
        self.trace.append(outside(self.optimizer, self.scheduler))
        loss = self()["loss"]
        if self.automatic_optimization:
            return loss
        self.optimizers().zero_grad()
        self.manual_backward(loss)
        self.optimizers().step()
        if self.scheduler is not None:
            step_scheduler(self.scheduler, self.global_step)
        if self.ranks is not None:
            self.ranks.step(self)
        return None


def outside(optimizer, scheduler):
    """What everybody sees of rates outside of a step."""
    groups = [{**group, "params": len(group["params"])} for group in optimizer.param_groups]
    state = {} if scheduler is None else scheduler.state_dict()
    # Functions and optimizers are the same objects in no two runs.
    return str(groups), {key: str(value) for key, value in state.items() if " at 0x" not in str(value)}


def step_scheduler(scheduler, step):
    scheduler.step(*[5.0 - step % 4] * isinstance(scheduler, lr.ReduceLROnPlateau))


def named(net, optimizer):
    """{name: its rate} of each step."""
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    return [{names[key]: rate for key, rate in rates.items()} for rates in optimizer.seen]


def plain(case, *, changes):
    """The trace of a loop: ({name: rate}, what is outside) of each step."""
    trace = []

    def go(until, saved=None):
        net = Net(case)
        optimizer, scheduler = case.made(net)
        driver = dynrank.RankDriver(case.stages())
        loop = dynrank.Training(net, [optimizer])
        parts = {"net": net, "optimizer": optimizer} | ({"scheduler": scheduler} if scheduler else {})
        parts |= {"driver": driver} if changes else {}
        if saved is not None:
            for name, part in parts.items():
                part.load_state_dict(saved[name])
            loop.step = case.resume
        optimizer.seen = []
        if changes:
            driver.start(loop, Run(TOTAL))
        begin = len(trace)
        for step in range(loop.step, until):
            if changes:
                driver.advance(loop)
            case.set_rates(optimizer, step)
            trace.append(outside(optimizer, scheduler))

            def closure():
                optimizer.zero_grad()
                trace[-1] = outside(optimizer, scheduler)
                loss = net()["loss"]
                loss.backward()
                return loss

            if case.closure:
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
            loop.step += 1
            if changes:
                driver.end_step(loop)
            if scheduler is not None:
                step_scheduler(scheduler, step)
        seen = named(net, optimizer)
        trace[begin:] = zip(seen, trace[begin:], strict=True)
        state = {name: copy.deepcopy(part.state_dict()) for name, part in parts.items()}
        if changes and until == TOTAL:
            driver.finish(loop)
        return state

    go(TOTAL, None if case.resume is None else go(case.resume))
    return trace


QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
QUIET |= {"enable_checkpointing": False, "max_steps": TOTAL}


class Saving(lightning.Callback):
    def __init__(self, step, path):
        self.step = step
        self.path = path

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def in_lightning(case, *, changes):
    def go(folder, *callbacks, **options):
        ranks = RankScheduler(case.stages(), keep_best_before=True) if changes else None
        net = Net(case, ranks)
        callbacks = [ranks, *callbacks] if changes else [*callbacks]
        trainer = lightning.Trainer(callbacks=callbacks, default_root_dir=folder, **QUIET)
        if case.driver == "finder":
            # A finder of rates before the fit leaves nothing behind.
            Tuner(trainer).lr_find(net, DataLoader(range(TOTAL)), num_training=3, update_attr=False)
            net.trace.clear()
        trainer.fit(net, DataLoader(range(TOTAL)), **options)
        return [*zip(named(net, net.optimizer), net.trace, strict=True)]

    with tempfile.TemporaryDirectory() as folder:
        if case.resume is None:
            return go(folder)
        path = f"{folder}/at.ckpt"
        first = go(folder, Saving(case.resume, path))
        return first[: case.resume] + go(folder, ckpt_path=path, weights_only=False)


class InTrainer(transformers.TrainerCallback):
    """The program's own rates, set before each step, and what is outside then."""

    def __init__(self, case):
        self.case = case
        self.trace = []

    def on_step_begin(self, args, state, control, optimizer=None, lr_scheduler=None, **_):
        self.case.set_rates(optimizer, state.global_step)
        self.trace.append(outside(optimizer, lr_scheduler))


def in_trainer(case, *, changes):
    def go(folder, **more):
        net = Net(case)
        optimizer, scheduler = case.made(net)
        watching = InTrainer(case)
        options = {"max_steps": TOTAL, "use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "steps"}
        options |= {"logging_strategy": "no", "remove_unused_columns": False, "per_device_train_batch_size": 1}
        ranks = [RankTrainerCallback(case.stages(), keep_best_before=True)] if changes else []
        trainer = transformers.Trainer(
            net,
            transformers.TrainingArguments(folder, save_steps=case.resume or TOTAL, **options),
            train_dataset=[{"labels": 0}] * TOTAL,
            optimizers=(optimizer, scheduler or lr.LambdaLR(optimizer, lambda _: 1.0)),
            callbacks=[*ranks, watching],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train(**more)
        return [*zip(named(net, optimizer), watching.trace, strict=True)]

    with tempfile.TemporaryDirectory() as folder:
        found = go(folder)
        if case.resume is None:
            return found
        return found[: case.resume] + go(folder, resume_from_checkpoint=f"{folder}/checkpoint-{case.resume}")


def judged(seed):
    """(the kind of the case, its fault or "")"""
    case = Case(seed)
    run = {"plain": plain, "trainer": in_trainer}.get(case.driver, in_lightning)
    if case.driver == "trainer" and case.scheduler == "Plateau":
        # It wants a metric of the Trainer's evaluations.
        case.scheduler = None
    for name in ("lightning.pytorch", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        wanted = run(case, changes=False)
        found = run(case, changes=True)
    if len(found) != TOTAL:
        return case.driver, f"{len(found)} steps; {case}"
    for step, ((rates, seen), (own, before)) in enumerate(zip(found, wanted, strict=True)):
        if seen != before:
            return case.driver, f"step {step}: outside is {seen}, without dynrank {before}; {case}"
        for name, rate in rates.items():
            expected = own[name] * (case.factor(step) if "lora_" in name else 1.0)
            if abs(rate - expected) > 1e-6 * expected:
                return case.driver, f"step {step}: {name} has {rate:.6g}, expected {expected:.6g}; {case}"
    return case.driver, ""
