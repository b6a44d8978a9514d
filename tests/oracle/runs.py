"""The runs of dynrank that the reference judges: a plain loop, Lightning, transformers' Trainer; killed and resumed."""

import contextlib
import io
import math
import tempfile
import warnings

import lightning
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

import dynrank
from dynrank.callbacks import RankScheduler, RankTrainerCallback
from dynrank.schedules import How, Stage
from dynrank.targets import Budget, Energy, GrowTo, Rank, Towards, Unchanged
from dynrank.triggers import At, Plateau, Run

QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
QUIET |= {"enable_checkpointing": False, "num_sanity_val_steps": 0, "check_val_every_n_epoch": None}


class Killed(Exception):
    """The run ends here, as by a signal, after its checkpoint."""


class Net(nn.Module):
    """The case's network of plain layers."""

    def __init__(self, case):
        super().__init__()
        self.case = case
        for name, (linear, *_) in case.modules().items():
            setattr(self, name, linear)

    def forward(self, x):
        return self.case.network(lambda name, x: getattr(self, name)(x), x)


def adapted(case):
    """The network with LoRA by dynrank or by PEFT, and the factors of the case."""
    net = Net(case)
    names = [*case.ranks()]
    saved = ["head"] if case.head else []
    if case.peft:
        options = {"target_modules": names, "modules_to_save": saved or None, "rank_pattern": case.ranks()}
        net = get_peft_model(net, LoraConfig(r=case.rank, lora_alpha=case.alpha, use_rslora=case.rslora, **options))
    else:
        rules = case.ranks() if case.steered else case.rules
        options = {"target_modules": names, "modules_to_save": saved, "rank_map": rules, "dtype": torch.float64}
        net = dynrank.add_lora(net, rank=case.rank, alpha=case.alpha, rslora=case.rslora, **options)
    net.to(torch.float64)
    start = case.modules()
    for name, layer in layers(net).items():
        _, layer.lora_A.data[:], layer.lora_B.data[:] = start[name]
    return net


def layers(net):
    return {name.rpartition(".")[2]: layer for name, layer in dynrank.lora_layers(net)}


def optimizer_of(case, net):
    """The case's optimizer and its schedule: one param group, or another one for the head."""
    own = [*dynrank.adapter_parameters(net)]
    others = [p for p in net.parameters() if p.requires_grad and not any(p is q for q in own)]
    groups = [own + others] if case.one_group or not others else [own, others]
    optimizer = case.make_optimizer([{"params": group} for group in groups])
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, case.decay)


def schedule_of(case):
    stages = []
    for stage in case.stages:
        how = How(stage.rate, "reset" if stage.reset else "transport", max_regression=stage.max_regression)
        if stage.patience < math.inf:
            when = Plateau(patience=stage.patience, min_delta=stage.min_delta)
            stages.append(Stage(when, target_of(stage), stage.planned / case.total, how))
        else:
            stages.append(Stage(At(step=stage.planned), target_of(stage), how=how))
    return stages


def target_of(stage):
    if stage.kind == "budget":
        bounds = {"lowest": stage.lowest, "highest": stage.highest}
        return Budget(**{stage.size: stage.to}, **bounds, left=stage.changes_left - 1)
    if stage.kind == "towards":
        return Towards(stage.to, steps=stage.changes_left)
    if stage.kind == "energy":
        return Energy(stage.to, lowest=stage.lowest)
    if stage.kind == "grow":
        return GrowTo(stage.to)
    return Unchanged() if stage.to == math.inf else Rank(stage.to)


class Trace:
    """What a run shows in each step's forward, and at its end: ({layer: (rank, product)}, loss), and A."""

    def __init__(self, case):
        self.case = case
        self.steps = {}
        self.factors = {}
        self.step = None

    def see(self, step, net, loss=0.0):
        found = layers(net)
        with torch.no_grad():
            seen = {name: (la.rank, la.scaling * (la.lora_B @ la.lora_A)) for name, la in found.items()}
        self.steps[step] = seen, loss
        self.factors[step] = {name: layer.lora_A.detach().clone() for name, layer in found.items()}

    def loss(self, step, net):
        """The loss of the step's next batch."""
        self.micro = self.micro + 1 if step == self.step else 0
        self.step = step
        # Data are found by the step: Lightning starts its loader anew when a run is resumed.
        x, y = self.case.batches(step)[self.micro]
        loss = self.case.loss(net(x), y)
        self.see(step, net, (self.steps[step][1] if self.micro else 0.0) + loss.item() / self.case.accumulate)
        return loss


def validation_loss(case, net):
    with torch.no_grad():
        x, y = case.validation()
        return case.loss(net(x), y)


def plain(case, trace, folder):
    class Loop(dynrank.Training):
        def validate(self):
            return {"val/loss": validation_loss(case, self.model).item()}

    def go(saved=None):
        net = adapted(case)
        optimizer, decay = optimizer_of(case, net)
        driver = dynrank.RankDriver(schedule_of(case), rank_map=case.bounds())
        loop = Loop(net, [optimizer])
        parts = {"net": net, "optimizer": optimizer, "decay": decay, "driver": driver}
        if saved is not None:
            states = torch.load(saved, weights_only=True)
            # PEFT's layers take a checkpoint of their own ranks only, dynrank's take any.
            ranks = states.pop("ranks")
            if case.peft:
                dynrank.resize(net, ranks, optimizers=[optimizer])
            for name, part in parts.items():
                part.load_state_dict(states[name])
            loop.step = case.resume
        driver.start(loop, Run(case.total))
        while loop.step < case.total:
            driver.advance(loop)
            for _ in range(case.accumulate):
                (trace.loss(loop.step, net) / case.accumulate).backward()
            if case.clip:
                nn.utils.clip_grad_norm_([p for p in net.parameters() if p.requires_grad], case.clip)
            optimizer.step()
            decay.step()
            loop.step += 1
            driver.end_step(loop)
            optimizer.zero_grad()
            if loop.step % case.every == 0:
                driver.validated(loop, loop.validate())
            if saved is None and loop.step == case.resume:
                file = io.BytesIO()
                ranks = {name: layer.rank for name, layer in dynrank.lora_layers(net)}
                torch.save({name: part.state_dict() for name, part in parts.items()} | {"ranks": ranks}, file)
                file.seek(0)
                return file
        driver.finish(loop)
        trace.see(case.total, net)
        return None

    saved = go()
    if saved is not None:
        go(saved)


class Module(lightning.LightningModule):
    def __init__(self, case, trace):
        super().__init__()
        self.case = case
        self.trace = trace
        self.net = adapted(case)

    def training_step(self, batch, index):
        return self.trace.loss(self.trainer.global_step, self.net)

    def validation_step(self, batch, index):
        self.log("val/loss", validation_loss(self.case, self.net))

    def configure_optimizers(self):
        optimizer, decay = optimizer_of(self.case, self.net)
        return [optimizer], [{"scheduler": decay, "interval": "step"}]

    def train_dataloader(self):
        return torch.utils.data.DataLoader(range(self.case.total * self.case.accumulate), batch_size=1)

    def val_dataloader(self):
        return torch.utils.data.DataLoader([0], batch_size=1)


class Killer(lightning.Callback):
    def __init__(self, step, path):
        self.step = step
        self.path = path

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            raise Killed


def in_lightning(case, trace, folder):
    path = f"{folder}/at.ckpt"

    def go(*callbacks, **options):
        module = Module(case, trace)
        settings = {"max_steps": case.total, "val_check_interval": case.every * case.accumulate}
        settings |= {"accumulate_grad_batches": case.accumulate, "gradient_clip_val": case.clip or None}
        ranks = RankScheduler(schedule_of(case), rank_map=case.bounds())
        trainer = lightning.Trainer(callbacks=[ranks, *callbacks], **QUIET, **settings)
        trainer.fit(module, **options)
        trace.see(case.total, module.net)

    if case.resume is None:
        return go()
    try:
        go(Killer(case.resume, path))
    except Killed:
        go(ckpt_path=path, weights_only=True)


class HFTrainer(transformers.Trainer):
    """The Trainer of a model whose data are found by the step."""

    def compute_loss(self, model, inputs, return_outputs=False, **_):
        trace = self.train_dataset.trace
        if return_outputs:
            return validation_loss(trace.case, model), ()
        return trace.loss(self.state.global_step, model)


class Rows(torch.utils.data.Dataset):
    def __init__(self, count, trace=None):
        self.count = count
        self.trace = trace

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return {"labels": index}


class KillerInTrainer(transformers.TrainerCallback):
    def on_save(self, *_, **__):
        raise Killed


def in_trainer(case, trace, folder):
    def go(*callbacks, **options):
        net = adapted(case)
        settings = {"max_steps": case.total, "eval_strategy": "steps", "eval_steps": case.every, "use_cpu": True}
        settings |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": case.accumulate}
        settings |= {"max_grad_norm": case.clip, "logging_strategy": "no", "report_to": [], "disable_tqdm": True}
        settings |= {"save_strategy": "steps" if callbacks else "no", "save_steps": case.resume or 1}
        settings |= {"remove_unused_columns": False, "label_names": ["labels"]}
        ranks = RankTrainerCallback(schedule_of(case), evaluate=lambda: trainer.evaluate(), rank_map=case.bounds())
        trainer = HFTrainer(
            net,
            transformers.TrainingArguments(folder, **settings),
            train_dataset=Rows(case.total * case.accumulate, trace),
            eval_dataset=Rows(1),
            optimizers=optimizer_of(case, net),
            callbacks=[ranks, *callbacks],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train(**options)
        trace.see(case.total, net)

    if case.resume is None:
        return go()
    try:
        go(KillerInTrainer())
    except Killed:
        go(resume_from_checkpoint=f"{folder}/checkpoint-{case.resume}")


def traced(case):
    """The trace of the whole run, resumed where the case says so."""
    trace = Trace(case)
    # The Trainer's callback prints the table of each change.
    printed = contextlib.redirect_stdout(io.StringIO())
    with warnings.catch_warnings(), printed, tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        {"plain": plain, "lightning": in_lightning, "trainer": in_trainer}[case.driver](case, trace, folder)
    return trace
