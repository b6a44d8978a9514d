"""Checkpoints of FSDP2 under Lightning: of other ranks, of other strategies, without the frozen base."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy

from dynrank.distributed.processes import from_first
from dynrank.distributed.sharding import take_saved_ranks, trains_shards
from dynrank.layers.frozen_base import lacks_base
from dynrank.output.checkpoint_file import read_checkpoint


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
