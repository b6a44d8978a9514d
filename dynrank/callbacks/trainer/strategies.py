"""What a change of rank takes in each of Lightning's strategies, and which of them are refused."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dynrank.distributed.processes import from_all, from_first
from dynrank.distributed.sharding import (
    average_gradients,
    sharded_error,
    sharded_layers,
    take_saved_ranks,
    trains_shards,
)
from dynrank.errors import ConfigurationError
from dynrank.layers.frozen_base import lacks_base
from dynrank.output.checkpoint_file import read_checkpoint

_INSTEAD = {  # strategies that are made of these, by the name of a base class: neither need be installed
    "FSDPStrategy": "FSDP1 flattens parameters into one vector",
    "DeepSpeedStrategy": "DeepSpeed flattens parameters into one vector",
    "XLAStrategy": "XLA's processes have not been tried",
}


def check_strategy(trainer: Trainer) -> None:
    """Refuse what ranks cannot change in; nothing has been set up yet.

    Raises:
        ConfigurationError: naming the strategy, or its option, and what to use instead.
    """
    strategy: Any = trainer.strategy
    names = [cls.__name__ for cls in type(strategy).__mro__]
    known = isinstance(strategy, SingleDeviceStrategy | DDPStrategy | ModelParallelStrategy)
    why = next((reason for name, reason in _INSTEAD.items() if name in names), "it has not been tried")
    if not known or set(_INSTEAD) & set(names):
        raise ConfigurationError(
            f"ranks cannot change under {type(strategy).__name__}: {why}. Set trainer.strategy=ddp, or, to shard "
            "the base, trainer=fsdp2 (ModelParallelStrategy, with dynrank.distributed.sharding.shard_frozen)"
        )
    if isinstance(strategy, DDPStrategy):
        if strategy._start_method != "popen":
            raise ConfigurationError(
                f"DDPStrategy(start_method={strategy._start_method!r}), as in ddp_spawn and ddp_notebook, trains in "
                "processes whose results do not all come back, the history of ranks among them; set "
                "trainer.strategy=ddp, in a program that is started from a file"
            )
        state, period = strategy._ddp_comm_state, strategy._model_averaging_period
        if period is not None or type(state).__name__ in ("PostLocalSGDState", "PowerSGDState"):
            raise ConfigurationError(
                f"ddp_comm_state={type(state).__name__}, model_averaging_period={period}: PostLocalSGD lets the "
                "processes' adapters differ, and PowerSGD remembers gradients of the old shapes; use a hook without "
                "memory, such as fp16_compress_hook, or none"
            )
    if isinstance(strategy, ModelParallelStrategy):
        tensor_parallel = strategy._tensor_parallel_size
        if tensor_parallel == "auto":
            tensor_parallel = strategy.num_processes
        if tensor_parallel != 1:
            raise ConfigurationError(
                f"ModelParallelStrategy splits layers over {tensor_parallel} devices, and LoRA on split layers is not "
                "supported; set tensor_parallel_size=1 and data_parallel_size to the number of processes"
            )
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            raise ConfigurationError(
                "precision=16-mixed under ModelParallelStrategy skips a step in some processes only; "
                "set trainer.precision=bf16-mixed"
            )


def check_setup(trainer: Trainer, pl_module: LightningModule) -> None:
    """Refuse sharded adapters and sharded optimizers; the model and the optimizers are there.

    Raises:
        ConfigurationError: naming what is wrong.
    """
    sharded = sharded_layers(pl_module)
    if sharded:
        raise sharded_error(sharded)
    classes = {cls.__name__ for o in trainer.optimizers for cls in type(getattr(o, "optimizer", o)).__mro__}
    if "ZeroRedundancyOptimizer" in classes:  # its module is deprecated, with a warning when it is imported
        raise ConfigurationError(
            "ZeroRedundancyOptimizer has each process keep a part of the optimizer's state; an adapter's is small: "
            "use its inner optimizer"
        )


def unwrap(trainer: Trainer) -> None:
    """Take DDP off the module, so that parameters may change shape: its buckets are as large as they were; collective.

    Raises:
        ConfigurationError: in all processes, before anything is resized, if somebody else holds the DDP module, which
            would not average right any more, or has put it into another one, which would be lost.
    """
    strategy = trainer.strategy
    if not isinstance(strategy, DDPStrategy):
        return
    wrapped, fault = strategy.model, None
    if isinstance(wrapped, DistributedDataParallel):
        old, strategy.model = weakref.ref(wrapped), strategy.lightning_module
        del wrapped
        if old() is not None:
            gc.collect()  # what only a cycle keeps alive is used by nobody
        held = old()
        if held is not None:
            fault = f"{_holders(held)} holds trainer.strategy.model, which a change of rank replaces"
    else:
        fault = f"trainer.strategy.model is of type {type(wrapped).__name__}, which would not outlast a change of rank"
    faults = [f"{fault} (process {process})" for process, fault in enumerate(from_all(fault)) if fault]
    if faults:
        raise ConfigurationError(
            f"{faults[0]}; read trainer.strategy.model where it is used, and compile the model in it"
        )


def _holders(target: object) -> str:
    """The classes of the objects that refer to ``target``, directly or by a container."""
    containers, names = (dict, list, tuple, set), set()
    for holder in gc.get_referrers(target):
        owners = gc.get_referrers(holder) if isinstance(holder, containers) else [holder]
        names |= {type(owner).__qualname__ for owner in owners if not isinstance(owner, (*containers, FrameType))}
    return ", ".join(sorted(names)) or "a running function or a container"


def wrap(trainer: Trainer) -> None:
    """Put the module into a new DDP after :func:`unwrap`; collective."""
    if isinstance(trainer.strategy, DDPStrategy):
        trainer.strategy.configure_ddp()


def average_whole_gradients(trainer: Trainer, optimizer: Any) -> None:
    """Average the gradients that FSDP2 has been told to ignore; DDP does its own."""
    if isinstance(trainer.strategy, ModelParallelStrategy):
        average_gradients(getattr(optimizer, "optimizer", optimizer))


def follow_sharded_checkpoint(trainer: Trainer) -> None:
    """Let the strategy of FSDP2 load checkpoints of other ranks and other strategies; call it in ``setup``.

    ModelParallelStrategy loads by itself, when everything is set up, and asks no hook before it does. It would find the
    optimizer's state of a single file by the place of a parameter in the model, where other strategies write its place
    in the optimizer.
    """
    strategy: Any = trainer.strategy
    if not isinstance(strategy, ModelParallelStrategy) or "load_checkpoint" in vars(strategy):
        return
    load = strategy.load_checkpoint

    def load_as_it_is(checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:
        module: Any = trainer.lightning_module
        strict, optimizers = module.strict_loading, strategy.optimizers
        in_one_file = not Path(checkpoint_path).is_dir()
        without_base = in_one_file and _lacks_base(module, checkpoint_path)
        take_saved_ranks(module, checkpoint_path)
        by_place = in_one_file and not any(map(trains_shards, optimizers))
        module.strict_loading, strategy.optimizers = strict and not without_base, [] if by_place else optimizers
        try:
            checkpoint = load(checkpoint_path, *args, **kwargs)
        finally:
            module.strict_loading, strategy.optimizers = strict, optimizers
        if by_place:
            for optimizer, state in zip(optimizers, checkpoint["optimizer_states"] if optimizers else (), strict=True):
                optimizer.load_state_dict(state)
        return checkpoint

    strategy.load_checkpoint = load_as_it_is  # type: ignore[method-assign]


def _lacks_base(module: nn.Module, path: Any) -> bool:
    """Whether the file leaves out the frozen base, which has to be the module's; collective."""

    def contents() -> dict[str, Any]:
        state = read_checkpoint(path)["state_dict"]
        return {name: value if isinstance(value, dict) else None for name, value in state.items()}

    names = from_first(contents)
    return lacks_base(module, names)
