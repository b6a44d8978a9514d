"""Names and types of a run's configuration, whose values are in ``conf/``; and the objects that it names."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import MISSING, DictConfig, OmegaConf

from dynrank.errors import ConfigurationError, configured
from dynrank.models.settings import ModelSettings
from dynrank.rank_map import load_rank_map, parse_rank_map
from dynrank.run.overrides import check_keys, overrides_explained

CONFIG_MODULE, CONFIG_NAME = "dynrank.conf", "train"


@dataclass
class LoraConfig:
    """Arguments of :func:`dynrank.add_lora`."""

    rank: int = MISSING
    alpha: float | None = MISSING
    target_modules: Any = MISSING
    dropout: float = MISSING
    rslora: bool = MISSING
    backend: str = MISSING
    group: bool | None = MISSING


@dataclass
class RankMapConfig:
    """Per-layer rules: in a file, in the configuration, or in both."""

    file: str | None = MISSING
    rank_pattern: dict[str, Any] = MISSING


@dataclass
class OptimizerConfig:
    """Arguments of :func:`dynrank.tasks.optimizers.make_optimizer`."""

    name: str = MISSING
    lr: float = MISSING
    head_lr: float = MISSING
    weight_decay: float = MISSING
    warmup_steps: int = MISSING
    decay: str = MISSING
    decay_share: float = MISSING
    options: dict[str, Any] = MISSING


@dataclass
class RunConfig:
    """A whole run; groups without a type here are arguments of the class that their ``_target_`` names."""

    lora: LoraConfig = MISSING
    rank_map: RankMapConfig = MISSING
    optimizer: OptimizerConfig = MISSING
    data: Any = MISSING
    model: Any = MISSING
    task: Any = MISSING
    schedule: Any = MISSING
    trainer: Any = MISSING
    logger: Any = MISSING
    seed: int = MISSING
    ckpt_path: str | None = MISSING
    checkpoint_every: int = MISSING
    objective: str | None = MISSING
    export: Any = MISSING
    plots: bool = MISSING


@dataclass
class PlanConfig(RunConfig):
    """A run, and the questions of ``dynrank plan`` about it."""

    base: str | None = MISSING
    batch_size: int | None = MISSING
    sequence_length: int | None = MISSING
    ranks: Any = MISSING
    budget: Any = MISSING


# In a file: ${times:2,${lora.rank}}.
OmegaConf.register_new_resolver("times", lambda first, second: first * second, replace=True)
# In a file: ${half:${lora.rank}}.
OmegaConf.register_new_resolver("half", lambda rank: max(1, rank // 2), replace=True)
ConfigStore.instance().store(name="schema", node=RunConfig)
ConfigStore.instance().store(name="plan_schema", node=PlanConfig)
ConfigStore.instance().store(group="model", name="default", node=asdict(ModelSettings()))


@configured()
def compose(overrides: Sequence[str] = (), name: str = CONFIG_NAME, folder: Path | None = None) -> DictConfig:
    """The configuration that ``dynrank-train`` would run with these overrides, for notebooks and dry runs.

    Args:
        overrides: in Hydra's syntax, such as ``["lora.rank=8", "schedule=fixed"]``.
        name: name of the file in ``conf/``; ``dynrank plan`` composes ``plan``.
        folder: folder with your own groups, as for ``dynrank-train --config-dir``.

    Raises:
        ConfigurationError: if an override cannot be used.
    """
    with overrides_explained(), initialize_config_module(CONFIG_MODULE, version_base="1.3"):
        beside = [f"hydra.searchpath=['file://{folder.resolve()}']"] if folder is not None else []
        config = hydra_compose(name, overrides=[*beside, *overrides])
    check_keys(config)
    return config


@configured()
def make(node: Any, key: str) -> Any:
    """The object that the ``_target_`` of the configuration node at ``key`` makes."""
    target = node.get("_target_") if isinstance(node, DictConfig) else None
    if not isinstance(target, str) or not target:
        raise ConfigurationError(f"_target_ must name what {key} makes, got {target!r}; set {key}._target_")
    try:
        return instantiate(node, _convert_="all")
    except InstantiationException as error:
        cause = error.__cause__ or error
        arguments = isinstance(cause, ImportError | TypeError | ValueError | InstantiationException)
        if not arguments or isinstance(cause, ConfigurationError):
            # The class's own error already names the fault.
            raise cause from error
        said = f"{type(cause).__name__}: {' '.join(str(cause).split())}"
        raise ConfigurationError(f"{key}: {target} cannot be made: {said}; set {key}") from error


@configured()
def rank_pattern(config: DictConfig) -> dict[str, Any]:
    """The rules of ``rank_map.rank_pattern`` and, after them, of ``rank_map.file`` as one plain mapping, checked."""
    in_file = load_rank_map(Path(config.file)) if config.file is not None else {}
    here = parse_rank_map(plain(config.rank_pattern), source="rank_map.rank_pattern")
    both = sorted(in_file.keys() & here.keys())
    if both:
        raise ConfigurationError(f"keys {both} are in rank_map.file and in rank_map.rank_pattern; remove them from one")
    return {key: {k: v for k, v in vars(rule).items() if v is not None} for key, rule in (here | in_file).items()}


def plain(config: Any) -> Any:
    """Builtin containers of a configuration node, interpolations resolved."""
    return OmegaConf.to_container(config, resolve=True) if OmegaConf.is_config(config) else config
