"""The keys of a run with their defaults, of which ``conf/`` changes some; and the objects that they name."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from hydra import compose as hydra_compose
from hydra import initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import MISSING, DictConfig, OmegaConf
from pydantic import ByteSize, Field

from dynrank.adapters.folder import CONFIG_FILE, existing_adapter
from dynrank.app.keys import named, names_keys
from dynrank.app.models.names import ModelSettings, stored_source
from dynrank.app.runs.overrides import check_keys, overrides_explained
from dynrank.app.tasks.optimizer_keys import OptimizerKeys
from dynrank.errors import ConfigurationError, Count, Name, Positive, checked
from dynrank.rank_map import RankRule, load_rank_map, parse_rank_map

CONFIG_MODULE = "dynrank.conf"
CONFIG_NAME = "train"
T = TypeVar("T")


@checked
class LoraKeys:
    """The keys of ``lora``: arguments of :func:`dynrank.add_lora`, whose import would load torch."""

    rank: Count = MISSING
    alpha: Positive | None = None
    target_modules: Any = "all-linear"
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    rslora: bool = False
    backend: Literal["auto", "torch", "triton", "reference"] = "auto"


@checked
class TrainerKeys:
    """The keys of ``trainer`` with which Lightning would fail in training, or make another kind of run."""

    max_steps: int | None = None
    accumulate_grad_batches: Count = 1
    fast_dev_run: Literal[False] = False
    overfit_batches: Literal[0] = 0


@checked
class RunKeys:
    """The keys of a run outside of groups.

    Attributes:
        seed: seed of everything random; NumPy's generator allows none from 2**32 on.
        ckpt_path: resume from this checkpoint, in a new folder; ``last``: the run in ``hydra.run.dir`` goes on there.
        checkpoint_every: optimizer steps between checkpoints (checkpoints/last.ckpt); the last step has one, too.
        objective: a sweeper that looks for the best run is told this of the exported weights.
        export_weights: ``best``: the weights of the best validation since the last change of ranks, by ``objective``
            if validations log it, otherwise by val/loss; ``last``: those of the last step.
        plots: whether to draw pictures and write report.html; needs the extra ``dynrank[plots]``.
    """

    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    ckpt_path: str | None = None
    checkpoint_every: Count = 50
    objective: str | None = "val/loss"
    export_weights: Literal["best", "last"] = "best"
    plots: bool = True


@checked
class RankMapKeys:
    """Rules for single layers: in an override file, and what such a file would hold."""

    file: Name | None = None
    rank_pattern: Mapping[Any, Any] = field(default_factory=dict)


@checked
class PlanKeys:
    """The keys of ``dynrank plan`` in addition to a run's.

    Attributes:
        ranks: ranks of layers that no rule of rank_map sets.
        budget: memory to fit into, such as 24GiB, which is no number of bytes below a million; None: no budget.
    """

    ranks: Annotated[list[Count], Field(min_length=1)] = field(default_factory=lambda: [4, 8, 16, 32, 64])
    budget: Annotated[ByteSize, Field(ge=10**6)] | None = None


def read_keys(kind: type[T], node: DictConfig) -> T:
    """The keys of a ``kind``, one of the classes above, in a node of the configuration, checked."""
    names = [key.name for key in fields(kind) if key.name in node]  # type: ignore[arg-type]
    return kind(**{name: plain(node[name]) for name in names})


# Every key of a run with its default. Groups of None have the arguments of what their _target_ names. An argument that
# has a name in several groups is a key of the first.
_RUN: dict[str, Any] = {
    **asdict(RunKeys()),
    "schedule": None,
    # This word cannot be the name of an argument.
    "lora": {"from": None, **asdict(LoraKeys())},
    "rank_map": asdict(RankMapKeys()),
    "optimizer": asdict(OptimizerKeys()),
    "trainer": dict.fromkeys(("max_steps", "max_epochs", "val_check_interval", "check_val_every_n_epoch")),
    **dict.fromkeys(("task", "data")),
    "model": asdict(ModelSettings()),
    "logger": None,
}
_SCHEMAS = {"train": _RUN, "plan": {**_RUN, **asdict(PlanKeys())}}
# These take new keys, which are checked when all keys are there.
_GROUPS = {name: DictConfig(_RUN[name] or {}, flags={"struct": False}) for name in _RUN.keys() - asdict(RunKeys())}

# In a file: ${dynrank.half:${lora.rank}} and ${dynrank.base:minilm,${lora.from}}. What is no number is refused by what
# reads the rank.
_resolver = OmegaConf.register_new_resolver
_resolver("dynrank.half", lambda rank: max(1, rank // 2) if isinstance(rank, int) else rank, replace=True)
_resolver("dynrank.base", lambda default, place: default if place is None else _named_by(place)[0], replace=True)
ConfigStore.instance().store(name="schema", node=OmegaConf.create({**_RUN, **_GROUPS}))
ConfigStore.instance().store(name="plan_schema", node=asdict(PlanKeys()))
ConfigStore.instance().store(group="model", name="default", node=asdict(ModelSettings()))


def compose(overrides: Sequence[str] = (), name: str = CONFIG_NAME, folder: Path | None = None) -> DictConfig:
    """The configuration that ``dynrank-train`` would run with these overrides, for notebooks and dry runs.

    Args:
        overrides: in Hydra's syntax, such as ``["lora.rank=8", "schedule=fixed"]``.
        name: name of the file in ``conf/``; ``dynrank plan`` composes ``plan``.
        folder: folder with your own groups, as for ``dynrank-train --config-dir``.

    Raises:
        ConfigurationError: if an override cannot be used.

    >>> import dynrank
    >>> dynrank.compose(["lora.rank=8", "schedule=fixed"]).lora.rank
    8
    """
    beside = []
    if folder is not None:
        place = str(folder.resolve()).replace("'", r"\'")
        beside = [f"hydra.searchpath=['file://{place}']"]
    with overrides_explained(), initialize_config_module(CONFIG_MODULE, version_base="1.3"):
        config = hydra_compose(name, overrides=[*beside, *overrides])
    complete(config, overrides, name)
    return config


@names_keys
def complete(config: DictConfig, overrides: Sequence[str], name: str = CONFIG_NAME) -> None:
    """Check the keys of what was composed from ``conf/NAME.yaml``, and set the values that follow from others."""
    check_run_keys(config, name)
    _fill_length(config)
    if config.lora.get("from") is not None:
        _fill_adapter(config, config.lora["from"], overrides)


def check_run_keys(config: DictConfig, name: str = CONFIG_NAME) -> None:
    """Refuse unknown keys and wrong values of what was composed from ``conf/NAME.yaml``, without loading torch."""
    check_keys(config, _SCHEMAS[name])
    read_keys(RunKeys, config)
    read_keys(LoraKeys, config.lora)
    read_keys(OptimizerKeys, config.optimizer)
    read_keys(ModelSettings, config.model)
    read_keys(TrainerKeys, config.trainer)
    if name == "plan":
        read_keys(PlanKeys, config)


def _fill_length(config: DictConfig) -> None:
    """Set the length of training and the validations where nothing says them: your own files take 3 epochs.

    Other data take 560 steps. A run whose length is in epochs validates four times in each, another every 30 batches.
    A ``val_check_interval`` with a point, as 0.5, is a share of an epoch.
    """
    trainer = config.trainer
    if trainer.max_steps is None and trainer.max_epochs is None:
        own = OmegaConf.select(config, "data.train", default=None) is not None
        trainer.max_epochs, trainer.max_steps = (3, None) if own else (None, 560)
    if trainer.max_steps is None:
        trainer.max_steps = -1
    if trainer.val_check_interval is None:
        in_epochs = trainer.max_steps == -1 or trainer.check_val_every_n_epoch is not None
        trainer.val_check_interval = 0.25 if in_epochs else 30
    if isinstance(trainer.val_check_interval, float) and trainer.check_val_every_n_epoch is None:
        # Lightning takes a share of an epoch only so.
        trainer.check_val_every_n_epoch = 1


# What an adapter sets in a run that goes on from it.
_OF_ADAPTER = {"lora.rank", "lora.alpha", "lora.target_modules", "lora.rslora"}
# The schedule of a run for which none was chosen, and its final rank as conf/ has it.
_USUAL_SCHEDULE = ("dynrank.schedules.early_budget", "${dynrank.half:${lora.rank}}")


def _fill_adapter(config: DictConfig, place: str, overrides: Sequence[str]) -> None:
    """Set the rank of a run that goes on from the adapter at ``place`` to the mean rank of its parameters.

    Where no other model was chosen, the base has the revision that the adapter names. Where no schedule was chosen, the
    ranks stay: otherwise each run that goes on would halve the adapter again.
    """
    if OmegaConf.is_interpolation(config.task, "model"):
        config.model.revision = config.model.revision or _named_by(place)[1]
    keys = {override.partition("=")[0].lstrip("+~") for override in overrides}
    given = _OF_ADAPTER & keys
    if given or config.rank_map.file is not None or config.rank_map.rank_pattern:
        names = ", ".join(sorted(given)) or "rank_map"
        both = f"{names} cannot go with lora.from={place}, whose adapter sets layers and ranks"
        raise ConfigurationError(f"{both}; remove one of the two; a schedule changes the ranks")
    folder = existing_adapter(Path(place))
    # This import loads torch, and --help must not wait for that.
    from dynrank.adapters.read import open_adapter

    with open_adapter(folder) as adapter:
        sizes = [(layer.rank, layer.params_per_rank) for layer in adapter.layers.values()]
    config.lora.rank = round(sum(rank * size for rank, size in sizes) / sum(size for _, size in sizes))
    # A file of the user's own may also choose a schedule.
    schedule = OmegaConf.to_container(config.schedule, resolve=False)
    usual = isinstance(schedule, dict) and (schedule.get("_target_"), schedule.get("final_rank")) == _USUAL_SCHEDULE
    if usual and not any(re.match(r"schedule\b", key) for key in keys):
        config.schedule = {"_target_": "dynrank.schedules.fixed"}


def _named_by(place: str) -> tuple[str, str | None]:
    """(the base that the adapter at ``place`` names, as ``task.model`` takes it; its revision there, if any)."""
    folder = existing_adapter(Path(place))
    from dynrank.adapters.config import AdapterConfig
    from dynrank.adapters.stored import read_json

    config = read_json(AdapterConfig, folder / CONFIG_FILE)
    base = config.base_model_name_or_path
    if not isinstance(base, str) or not base:
        raise ConfigurationError(f"the adapter {place!r} (lora.from) names no base model; set task.model")
    return stored_source(base), config.revision


def make(node: Any, key: str) -> Any:
    """The object that the ``_target_`` of the configuration node at ``key`` makes."""
    target = node.get("_target_") if isinstance(node, DictConfig) else None
    if not isinstance(target, str) or not target:
        raise ConfigurationError(f"_target_ must name what {key} makes, got {target!r}; set {key}._target_")
    try:
        return instantiate(node, _convert_="all")
    except InstantiationException as error:
        cause = error.__cause__ or error
        theirs = isinstance(cause, ImportError | TypeError | ValueError | InstantiationException)
        if isinstance(cause, ConfigurationError) or not theirs:
            raise cause from error
        said = f"{type(cause).__name__}: {' '.join(str(cause).split())}"
        raise ConfigurationError(f"{key}: {target} cannot be made: {said}; set {key}") from error


def rank_pattern(config: DictConfig) -> dict[str, Any]:
    """The rules of ``rank_map.rank_pattern``, and after them those of ``rank_map.file`` that have another key."""
    keys = read_keys(RankMapKeys, config)
    with named({"path": "rank_map.file", "rank_map": "rank_map.file"}.get):
        in_file = load_rank_map(Path(keys.file), RankRule) if keys.file is not None else {}
    here = parse_rank_map(keys.rank_pattern, "rank_map.rank_pattern", RankRule)
    rules = here | in_file | here
    return {key: {k: v for k, v in vars(rule).items() if v is not None} for key, rule in rules.items()}


def plain(config: Any) -> Any:
    """Builtin containers of a configuration node, interpolations resolved."""
    return OmegaConf.to_container(config, resolve=True) if OmegaConf.is_config(config) else config
