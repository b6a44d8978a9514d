"""A small Llama in transformers' Trainer, with adapters of dynrank or PEFT, for ten steps."""

import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from trained import ranks
from transformers import Trainer, TrainerCallback, TrainingArguments

import dynrank
from dynrank.schedules import How, Stage
from dynrank.targets import GrowTo, Rank
from dynrank.triggers import At

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


SAVING = {"save_strategy": "steps", "save_steps": 2}
EVALUATING = {"eval_strategy": "steps", "eval_steps": 2}
CUT = Stage(At(step=4), Rank(2), how=How(lr_factor=2.0))
STAGES = [CUT, Stage(At(step=7), GrowTo(3))]


def data(count=16):
    rows = torch.randint(40, (count, 6), generator=torch.Generator().manual_seed(1)).tolist()
    return [{"input_ids": row, "labels": row} for row in rows]


def trainer(folder, model, callback, dataset=None, evaluated=None, model_init=None, kind=Trainer, **options):
    defaults = {"max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1}
    defaults |= {"seed": 0, "use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no"}
    arguments = TrainingArguments(output_dir=str(folder), **{**defaults, **options})
    dataset = dataset or data()
    sets = {"train_dataset": dataset, "eval_dataset": evaluated or dataset}
    callbacks = [callback] if callback else []
    return kind(model, arguments, **sets, model_init=model_init, callbacks=callbacks)


class Hearing(TrainerCallback):
    """What callbacks hear: changes, (step, loss) of evaluations, and the steps of logs."""

    def __init__(self):
        self.heard = []
        self.evaluated = []
        self.logged = []

    def on_rank_change(self, args, state, control, event, model, **_):
        self.heard.append((state.global_step, event, ranks(model)))

    def on_evaluate(self, args, state, control, metrics, **_):
        self.evaluated.append((state.global_step, metrics["eval_loss"]))

    def on_log(self, args, state, control, **_):
        self.logged.append(state.global_step)
