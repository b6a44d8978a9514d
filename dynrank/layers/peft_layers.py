"""LoRA layers that PEFT has put into a model, changed in place: its modules, adapters and configs stay PEFT's own.

PEFT is not imported here. A program that holds a model wrapped by it has imported it already.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from dynrank.errors import ConfigurationError
from dynrank.kernels.lora_linear import Tap
from dynrank.layers.compiled import plain_name
from dynrank.layers.frozen_base import follow_base
from dynrank.layers.ranked import put_factors, take_rank
from dynrank.rank_map import matches, peft_ranks

__all__ = ["PeftLayer", "follow_checkpoint_ranks", "peft_layers", "refuse_peft", "sync_peft_configs", "take_peft_ranks"]

# Initialisations that leave the base weight alone. The others take out of it what depends on the rank, and take it out
# again of a fresh base when the adapter is loaded.
_HARMLESS_INIT = (True, False, "gaussian", "orthogonal", "eva")


class PeftLayer:
    """One adapter of a PEFT LoRA layer as a :class:`dynrank.layers.base.RankedLayer`.

    A view: all that it knows is stored on the module, so that two views of one adapter are the same layer.

    Args:
        module: the peft.tuners.lora.LoraLayer.
        adapter: name of one of its adapters.
    """

    capacity: int | None = None  # its layers are compiled anew for every rank

    def __init__(self, module: Any, adapter: str) -> None:
        self.module, self.adapter = module, adapter

    @property
    def lora_A(self) -> nn.Parameter:
        """(rank, d_in)."""
        return self._factors()[0]

    @property
    def lora_B(self) -> nn.Parameter:
        """(d_out, rank)."""
        return self._factors()[1]

    @property
    def rank(self) -> int:
        return self.lora_A.shape[0]

    @property
    def scaling(self) -> float:
        return float(self.module.scaling[self.adapter])

    @property
    def alpha(self) -> float:
        return self.scaling * self.rank

    @property
    def base(self) -> nn.Module:
        base: nn.Module = self.module.get_base_layer()
        return base

    @property
    def merged(self) -> bool:
        return bool(self.module.merged)

    @property
    def pinned(self) -> bool:
        return bool(self._notes().get("pinned"))

    @pinned.setter
    def pinned(self, value: bool) -> None:
        self._note(pinned=value)

    @property
    def final_rank(self) -> int | None:
        return self._notes().get("final_rank")

    @final_rank.setter
    def final_rank(self, value: int | None) -> None:
        self._note(final_rank=value)

    @property
    def rule(self) -> str | None:
        return self._notes().get("rule")

    @rule.setter
    def rule(self, value: str | None) -> None:
        self._note(rule=value)

    def set_factors(self, lora_A: Tensor, lora_B: Tensor) -> None:
        """Put new factors, of any rank, into the same two Parameter objects; their gradients are dropped.

        The module's own record of the rank follows; PEFT's config does in :func:`sync_peft_configs`, once for all.

        Args:
            lora_A: (rank, d_in), own storage, dtype and device of the old.
            lora_B: (d_out, rank), likewise.
        """
        put_factors(self, lora_A, lora_B)
        if not self.of_embedding:
            self.module.lora_A[self.adapter].out_features = self.module.lora_B[self.adapter].in_features = self.rank
        self.module.r[self.adapter] = self.rank
        self.record_alpha()

    def record_alpha(self) -> None:
        """Make alpha / rank the rule by which PEFT comes to the scaling that the layer has."""
        self.module.lora_alpha[self.adapter], self.module.use_rslora[self.adapter] = self.alpha, False

    def observe(self, tap: Tap) -> Callable[[], None]:
        """From now on call ``tap(z, dz)`` once in each backward; stop when the returned function is called.

        z is A applied to the layer's input (after dropout) and dz the gradient of the loss at z, which is
        ``scaling * B^T g``; both (tokens, rank), without a graph. A layer that a forward pass runs twice reports twice.
        Between forward and backward z is held, under gradient checkpointing too.

        Raises:
            RuntimeError: if the layer is being observed already.
        """
        if self._notes().get("observed"):
            raise RuntimeError("the layer is being observed already")
        self._note(observed=True)
        on = True

        def report(z: Tensor, dz: Tensor) -> None:
            if on:
                tap(z.reshape(-1, z.shape[-1]), dz.reshape(-1, dz.shape[-1]))

        watch = self._watch_embedding if self.of_embedding else self._watch_linear
        handle = watch(report)

        def stop() -> None:
            nonlocal on
            on = False
            handle.remove()
            self._note(observed=False)

        return stop

    def _watch_linear(self, report: Tap) -> Any:
        def watch(_: nn.Module, __: Any, z: Tensor) -> None:
            if z.requires_grad:
                values = z.detach()
                z.register_hook(lambda dz: report(values, dz))  # type: ignore[no-untyped-call]

        return self.module.lora_A[self.adapter].register_forward_hook(watch)

    def _watch_embedding(self, report: Tap) -> Any:
        # No module has z for its output here, so both come from the layer's own input and output.
        def watch(module: Any, inputs: tuple[Tensor, ...], y: Tensor) -> None:
            if y.requires_grad and not module.merged and not module.disable_adapters:
                values = F.embedding(inputs[0], self.lora_A.detach().mT)
                scaling = self.scaling * getattr(self.base, "embed_scale", 1.0)  # Gemma 3 scales its embedding

                def report_at_z(g: Tensor) -> None:
                    report(values, scaling * (g.to(values.dtype) @ self.lora_B.detach()))

                y.register_hook(report_at_z)  # type: ignore[no-untyped-call]

        return self.module.register_forward_hook(watch)

    @property
    def of_embedding(self) -> bool:
        """Whether the factors are bare Parameters, as PEFT has them for an embedding."""
        return self.adapter in self.module.lora_embedding_A

    def _factors(self) -> tuple[nn.Parameter, nn.Parameter]:
        if self.of_embedding:
            return self.module.lora_embedding_A[self.adapter], self.module.lora_embedding_B[self.adapter]
        return self.module.lora_A[self.adapter].weight, self.module.lora_B[self.adapter].weight

    def _notes(self) -> dict[str, Any]:
        notes: dict[str, Any] = getattr(self.module, "dynrank_notes", {}).get(self.adapter, {})
        return notes

    def _note(self, **notes: Any) -> None:
        vars(self.module).setdefault("dynrank_notes", {}).setdefault(self.adapter, {}).update(notes)


def peft_layers(model: nn.Module) -> dict[str, PeftLayer]:
    """PEFT's LoRA layers of ``model`` by name, each for the one adapter that is active in it.

    A layer without the active adapter is left out. A model that PEFT has not touched gives an empty dict.

    Raises:
        ConfigurationError: naming each kind of layer whose rank cannot be changed and why: other arithmetic than
            ``y + scaling * B A x`` (DoRA, aLoRA, AdaLoRA, target_parameters, ...), factors that are not matrices, none
            or several active adapters, or a config that lies outside ``model``.
    """
    layers, faults = {}, dict[str, list[str]]()
    configs = _configs(model)
    for raw, module in _lora_modules(model):
        name = plain_name(raw)
        active = list(module.active_adapters)
        held = [adapter for adapter in active if adapter in _adapters(module)]
        if len(held) > 1 or not active:
            fault: str | None = f"adapters {active} are active; activate one with set_adapter()"
        elif not held:
            continue
        elif id(module) not in configs:
            fault = "PEFT's config is not in this model; pass the model that get_peft_model returned, or what holds it"
        else:
            fault = _fault(module, held[0], configs[id(module)][1].get(held[0]))
        if fault is None:
            layers[name] = PeftLayer(module, held[0])
        else:
            faults.setdefault(fault, []).append(name)
    if faults:
        lines = [f"{n[0]!r}{f' and {len(n) - 1} more' if len(n) > 1 else ''}: {fault}" for fault, n in faults.items()]
        raise ConfigurationError("these LoRA layers of PEFT cannot be used:\n  " + "\n  ".join(lines))
    return layers


def refuse_peft(model: nn.Module, action: str, instead: str) -> None:
    """Refuse a model that is wrapped by PEFT.

    Raises:
        ConfigurationError: saying what to do ``instead`` of ``action``.
    """
    for name, _ in _peft_modules(model, "tuners.tuners_utils", "BaseTunerLayer"):
        raise ConfigurationError(f"{action} cannot work on a model wrapped by PEFT ({name!r} is PEFT's): {instead}")


def sync_peft_configs(model: nn.Module) -> None:
    """Make every PEFT config in ``model`` say the ranks that its layers have, so that what PEFT saves loads again.

    r, lora_alpha, rank_pattern and alpha_pattern then hold one anchored entry per layer that differs, and use_rslora is
    false. A config that says the right ranks already is left alone.

    Raises:
        ConfigurationError: if a layer's config lies outside ``model``.
    """
    configs, groups = _configs(model), dict[tuple[int, str], dict[str, PeftLayer]]()
    for name, module in _lora_modules(model):
        if id(module) not in configs:
            raise ConfigurationError(f"the config of PEFT's layer {name!r} is not in the model; pass the whole model")
        own_name, config_of = configs[id(module)]
        for adapter in _adapters(module):
            groups.setdefault((id(config_of), adapter), {})[own_name] = PeftLayer(module, adapter)
    by_id = {id(config_of): config_of for _, config_of in configs.values()}
    for (key, adapter), layers in groups.items():
        config = by_id[key].get(adapter)
        if config is None or config.peft_type != "LORA":
            continue
        if all(_rank_by(config, name) == layer.module.r[adapter] for name, layer in layers.items()):
            continue
        by_id[key][adapter] = config = copy.copy(config)  # the user's own object, and other adapters made of it, stay
        for layer in layers.values():
            layer.record_alpha()
        for field, value in peft_ranks({name: (layer.rank, layer.alpha) for name, layer in layers.items()}).items():
            setattr(config, field, value)
        if config.init_lora_weights == "orthogonal":  # which PEFT would run on loading, and only for even ranks
            config.init_lora_weights = True


def follow_checkpoint_ranks(model: nn.Module) -> None:
    """Let ``model.load_state_dict`` give PEFT's LoRA layers the ranks of the state dict, and their configs likewise.

    Without it a checkpoint from after a change of rank, or one without the frozen base (AdapterCheckpoint), does not
    fit a freshly wrapped model. RankScheduler calls it in ``setup``; for ``load_from_checkpoint``, which knows no
    callbacks, call it at the end of the module's ``__init__``. The layers are looked up when a state dict comes, so
    they may be made later (``configure_model``). A second call does nothing.
    """
    if not getattr(model, "_follows_checkpoint_ranks", False):
        model._follows_checkpoint_ranks = True  # type: ignore[assignment]
        model.register_load_state_dict_pre_hook(take_peft_ranks)  # type: ignore[no-untyped-call]
        follow_base(model)


def take_peft_ranks(model: nn.Module, state_dict: Mapping[str, Any], prefix: str = "", *_: Any) -> None:
    """Give PEFT's LoRA layers the ranks of the factors in ``state_dict``; see :func:`follow_checkpoint_ranks`."""
    configs, changed = _configs(model), False
    for name, module in _lora_modules(model):
        for adapter in _adapters(module):
            layer = PeftLayer(module, adapter)
            factors, end = ("lora_embedding_A", "lora_embedding_B"), adapter
            if not layer.of_embedding:
                factors, end = ("lora_A", "lora_B"), f"{adapter}.weight"
            lora_A, lora_B = (state_dict.get(".".join(filter(None, (prefix + name, f, end)))) for f in factors)
            if lora_A is None or lora_A.shape == layer.lora_A.shape:
                continue
            fault = _fault(module, adapter, configs.get(id(module), ("", {}))[1].get(adapter))
            if fault:
                raise ConfigurationError(f"{prefix + name!r} cannot take the rank of the checkpoint: {fault}")
            take_rank(layer, prefix + name, lora_A, lora_B)
            changed = True
    if changed:
        sync_peft_configs(model)


def _fault(module: Any, adapter: str, config: Any) -> str | None:
    """Why the rank of this adapter cannot be changed, if it cannot."""
    if hasattr(module, "lora_E"):
        return "AdaLoRA masks ranks by itself; use a plain LoraConfig"
    if hasattr(module, "parameter_name"):
        return "target_parameters (ParamWrapper) holds the factors of all experts in one"
    if isinstance(module.get_base_layer(), nn.MultiheadAttention):
        return "PEFT merges the adapter of a MultiheadAttention in every forward"
    if adapter in module.lora_variant:
        variant = type(module.lora_variant[adapter]).__name__
        return f"the variant {variant} computes something else than plain LoRA; " + (
            "set use_dora=False" if variant.startswith("Dora") else "use a plain LoraConfig"
        )
    if module.lora_bias.get(adapter):
        return "lora_bias gives the update a bias; set lora_bias=False"
    if adapter in module.lora_A:
        if module.lora_A[adapter].weight.ndim > 2:
            return f"{type(module).__name__} has filters for factors; use dynrank.add_lora for convolutions"
        kinds = [type(factors[adapter]) for factors in (module.lora_A, module.lora_B)]
        if kinds != [nn.Linear, nn.Linear]:
            return f"its factors are {' and '.join(kind.__name__ for kind in kinds)}, no plain Linear"
    if config is not None and config.init_lora_weights not in _HARMLESS_INIT:
        return (
            f"init_lora_weights={config.init_lora_weights!r} has taken a part out of the base weight that depends on "
            "the rank; save the base model as it is now, and set init_lora_weights to True in the adapter's config"
        )
    if getattr(config, "target_modules_to_tie", None):
        return "ensure_weight_tying lets two layers share their factors; set it to False"
    return None


def _rank_by(config: Any, name: str) -> int:
    """The rank that ``config`` gives to a layer, by PEFT's rule."""
    return int(next((rank for key, rank in config.rank_pattern.items() if matches(key, name)), config.r))


def _configs(model: nn.Module) -> dict[int, tuple[str, dict[str, Any]]]:
    """{id of a LoRA module: (the name that PEFT knows it by, its configs by adapter)}.

    PEFT leaves its configs on the model that it was given, so names are relative to the nearest module that has them.
    """
    found: dict[int, tuple[str, dict[str, Any]]] = {}
    if _peft_class("tuners.lora", "LoraLayer"):
        for root in model.modules():
            configs = vars(root).get("peft_config")
            if isinstance(configs, dict):
                found |= {id(module): (name, configs) for name, module in _lora_modules(root)}
    return found


def _adapters(module: Any) -> list[str]:
    return [*module.lora_A, *module.lora_embedding_A]


def _lora_modules(model: nn.Module) -> Iterator[tuple[str, Any]]:
    return _peft_modules(model, "tuners.lora", "LoraLayer")


def _peft_modules(model: nn.Module, home: str, kind: str) -> Iterator[tuple[str, Any]]:
    cls = _peft_class(home, kind)
    if cls is not None:
        yield from ((name, module) for name, module in model.named_modules() if isinstance(module, cls))


def _peft_class(home: str, kind: str) -> Any:
    """A class of PEFT; None if PEFT was never imported, so that no model can hold one of its layers."""
    return getattr(sys.modules.get(f"peft.{home}"), kind, None)
