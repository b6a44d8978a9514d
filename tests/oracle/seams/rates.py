"""Random rates: which rate must each step of a parameter use, if schedulers, the program and changes set rates?

The answer comes from the same program without dynrank, run again for each factor: a group that known schedulers
alone rule goes on as if they had been made with the multiplied rate; any other has its own rate times the factor. The
used rate is read from what the optimizer does to a parameter. Changes are made in a plain loop, which may be resumed at
any step, under Lightning and under transformers' Trainer.
"""

import contextlib
import copy
import io
import logging
import math
import random
import tempfile
import warnings
from dataclasses import dataclass, field

import lightning
import torch
import transformers
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
# So each step moves a parameter by the rate, whatever its gradient.
SIGN_ONLY = {"betas": (0.0, 0.0), "eps": 1e-30, "weight_decay": 0.0}
BEST = math.inf


def in_turn(optimizer, first, lowest=0.01):
    parts = first(optimizer, 0.2, total_iters=3), lr.CosineAnnealingLR(optimizer, 12, eta_min=lowest)
    return lr.SequentialLR(optimizer, [*parts], [3])


def chained(optimizer, second):
    return lr.ChainedScheduler([lr.LinearLR(optimizer, 0.2, total_iters=5), second])


def cyclic(optimizer, rates):
    low, high = [0.2 * rate for rate in rates], [*rates]
    return lr.CyclicLR(optimizer, low, high, 3, mode="triangular2", cycle_momentum=False)


def plateau(optimizer, _):
    return lr.ReduceLROnPlateau(optimizer, factor=0.5, patience=1, min_lr=0.02)


def polynomial(optimizer, _):
    return transformers.get_polynomial_decay_schedule_with_warmup(optimizer, 2, 10, lr_end=0.02, power=2.0)


# From an optimizer and the rates of its groups.
SCHEDULERS = {
    "Lambda": lambda o, _: lr.LambdaLR(o, lambda step: 1 / (1 + 0.3 * step)),
    "Step": lambda o, _: lr.StepLR(o, 3, 0.5),
    "MultiStep": lambda o, _: lr.MultiStepLR(o, [2, 7], 0.3),
    "Cosine": lambda o, _: lr.CosineAnnealingLR(o, 15, eta_min=0.02),
    "OneCycle": lambda o, rates: lr.OneCycleLR(o, [*rates], total_steps=TOTAL + 1, cycle_momentum=False),
    "Exponential": lambda o, _: lr.ExponentialLR(o, 0.9),
    "Linear": lambda o, _: lr.LinearLR(o, 0.3, total_iters=5),
    "Sequential": lambda o, _: in_turn(o, lr.LinearLR),
    "Sequential, constant": lambda o, _: in_turn(o, lr.ConstantLR, 0.03),
    "Chained": lambda o, _: chained(o, lr.ExponentialLR(o, 0.9)),
    "Chained to a limit": lambda o, _: chained(o, lr.CosineAnnealingLR(o, 15, eta_min=0.02)),
    "Cyclic": cyclic,
    "Restarts": lambda o, _: lr.CosineAnnealingWarmRestarts(o, 4, eta_min=0.01),
    "Plateau": plateau,
    "polynomial": polynomial,
}


@dataclass
class Case:
    """A program that sets rates, and the changes of rank in its run.

    Attributes:
        groups: the parameters of each param group: those of the adapter, of the head, or of both.
        named: whether the loop tells dynrank of its scheduler; a trainer always does.
        own: how the program sets rates by itself, from the step ``begins`` on: "" (not at all), "absolute", "relative",
            or "once" (relative in that step alone).
        place: where it does so: "before" the change of a step, "after" it, or "within" the optimizer's step.
        changes: {step: (whether ranks fall, the factor)}.
    """

    seed: int
    driver: str
    optimizer: str
    foreach: bool
    tensor: bool
    groups: list
    rates: list
    scheduler: str | None
    named: bool
    own: str
    begins: int
    place: str
    changes: dict = field(default_factory=dict)
    resume: int | None = None

    @property
    def knows(self):
        """Whether dynrank knows what rules the rates."""
        return self.scheduler not in (None, "Chained to a limit") and (self.named or self.driver != "plain")

    def factor(self, step):
        return math.prod(factor for at, (_, factor) in self.changes.items() if at <= step)

    def metric(self, step):
        """What ReduceLROnPlateau gets: it is worse after each change, and falls from there."""
        return sum(10.0 for at in self.changes if at <= step) + (5.0 - 0.1 * step if step % 3 else 5.0)

    def set_rates(self, optimizer, step):
        if not self.own or step < self.begins or (self.own == "once" and step > self.begins):
            return
        for group, rate in zip(optimizer.param_groups, self.rates, strict=False):
            new = 0.7 * rate * 0.93**step if self.own == "absolute" else group["lr"] * 0.8
            group["lr"] = torch.as_tensor(new, dtype=torch.float64) if self.tensor else float(new)

    def optimizer_of(self, parameters, rates):
        """``parameters``: {"adapter": ..., "head": ...}"""
        make = torch.optim.SGD if self.optimizer == "SGD" else torch.optim.AdamW
        options = {"foreach": self.foreach} | ({} if self.optimizer == "SGD" else SIGN_ONLY)
        groups = [{"params": [p for part in parts for p in parameters[part]]} for parts in self.groups]
        as_rate = (lambda rate: torch.tensor(rate, dtype=torch.float64)) if self.tensor else float
        # A rate that all groups share is one object in all of them.
        if len({*rates}) > 1:
            groups = [group | {"lr": as_rate(rate)} for group, rate in zip(groups, rates, strict=True)]
        optimizer = make(groups, lr=as_rate(rates[0]), **options)
        return optimizer, SCHEDULERS[self.scheduler](optimizer, rates) if self.scheduler else None


def make_case(seed):
    draw = random.Random(seed)
    driver = draw.choices(["plain", "lightning", "trainer"], [94, 3, 3])[0]
    groups = draw.choice([["a"], ["a", "h"], ["h", "a"], ["ah"], ["h", "ah"]])
    groups = [[{"a": "adapter", "h": "head"}[part] for part in parts] for parts in groups]
    if sum("head" in parts for parts in groups) > 1:
        groups = [["head"], ["adapter"]]
    shared = draw.random() < 0.5
    rates = [0.1] * len(groups) if shared else [draw.choice([0.1, 0.2, 0.4]) for _ in groups]
    optimizer = draw.choice(["SGD", "AdamW"])
    tensor = draw.random() < 0.2
    foreach = draw.random() < 0.5 and not (tensor and optimizer == "AdamW")
    scheduler = draw.choice([None, *SCHEDULERS])
    # torch lowers a rate that groups share once for each of them; transformers' function makes floats of tensors.
    if (tensor and scheduler in ("Plateau", "polynomial")) or (driver == "trainer" and scheduler in (None, "Plateau")):
        scheduler = "Step"
    # Its limit is a share of the first group's rate.
    if scheduler == "polynomial" and groups != [["adapter"]]:
        scheduler = "Lambda"
    steps = sorted(draw.sample(range(1, TOTAL), draw.choice([1, 1, 2])))
    changes = {step: (draw.random() < 0.8, draw.choice([0.5, 1.5, 2.0, 3.0])) for step in steps}
    named = draw.random() < 0.7
    own = draw.choice(["", "", "", "absolute", "relative", "once"])
    # It starts at 0, of which every multiple is 0.
    if scheduler == "polynomial" and own != "absolute":
        own = ""
    place = draw.choice(["before", "after", "within"]) if driver == "plain" else draw.choice(["before", "after"])
    case = Case(seed, driver, optimizer, foreach, tensor, groups, rates, scheduler, named, own, 0, place, changes)
    # Beside a known scheduler nobody can tell a rate that is first set after a change from a share of the raised one:
    # a trainer takes it as absolute, a plain loop as a share, and both warn.
    free = not case.knows or (own == "absolute" and driver != "plain")
    case.begins = draw.randrange(TOTAL if free else steps[0])
    case.resume = draw.choice([None, draw.randrange(1, TOTAL)]) if driver == "plain" else None
    return case


# The oracle


def without_dynrank(case, times):
    """The rate of each group in each step, if the groups of adapters alone are made with their rate times ``times``."""
    parameters = {name: [nn.Parameter(torch.zeros(1, dtype=torch.float64))] for name in ("adapter", "head")}
    alone = [parts == ["adapter"] for parts in case.groups]
    rates = [rate * (times if is_alone else 1.0) for rate, is_alone in zip(case.rates, alone, strict=True)]
    optimizer, scheduler = case.optimizer_of(parameters, rates)
    found = []
    for step in range(TOTAL):
        if (
            case.scheduler == "Plateau"
            and case.changes.get(step, (False,))[0]
            and (case.named or case.driver != "plain")
        ):
            scheduler.best = BEST
            scheduler.num_bad_epochs = 0
        case.set_rates(optimizer, step)
        found.append([float(group["lr"]) for group in optimizer.param_groups])
        optimizer.step()
        step_scheduler(case, scheduler, step)
    return found


def expected(case):
    """{parameters: the rate of each step}"""
    plain = without_dynrank(case, 1.0)
    wanted = {"adapter": [], "head": []}
    for step in range(TOTAL):
        factor = case.factor(step)
        ruled = case.knows and not (case.own and step >= case.begins)
        for number, parts in enumerate(case.groups):
            if "head" in parts:
                wanted["head"].append(plain[step][number])
            if parts == ["adapter"] and ruled:
                wanted["adapter"].append(without_dynrank(case, factor)[step][number])
            elif "adapter" in parts:
                wanted["adapter"].append(plain[step][number] * factor)
    return wanted


# The runs


class Net(lightning.LightningModule):
    """A layer with an adapter, and a head; under Lightning and the Trainer, too."""

    def __init__(self, case):
        super().__init__()
        self.case = case
        torch.manual_seed(case.seed)
        self.layers = nn.Sequential(nn.Linear(7, 8), nn.Linear(8, 3))
        dynrank.add_lora(self.layers, rank=RANK, target_modules=["0"], modules_to_save=["1"], dtype=torch.float64)
        self.to(torch.float64)
        self.layers.requires_grad_(False)
        self.adapter = [*dynrank.adapter_parameters(self.layers)]
        self.head = [self.layers[1].weight]
        used = {name for parts in case.groups for name in parts}
        for parameter in [*self.adapter, *(self.head if "head" in used else [])]:
            parameter.requires_grad_(True)

    def loss(self):
        x = torch.linspace(-1, 1, 21, dtype=torch.float64).reshape(3, 7)
        # So small that no rate lets it diverge.
        return 1e-4 * (self.layers(x) * torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)).sum()

    def forward(self, labels=None, **_):
        return {"loss": self.loss()}

    def training_step(self, *_):
        return self.loss()

    def configure_optimizers(self):
        optimizer, scheduler = self.made = self.case.optimizer_of(
            {"adapter": self.adapter, "head": self.head}, self.case.rates
        )
        if scheduler is None:
            return optimizer
        config = {
            "scheduler": scheduler,
            "interval": "step",
            "monitor": "metric",
            "reduce_on_plateau": self.case.scheduler == "Plateau",
        }
        return {"optimizer": optimizer, "lr_scheduler": config}

    def watched(self):
        """One parameter of each part; B of the adapter, whose gradient is never zero."""
        return {"adapter": self.layers[0].lora_B, "head": self.head[0]}


def used_rates(case, net, before):
    """{parameters: the rate by which the step has moved them}"""
    found = {}
    for name, parameter in net.watched().items():
        if parameter.grad is not None:
            moved = (parameter.detach() - before[name]).abs().max()
            found[name] = float(moved / parameter.grad.abs().max()) if case.optimizer == "SGD" else float(moved)
    return found


def values(net):
    return {name: parameter.detach().clone() for name, parameter in net.watched().items()}


def stages_of(case):
    ranks = iter(range(RANK - 1, 0, -1))
    targets = {step: Rank(next(ranks)) if falls else Unchanged() for step, (falls, _) in case.changes.items()}
    return [Stage(At(step=at), targets[at], how=How(lr_factor=factor)) for at, (_, factor) in case.changes.items()]


def step_scheduler(case, scheduler, step):
    if case.scheduler == "Plateau":
        scheduler.step(case.metric(step))
    elif scheduler is not None:
        scheduler.step()


def plain(case):
    """({parameters: the rate of each step}, fault of what is shown or "")"""
    found = []

    def go(end, saved=None):
        net = Net(case)
        optimizer, scheduler = net.configure_optimizers() and net.made
        loop = dynrank.Training(net.layers, [optimizer], schedulers=[scheduler] if scheduler and case.named else None)
        driver = dynrank.RankDriver(stages_of(case))
        parts = {"net": net, "optimizer": optimizer, "driver": driver} | ({"scheduler": scheduler} if scheduler else {})
        if saved is not None:
            loop.step = case.resume
            for name, part in parts.items():
                part.load_state_dict(saved[name])
        driver.start(loop, Run(TOTAL))
        while loop.step < end:
            step = loop.step
            if case.place == "before":
                case.set_rates(optimizer, step)
            driver.advance(loop)
            if case.place == "after":
                case.set_rates(optimizer, step)
            optimizer.zero_grad()
            before = values(net)
            hidden = driver.unlogged_adapter_rates(loop)
            numbers = [number for number, group in enumerate(case.groups) if "adapter" in group]
            shown = [hidden.get("lr/adapter", optimizer.param_groups[number]["lr"]) for number in numbers]

            def closure():
                net.loss().backward()
                if case.place == "within":
                    case.set_rates(optimizer, loop.step)

            optimizer.step(closure) if case.place == "within" else (closure(), optimizer.step())
            used = used_rates(case, net, before)
            if not (case.place == "within" and case.own) and not math.isclose(
                float(shown[0]), used["adapter"], rel_tol=1e-6
            ):
                raise AssertionError(f"step {step}: shown {float(shown[0])}, used {used['adapter']}")
            found.append(used)
            loop.step += 1
            driver.end_step(loop)
            step_scheduler(case, scheduler, step)
        if end == TOTAL:
            driver.finish(loop)
        return {name: copy.deepcopy(part.state_dict()) for name, part in parts.items()}

    if case.resume is None:
        go(TOTAL)
    else:
        go(TOTAL, go(case.resume))
    return found


class Watching(lightning.Callback):
    def __init__(self, case, found):
        self.case = case
        self.found = found

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.before = values(pl_module)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.found.append(used_rates(self.case, pl_module, self.before))


class Metric(lightning.Callback):
    """Gives ReduceLROnPlateau its metric, before Lightning steps it."""

    def __init__(self, case):
        self.case = case

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        pl_module.log("metric", self.case.metric(trainer.global_step))


class Setting(lightning.Callback):
    def __init__(self, case):
        self.case = case

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.case.set_rates(trainer.optimizers[0], trainer.global_step)


QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
QUIET |= {"enable_checkpointing": False, "max_steps": TOTAL}


def in_lightning(case):
    found = []
    ranks = RankScheduler(stages_of(case))
    order = [Setting(case), ranks] if case.place == "before" else [ranks, Setting(case)]
    trainer = lightning.Trainer(callbacks=[*order, Metric(case), Watching(case, found)], **QUIET)
    trainer.fit(Net(case), DataLoader(range(TOTAL)))
    return found


class InTrainer(transformers.TrainerCallback):
    def __init__(self, case, found):
        self.case = case
        self.found = found

    def on_step_begin(self, args, state, control, model=None, optimizer=None, **_):
        self.case.set_rates(optimizer, state.global_step)
        self.before = values(model)

    def on_optimizer_step(self, args, state, control, model=None, **_):
        self.found.append(used_rates(self.case, model, self.before))


def in_trainer(case):
    found = []
    net = Net(case)
    net.configure_optimizers()
    with tempfile.TemporaryDirectory() as folder:
        options = {"max_steps": TOTAL, "use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no"}
        options |= {"max_grad_norm": 0.0, "logging_strategy": "no", "remove_unused_columns": False}
        trainer = transformers.Trainer(
            net,
            transformers.TrainingArguments(folder, per_device_train_batch_size=1, **options),
            train_dataset=[{"labels": 0}] * TOTAL,
            optimizers=net.made,
            callbacks=[RankTrainerCallback(stages_of(case)), InTrainer(case, found)],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    return found


def judged(seed):
    """(the kind of the case, its fault or "")"""
    case = make_case(seed)
    for name in ("lightning.pytorch", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = expected(case)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                found = {"plain": plain, "lightning": in_lightning, "trainer": in_trainer}[case.driver](case)
        except AssertionError as error:
            return case.driver, f"{error}; {case}"
    if len(found) != TOTAL:
        return case.driver, f"{len(found)} steps; {case}"
    for step, used in enumerate(found):
        for name, rate in used.items():
            if not math.isclose(rate, wanted[name][step], rel_tol=1e-6, abs_tol=1e-9):
                return case.driver, f"step {step}: {name} has {rate:.6g}, expected {wanted[name][step]:.6g}; {case}"
    return case.driver, ""
