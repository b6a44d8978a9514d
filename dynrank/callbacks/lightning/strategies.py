"""Which of Lightning's strategies and callbacks are refused, because ranks cannot change under them."""

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy

from dynrank.errors import ConfigurationError


def check_strategy(trainer: Trainer) -> None:
    """Refuse a strategy under which ranks cannot change; the strategy need not be set up yet."""
    strategy: Any = trainer.strategy
    known = isinstance(strategy, SingleDeviceStrategy | DDPStrategy | ModelParallelStrategy)
    # Lightning derives these two from DDPStrategy.
    if not known or {cls.__name__ for cls in type(strategy).__mro__} & {"DeepSpeedStrategy", "XLAStrategy"}:
        raise ConfigurationError(
            f"strategy must be one device, DDP or FSDP2 for ranks to change, got {type(strategy).__name__} (FSDP1 and "
            'DeepSpeed flatten parameters into one vector, others have not been tried); use strategy="ddp", or, to '
            "shard the base, ModelParallelStrategy() with dynrank.distributed.sharding.shard_frozen",
            "strategy",
        )
    if isinstance(strategy, DDPStrategy) and strategy._start_method != "popen":
        raise ConfigurationError(
            f"DDPStrategy(start_method={strategy._start_method!r}), as in ddp_spawn and ddp_notebook, does not return "
            'all results of its processes, such as the history of ranks; use strategy="ddp", and start the program '
            "from a file",
            "strategy",
        )
    if isinstance(strategy, ModelParallelStrategy):
        _check_fsdp2(trainer, strategy)


def _check_fsdp2(trainer: Trainer, strategy: Any) -> None:
    size = strategy._tensor_parallel_size
    split = strategy.num_processes if size == "auto" else size
    if split != 1:
        raise ConfigurationError(
            f"ModelParallelStrategy splits layers over {split} devices, and LoRA on split layers is not supported; use "
            "tensor_parallel_size=1, and the number of processes as data_parallel_size",
            "strategy",
        )
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        raise ConfigurationError(
            "precision=16-mixed under ModelParallelStrategy skips a step in some processes only; use "
            'precision="bf16-mixed"',
            "precision",
        )


def check_averages(trainer: Trainer) -> None:
    """Refuse averages of weights, which would have to change and to leave out the base as the weights do."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, StochasticWeightAveraging | WeightAveraging):
            raise ConfigurationError(
                f"{type(callback).__name__} averages whole models of one rank, and RankScheduler and AdapterCheckpoint "
                "do not: take it or them out of callbacks",
                "callbacks",
            )
