"""The keys of a run with their defaults, of which ``conf/`` changes some; and the objects that they name."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, field, fields
from inspect import Parameter, signature
from pathlib import Path
from typing import Annotated, Any, Literal

from hydra import compose as hydra_compose
from hydra import initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from omegaconf import MISSING, DictConfig, OmegaConf
from pydantic import BeforeValidator, ByteSize, Field

from dynrank.adapters.folder import CONFIG_FILE, existing_adapter
from dynrank.app.keys import below, keys_of, named, names_keys
from dynrank.app.models.names import ModelSettings, stored_source
from dynrank.app.runs.overrides import check_keys, overrides_explained
from dynrank.app.tasks.optimizer_keys import OptimizerKeys
from dynrank.errors import ConfigurationError, Count, Name, Positive, checked
from dynrank.rank_map import RankRule, load_rank_map, parse_rank_map

CONFIG_MODULE = "dynrank.conf"
CONFIG_NAME = "train"


# How the names of metrics end whose smaller values are better.
LOWER_IS_BETTER = ("loss", "perplexity", "error", "mse", "mae", "wer", "cer")


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
class RunKeys:
    """The keys of a run outside of groups.

    Attributes:
        seed: seed of everything random; NumPy's generator allows none from 2**32 on.
        ckpt_path: resume from this checkpoint, in a new folder; ``last``: the run in ``hydra.run.dir`` goes on there.
        checkpoint_every: optimizer steps between checkpoints (checkpoints/last.ckpt); the last step has one, too.
        objective: a sweeper that looks for the best run is told this of the exported weights; a smaller value is better
            if the name ends as one of LOWER_IS_BETTER, otherwise a larger one.
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


def _with_unit(size: object) -> object:
    if not str(size).strip().lower().endswith("b"):
        raise ValueError(f"must be a size with its unit, such as 24GiB or 500 MB, got {size!r}")
    return size


@checked
class PlanKeys:
    """The keys of ``dynrank plan`` in addition to a run's.

    Attributes:
        ranks: ranks of layers that no rule of rank_map sets.
        budget: memory to fit into, such as 24GiB; None: no budget.
    """

    ranks: Annotated[list[Count], Field(min_length=1)] = field(default_factory=lambda: [4, 8, 16, 32, 64])
    budget: Annotated[ByteSize, Field(ge=1), BeforeValidator(_with_unit)] | None = None


def asked(config: DictConfig) -> PlanKeys:
    """What is asked of ``dynrank plan``."""
    return PlanKeys(**{field.name: plain(config[field.name]) for field in fields(PlanKeys)})


# Every key of a run with its default. Groups of None have the arguments of what their _target_ names.
_RUN: dict[str, Any] = {
    **asdict(RunKeys()),
    # This word cannot be the name of an argument.
    "lora": {"from": None, **asdict(LoraKeys())},
    "optimizer": asdict(OptimizerKeys()),
    "rank_map": asdict(RankMapKeys()),
    "model": asdict(ModelSettings()),
    **dict.fromkeys(("data", "task", "schedule", "trainer", "logger")),
}
_SCHEMAS = {"train": _RUN, "plan": {**_RUN, **asdict(PlanKeys())}}


def _open(keys: Mapping[str, Any]) -> DictConfig:
    """A node with these keys whose groups take new keys, which are checked when all keys are there."""
    node = OmegaConf.create(dict(keys))
    for name in ("lora", "optimizer", "rank_map", "model", "data", "task", "schedule", "trainer", "logger"):
        node[name] = DictConfig(keys[name] or {}, flags={"struct": False})
    return node


def _half(rank: Any) -> Any:
    # What is no number is refused by what reads the rank.
    return max(1, rank // 2) if isinstance(rank, int) else rank


def better(metric: str) -> Literal["min", "max"]:
    """Whether a smaller or a larger value of a metric is better."""
    return "min" if metric.endswith(LOWER_IS_BETTER) else "max"


def _base(default: str, place: str | None) -> str:
    return default if place is None else _named_by(place)[0]


# In a file: ${dynrank.half:${lora.rank}} and ${dynrank.base:minilm,${lora.from}}.
OmegaConf.register_new_resolver("dynrank.half", _half, replace=True)
OmegaConf.register_new_resolver("dynrank.base", _base, replace=True)
ConfigStore.instance().store(name="schema", node=_open(_RUN))
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
    _fill_model(config)
    _fill_adapter(config, overrides)


@names_keys
def check_run_keys(config: DictConfig, name: str = CONFIG_NAME) -> None:
    """Refuse unknown keys and wrong values of what was composed from ``conf/NAME.yaml``, without loading torch."""
    check_keys(config, _SCHEMAS[name])
    RunKeys(**{field.name: plain(config.get(field.name, field.default)) for field in fields(RunKeys)})
    for group, keys in (("lora", LoraKeys), ("optimizer", OptimizerKeys), ("model", ModelSettings)):
        values = {key: value for key, value in plain(config[group]).items() if key != "from"}
        with named(below(group)):
            keys(**values)
    if name == "plan":
        asked(config)


def _fill_length(config: DictConfig) -> None:
    """Set the length of training and the validations where nothing says them: your own files take 3 epochs.

    Other data take 560 steps. A run whose length or validations are in epochs validates four times in each, another
    every 30 batches. A ``val_check_interval`` with a point, as 0.5, is a share of an epoch.
    """
    trainer = config.trainer
    if trainer is None:
        return
    steps = trainer.get("max_steps")
    if steps is None and trainer.get("max_epochs") is None:
        own = OmegaConf.select(config, "data.train", default=None) is not None
        trainer.max_epochs, steps = (3, None) if own else (None, 560)
    trainer.max_steps = -1 if steps is None else steps
    interval = trainer.get("val_check_interval")
    in_epochs = trainer.max_steps == -1 if interval is None else isinstance(interval, float)
    if in_epochs and trainer.get("check_val_every_n_epoch") is None:
        # Lightning takes a share of an epoch only so.
        trainer.check_val_every_n_epoch = 1
    if interval is None:
        # An epoch may have fewer than 30 batches, which are counted across epochs where this is null.
        trainer.val_check_interval = 30 if trainer.get("check_val_every_n_epoch") is None else 0.25


def _fill_model(config: DictConfig) -> None:
    """Set the revision of the base that the adapter ``lora.from`` names, where no other model was chosen."""
    place = config.lora.get("from")
    if place is not None and config.task is not None and OmegaConf.is_interpolation(config.task, "model"):
        config.model.revision = config.model.revision or _named_by(place)[1]


# What an adapter sets in a run that goes on from it.
_OF_ADAPTER = {"lora.rank", "lora.alpha", "lora.target_modules", "lora.rslora"}


# The schedule of a run for which none was chosen, and its final rank as conf/ has it.
_USUAL_SCHEDULE = ("dynrank.schedules.early_budget", "${dynrank.half:${lora.rank}}")


def _fill_adapter(config: DictConfig, overrides: Sequence[str]) -> None:
    """Set the rank of a run that goes on from an adapter (``lora.from``) to the mean rank of its parameters.

    Where no schedule was chosen, the ranks stay: otherwise each run that goes on would halve the adapter again.
    """
    place = config.lora.get("from")
    if place is None:
        return
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
        if isinstance(cause, ConfigurationError):
            with named(keys_of(node, key)):
                raise cause from error
        if not isinstance(cause, ImportError | TypeError | ValueError | InstantiationException):
            raise cause from error
        said = f"{type(cause).__name__}: {' '.join(str(cause).split())}"
        raise ConfigurationError(f"{key}: {target} cannot be made: {said}; set {key}") from error


def argument(node: DictConfig, name: str) -> Any:
    """The value of an argument of what ``_target_`` names: the node's, else the default; None if there is neither."""
    known = signature(get_object(node._target_)).parameters
    default = known[name].default if name in known else None
    return plain(node.get(name, None if default is Parameter.empty else default))


def rank_pattern(config: DictConfig) -> dict[str, Any]:
    """The rules of ``rank_map.rank_pattern`` and, after them, of ``rank_map.file`` as one plain mapping, checked."""
    with named(below("rank_map")):
        keys = RankMapKeys(**plain(config))
    with named({"path": "rank_map.file", "rank_map": "rank_map.file"}.get):
        in_file = load_rank_map(Path(keys.file), RankRule) if keys.file is not None else {}
    here = parse_rank_map(keys.rank_pattern, "rank_map.rank_pattern", RankRule)
    both = sorted(in_file.keys() & here.keys())
    if both:
        raise ConfigurationError(f"keys {both} are in rank_map.file and in rank_map.rank_pattern; remove them from one")
    return {key: {k: v for k, v in vars(rule).items() if v is not None} for key, rule in (here | in_file).items()}


def plain(config: Any) -> Any:
    """Builtin containers of a configuration node, interpolations resolved."""
    return OmegaConf.to_container(config, resolve=True) if OmegaConf.is_config(config) else config
