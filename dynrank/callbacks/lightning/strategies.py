"""What a change of rank requires under each of Lightning's strategies, and which strategies are refused."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy

from dynrank.callbacks.lightning import private
from dynrank.distributed.processes import from_first
from dynrank.distributed.sharding import take_saved_ranks, trains_shards
from dynrank.distributed.wrappers import unwrapped_optimizer
from dynrank.driver.learning_rates import mark
from dynrank.errors import ConfigurationError
from dynrank.layers.frozen_base import lacks_base
from dynrank.output.checkpoint_file import read_checkpoint


def check_strategy(trainer: Trainer) -> None:
    """Refuse a strategy under which ranks cannot change; the strategy need not be set up yet."""
    strategy: Any = trainer.strategy
    known = isinstance(strategy, SingleDeviceStrategy | DDPStrategy | ModelParallelStrategy)
    # Lightning derives these two from DDPStrategy.
    if not known or {cls.__name__ for cls in type(strategy).__mro__} & {"DeepSpeedStrategy", "XLAStrategy"}:
        raise ConfigurationError(
            f"strategy must be one device, DDP or FSDP2 for ranks to change, got {type(strategy).__name__} (FSDP1 and "
            "DeepSpeed flatten parameters into one vector, others have not been tried); set trainer.strategy=ddp, or, "
            "to shard the base, trainer=fsdp2 (ModelParallelStrategy, with dynrank.distributed.sharding.shard_frozen)"
        )
    if isinstance(strategy, DDPStrategy):
        method = private.start_method(strategy)
        if method != "popen":
            raise ConfigurationError(
                f"DDPStrategy(start_method={method!r}), as in ddp_spawn and ddp_notebook, does not return all results "
                "of its processes, such as the history of ranks; set trainer.strategy=ddp, and start the program from "
                "a file"
            )
    if isinstance(strategy, ModelParallelStrategy):
        _check_fsdp2(trainer, strategy)


def _check_fsdp2(trainer: Trainer, strategy: Any) -> None:
    split = private.tensor_parallel_size(strategy)
    split = strategy.num_processes if split == "auto" else split
    if split != 1:
        raise ConfigurationError(
            f"ModelParallelStrategy splits layers over {split} devices, and LoRA on split layers is not supported; set "
            "tensor_parallel_size=1 and data_parallel_size to the number of processes"
        )
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        raise ConfigurationError(
            "precision=16-mixed under ModelParallelStrategy skips a step in some processes only; set "
            "trainer.precision=bf16-mixed"
        )


def follow_sharded_checkpoint(trainer: Trainer) -> None:
    """Let the strategy of FSDP2 load checkpoints of other ranks and other strategies; call this in ``setup``.

    ModelParallelStrategy itself loads checkpoints, after the setup, and in ``test`` and ``validate`` it calls no hook
    before (in ``fit`` it does). In a single file, it looks up optimizer state by the index of a parameter in the model,
    but other strategies write the index in the optimizer.
    """
    strategy: Any = trainer.strategy
    if not isinstance(strategy, ModelParallelStrategy) or "load_checkpoint" in vars(strategy):
        return
    load = strategy.load_checkpoint

    def load_any_ranks(checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:
        module: Any = trainer.lightning_module
        strict = module.strict_loading
        optimizers = strategy.optimizers
        in_one_file = not Path(checkpoint_path).is_dir()
        without_base = in_one_file and lacks_base(module, from_first(lambda: _names_and_marks(checkpoint_path)))
        take_saved_ranks(module, checkpoint_path)
        for optimizer in optimizers:
            # Shards are read only for keys that are there.
            mark(unwrapped_optimizer(optimizer))
        by_place = in_one_file and not any(map(trains_shards, optimizers))
        module.strict_loading = strict and not without_base
        strategy.optimizers = [] if by_place else optimizers
        try:
            checkpoint = load(checkpoint_path, *args, **kwargs)
        finally:
            module.strict_loading = strict
            strategy.optimizers = optimizers
        if by_place:
            for optimizer, state in zip(optimizers, checkpoint["optimizer_states"] if optimizers else (), strict=True):
                optimizer.load_state_dict(state)
        return checkpoint

    strategy.load_checkpoint = load_any_ranks  # type: ignore[method-assign]


def _names_and_marks(path: Any) -> dict[str, Any]:
    state = read_checkpoint(path)["state_dict"]
    return {name: value if isinstance(value, dict) else None for name, value in state.items()}
