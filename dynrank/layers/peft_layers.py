"""PEFT's LoRA layers, whose ranks are changed in place: modules, adapters and configs remain objects of PEFT.

This module does not import PEFT. A program with a model wrapped by PEFT has imported it already.
"""

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from dynrank.errors import ConfigurationError
from dynrank.layers.compiled import plain_name
from dynrank.layers.foreign import class_if_imported, store_on, stored_on
from dynrank.layers.frozen_base import follow_base
from dynrank.layers.lora_layer import initial_scaling
from dynrank.layers.ranked_layer import OfFactors, take_rank
from dynrank.patterns import first_matches, peft_ranks
from dynrank.rank_map import FREE

_FACTORS = {nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d}
# Initialisations that do not change the base weight. The others subtract a part from it that depends on the rank, and
# subtract it again from a fresh base when the adapter is loaded.
HARMLESS_INIT = (True, False, "gaussian", "orthogonal", "eva")


class PeftLayer(OfFactors):
    """One adapter of a PEFT LoRA layer as a :class:`dynrank.layers.ranked_layer.RankedLayer`.

    ``module`` is a peft.tuners.lora.LoraLayer, ``adapter`` the name of one of its adapters. All data is stored on the
    module, so two views of one adapter are equivalent.
    """

    # So that nobody sets an attribute on a view, which is made anew each time.
    __slots__ = ("adapter", "module")

    # PEFT has no rank map with bounds; that of a schedule has them for its layers.
    bounds = FREE

    def __init__(self, module: Any, adapter: str) -> None:
        self.module = module
        self.adapter = adapter

    @property
    def lora_A(self) -> nn.Parameter:
        """(rank, d_in); (rank, channels, kernel...) for a convolution."""
        return self._factor("A")

    @property
    def lora_B(self) -> nn.Parameter:
        """(d_out, rank); (d_out, rank, 1...) for a convolution."""
        return self._factor("B")

    def _factor(self, which: str) -> nn.Parameter:
        if self.of_embedding:
            factor: nn.Parameter = getattr(self.module, f"lora_embedding_{which}")[self.adapter]
        else:
            factor = getattr(self.module, f"lora_{which}")[self.adapter].weight
        return factor

    @property
    def of_embedding(self) -> bool:
        """Whether the base is an embedding, for which PEFT stores the factors as bare Parameters."""
        return self.adapter in self.module.lora_embedding_A

    @property
    def num_products(self) -> int:
        # PEFT adapts a bare parameter (target_parameters), which may stack the matrices of experts.
        return self.module.num_experts if hasattr(self.module, "parameter_name") else 1

    @property
    def scaling(self) -> float:
        return float(self.module.scaling[self.adapter])

    @property
    def base(self) -> nn.Module:
        base: nn.Module = self.module.get_base_layer()
        return base

    @property
    def merged(self) -> bool:
        return bool(self.module.merged)

    def set_factors(self, lora_A: Tensor, lora_B: Tensor) -> None:
        """As in :class:`OfFactors`; also updates the rank that PEFT's module records.

        :func:`config_changes` updates PEFT's config and alphas, once for all layers.
        """
        of_A = self.lora_A.shape[1:]
        of_B = self.lora_B.shape[2:]
        super().set_factors(lora_A.reshape(-1, *of_A), lora_B.reshape(len(lora_B), -1, *of_B))
        if not self.of_embedding:
            kind = "channels" if of_B else "features"
            rows = len(self.lora_A)
            setattr(self.module.lora_A[self.adapter], f"out_{kind}", rows)
            setattr(self.module.lora_B[self.adapter], f"in_{kind}", rows)
        self.module.r[self.adapter] = self.rank

    def record_alpha(self, rslora: bool) -> None:
        """Record alpha so that PEFT's rule, with ``use_rslora`` or without, gives the scaling that the layer has."""
        # The recorded rank: factors that keep their shapes have more rows.
        self.module.lora_alpha[self.adapter] = _alpha(self.module.r[self.adapter], self.scaling, rslora)
        self.module.use_rslora[self.adapter] = rslora


def peft_layers(model: nn.Module) -> dict[str, PeftLayer]:
    """PEFT's LoRA layers of ``model`` by name, each for its one active adapter.

    A layer without the active adapter is left out. A parameter that PEFT adapts (``target_parameters``) counts as a
    layer with its name in ``rank_pattern``: ``...mlp.experts.gate_up_proj``.
    """
    modules = _lora_modules(model)
    configs = _configs(model) if modules else {}
    layers = {}
    faults = dict[str, list[str]]()
    for name, module in modules:
        active = list(module.active_adapters)
        present = [adapter for adapter in active if adapter in _adapters(module)]
        if active and not present:
            continue
        if len(present) != 1:
            fault: str | None = f"adapters {active} are active; activate one with set_adapter()"
        elif module not in configs:
            fault = "PEFT's config is not in this model; pass the model that get_peft_model returned, or what holds it"
        else:
            fault = _fault(module, present[0], configs[module][1].get(present[0]))
        if fault is None:
            layers[_peft_name(plain_name(name), module)] = PeftLayer(module, present[0])
        else:
            faults.setdefault(fault, []).append(plain_name(name))
    if faults:
        lines = [f"{n[0]!r}{f' and {len(n) - 1} more' if len(n) > 1 else ''}: {fault}" for fault, n in faults.items()]
        raise ConfigurationError("these LoRA layers of PEFT cannot be used:\n  " + "\n  ".join(lines))
    return layers


def has_peft_layers(model: nn.Module) -> bool:
    """Whether ``model`` has LoRA layers of PEFT, whatever their state."""
    return bool(_lora_modules(model))


def refuse_peft(model: nn.Module, action: str, instead: str) -> None:
    for name, _ in _peft_modules(model, "tuners_utils.BaseTunerLayer"):
        raise ConfigurationError(f"{action} cannot work on a model wrapped by PEFT ({name!r} is PEFT's): {instead}")


def config_changes(model: nn.Module, ranks: Mapping[tuple[nn.Module, str], int]) -> list[Callable[[], None]]:
    """Functions that write the ranks of the layers into every PEFT config in ``model``, so that PEFT's files load.

    They set r, lora_alpha, and one anchored entry of rank_pattern and alpha_pattern per layer that differs. use_rslora
    becomes False where no alpha would give a layer its scaling to the bit. A config with the right ranks does not
    change. The functions only make assignments. ``ranks`` are those that layers will have when the functions are
    called, by module and adapter.
    """
    configs = _configs(model)
    changes = list[Callable[[], None]]()
    lost = [name for name, module in _lora_modules(model) if module not in configs]
    if lost:
        raise ConfigurationError(f"the config of PEFT's layer {lost[0]!r} is not in the model; pass the whole model")
    for by_adapter in {id(each): each for _, each in configs.values()}.values():
        for adapter, config in by_adapter.items():
            if config.peft_type != "LORA":
                continue
            layers = {
                name: PeftLayer(module, adapter)
                for module, (name, each) in configs.items()
                if each is by_adapter and adapter in _adapters(module)
            }
            will_be = {name: ranks.get((layer.module, adapter), layer.rank) for name, layer in layers.items()}
            if will_be == dict.fromkeys(will_be, config.r) | first_matches(config.rank_pattern, will_be):
                continue
            # The user's own config object, and other adapters that use it, must not change.
            new = copy.copy(config)
            pairs = {name: (rank, layers[name].scaling) for name, rank in will_be.items()}
            rslora = bool(config.use_rslora) and all(_fits_rslora(*pair) for pair in pairs.values())
            settings = peft_ranks({name: (pair[0], _alpha(*pair, rslora)) for name, pair in pairs.items()}, rslora)
            for field, value in settings.items():
                setattr(new, field, value)
            # PEFT would initialise the factors again on loading, and "orthogonal" supports even ranks only.
            if new.init_lora_weights == "orthogonal":
                new.init_lora_weights = True
            changes += [partial(layer.record_alpha, rslora) for layer in layers.values()]
            changes.append(partial(by_adapter.__setitem__, adapter, new))
    return changes


def _alpha(rank: int, scaling: float, rslora: bool) -> float:
    """The alpha by which PEFT's rule gives a layer of this rank its scaling."""
    return scaling * (rank**0.5 if rslora else rank)


def _fits_rslora(rank: int, scaling: float) -> bool:
    """Whether alpha / sqrt(rank) can give this scaling to the bit."""
    return initial_scaling(_alpha(rank, scaling, True), rank, True) == scaling


def record_ranks(model: nn.Module, ranks: Mapping[str, int]) -> None:
    """Let PEFT's modules and configs in ``model`` have these ranks, by layer, while the factors keep their shapes."""
    layers = peft_layers(model)
    for name, layer in layers.items():
        layer.module.r[layer.adapter] = ranks[name]
    by_module = {(layer.module, layer.adapter): ranks[name] for name, layer in layers.items()}
    for change in config_changes(model, by_module) if layers else ():
        change()


def follow_checkpoint_ranks(model: nn.Module) -> None:
    """Let ``model.load_state_dict`` give PEFT's LoRA layers, and their configs, the ranks of the state dict.

    Without this, a freshly wrapped model cannot load a checkpoint from after a change of rank, nor one without the
    frozen base (AdapterCheckpoint). RankScheduler calls this function in ``setup``. ``load_from_checkpoint`` runs no
    callbacks; for it, call this function at the end of the module's ``__init__``. The layers may be created later (in
    ``configure_model``), because only loading looks them up. A second call does nothing.

    >>> import torch, dynrank
    >>> from peft import LoraConfig, get_peft_model
    >>> def wrapped(rank):
    ...     model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    ...     return get_peft_model(model, LoraConfig(r=rank, target_modules=["0"]))
    >>> model = wrapped(4)
    >>> dynrank.follow_checkpoint_ranks(model)
    >>> _ = model.load_state_dict(wrapped(2).state_dict())
    >>> [layer.rank for _, layer in dynrank.lora_layers(model)]
    [2]
    """
    if not stored_on(model, "follows_ranks"):
        store_on(model, "follows_ranks", True)
        model.register_load_state_dict_pre_hook(take_peft_ranks)  # type: ignore[no-untyped-call]
        follow_base(model)


def take_peft_ranks(model: nn.Module, state_dict: Mapping[str, Any], prefix: str = "", *_: Any) -> None:
    """Give PEFT's LoRA layers the ranks of the factors in ``state_dict``; see :func:`follow_checkpoint_ranks`."""
    configs = _configs(model)
    changed = False
    for name, module in _lora_modules(model):
        for adapter in _adapters(module):
            layer = PeftLayer(module, adapter)
            start = f"{prefix}{name}." if name else prefix
            key = "lora_embedding_{}." + adapter if layer.of_embedding else "lora_{}." + f"{adapter}.weight"
            lora_A, lora_B = (state_dict.get(start + key.format(factor)) for factor in "AB")
            if lora_A is None or lora_A.shape == layer.lora_A.shape:
                continue
            fault = _fault(module, adapter, configs.get(module, ("", {}))[1].get(adapter))
            if fault:
                raise ConfigurationError(f"{prefix + name!r} cannot take the rank of the checkpoint: {fault}")
            take_rank(layer, prefix + name, lora_A, lora_B)
            changed = True
    for change in config_changes(model, {}) if changed else ():
        change()


def _fault(module: Any, adapter: str, config: Any) -> str | None:
    """The reason why the rank of this adapter cannot change; None if it can."""
    if hasattr(module, "lora_E"):
        return "AdaLoRA masks ranks by itself; use a plain LoraConfig"
    if isinstance(module.get_base_layer(), nn.MultiheadAttention):
        return "PEFT merges the adapter of a MultiheadAttention in every forward"
    if adapter in module.lora_variant:
        variant = type(module.lora_variant[adapter]).__name__
        instead = "set use_dora=False" if variant.startswith("Dora") else "use a plain LoraConfig"
        return f"the variant {variant} computes something else than plain LoRA; {instead}"
    if module.lora_bias.get(adapter):
        return "lora_bias gives the update a bias; set lora_bias=False"
    if adapter in module.lora_A:
        kinds = {type(factors[adapter]) for factors in (module.lora_A, module.lora_B)}
        if len(kinds) > 1 or not kinds <= _FACTORS:
            return f"its factors are {' and '.join(sorted(kind.__name__ for kind in kinds))}, not of one plain kind"
        if getattr(module.get_base_layer(), "groups", 1) != 1:
            return "a convolution in groups has factors whose product is no matrix; leave it out of target_modules"
    if config is not None and config.init_lora_weights not in HARMLESS_INIT:
        return (
            f"init_lora_weights={config.init_lora_weights!r} has changed the base weight by a part that depends on "
            "the rank; save the base model as it is now, and set init_lora_weights to True in the adapter's config"
        )
    if getattr(config, "target_modules_to_tie", None):
        return "ensure_weight_tying lets two layers share their factors; set it to False"
    return None


def _configs(model: nn.Module) -> dict[nn.Module, tuple[str, dict[str, Any]]]:
    """{LoRA module: (its name in PEFT's patterns, its configs by adapter)}.

    PEFT stores its configs on the model that it was given, so names are relative to the nearest module with configs.
    """
    found: dict[nn.Module, tuple[str, dict[str, Any]]] = {}
    for root in model.modules():
        configs = vars(root).get("peft_config")
        if isinstance(configs, dict):
            found |= {module: (_peft_name(name, module), configs) for name, module in _lora_modules(root)}
    return found


def _peft_name(name: str, module: Any) -> str:
    """The name of a LoRA module in PEFT's patterns; if it adapts a bare parameter, the name of that."""
    if not hasattr(module, "parameter_name"):
        return name
    return f"{name.replace('.base_layer', '')}.{module.parameter_name}"


def _adapters(module: Any) -> list[str]:
    return [*module.lora_A, *module.lora_embedding_A]


def _lora_modules(model: nn.Module) -> list[tuple[str, Any]]:
    return _peft_modules(model, "lora.LoraLayer")


def _peft_modules(model: nn.Module, path: str) -> list[tuple[str, Any]]:
    """Modules of the class ``path`` of PEFT; empty if PEFT is not imported."""
    cls = class_if_imported(f"peft.tuners.{path}")
    return [(name, module) for name, module in model.named_modules() if isinstance(module, cls)]
