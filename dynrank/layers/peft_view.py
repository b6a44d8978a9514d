"""One adapter of one of PEFT's LoRA layers, seen as a layer whose rank can change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch.nn.functional as F
from torch import Tensor, nn

from dynrank.kernels.lora_linear import Tap
from dynrank.layers.ranked import put_factors
from dynrank.linalg import products

V = TypeVar("V")


class _Note(Generic[V]):
    """An attribute of :class:`PeftLayer` that is kept on PEFT's module, by adapter."""

    def __init__(self, default: V) -> None:
        self.default = default

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, layer: PeftLayer, owner: type) -> V:
        notes: dict[tuple[str, str], V] = vars(layer.module).get("dynrank_notes", {})
        return notes.get((layer.adapter, self.name), self.default)

    def __set__(self, layer: PeftLayer, value: V) -> None:
        vars(layer.module).setdefault("dynrank_notes", {})[layer.adapter, self.name] = value


class PeftLayer:
    """One adapter of a PEFT LoRA layer as a :class:`dynrank.layers.ranked.RankedLayer`.

    A view: all that it knows is stored on the module, so that two views of one adapter are the same layer.

    Args:
        module: the peft.tuners.lora.LoraLayer.
        adapter: name of one of its adapters.
    """

    final_rank = _Note[int | None](None)
    highest = _Note[int | None](None)
    pinned = _Note(False)
    _observed = _Note(False)

    def __init__(self, module: Any, adapter: str) -> None:
        self.module, self.adapter = module, adapter

    @property
    def lora_A(self) -> nn.Parameter:
        """(rank, d_in); of a convolution (rank, channels, kernel...)."""
        return self._factor("A")

    @property
    def lora_B(self) -> nn.Parameter:
        """(d_out, rank); of a convolution (d_out, rank, 1...)."""
        return self._factor("B")

    def _factor(self, which: str) -> nn.Parameter:
        if self.of_embedding:
            factor: nn.Parameter = getattr(self.module, f"lora_embedding_{which}")[self.adapter]
        else:
            factor = getattr(self.module, f"lora_{which}")[self.adapter].weight
        return factor

    @property
    def of_embedding(self) -> bool:
        """Whether the factors are bare Parameters, as PEFT has them for an embedding."""
        return self.adapter in self.module.lora_embedding_A

    @property
    def of_parameter(self) -> bool:
        """Whether PEFT adapts a bare parameter (target_parameters), by folding the update into it in every forward."""
        return hasattr(self.module, "parameter_name")

    @property
    def parameter(self) -> nn.Parameter:
        """The bare parameter that PEFT adapts."""
        parameter: nn.Parameter = getattr(self.base, self.module.parameter_name)
        return parameter

    @property
    def experts(self) -> int:
        return self.module.num_experts if self.of_parameter else 1

    @property
    def rank(self) -> int:
        return self.lora_A.shape[0] // self.experts

    def products(self) -> list[tuple[Tensor, Tensor]]:
        """As :meth:`dynrank.layers.base.LoRALayer.products`."""
        return products(self.lora_B, self.lora_A, self.experts)

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

    def set_factors(self, lora_A: Tensor, lora_B: Tensor) -> None:
        """As :meth:`dynrank.layers.base.LoRALayer.set_factors`; the module's own record of the rank follows.

        PEFT's config does in :func:`dynrank.layers.peft_layers.config_changes`, once for all layers.
        """
        of_A, of_B = self.lora_A.shape[1:], self.lora_B.shape[2:]
        put_factors(self, lora_A.reshape(-1, *of_A), lora_B.reshape(len(lora_B), -1, *of_B))
        if not self.of_embedding:
            kind, rows = "channels" if of_B else "features", len(self.lora_A)
            setattr(self.module.lora_A[self.adapter], f"out_{kind}", rows)
            setattr(self.module.lora_B[self.adapter], f"in_{kind}", rows)
        self.module.r[self.adapter] = self.rank
        self.record_alpha()

    def record_alpha(self) -> None:
        """Make alpha / rank the rule by which PEFT comes to the scaling that the layer has."""
        self.module.lora_alpha[self.adapter], self.module.use_rslora[self.adapter] = self.alpha, False

    @property
    def observe(self) -> Callable[[Tap], Callable[[], None]] | None:
        """:meth:`watch`; None where PEFT folds the update into a parameter, since nobody computes z then."""
        return None if self.of_parameter else self.watch

    def watch(self, tap: Tap) -> Callable[[], None]:
        """As :meth:`dynrank.layers.base.LoRALayer.observe`.

        A layer that a forward pass runs twice reports twice. Between forward and backward z is held, under gradient
        checkpointing too.
        """
        if self._observed:
            raise RuntimeError("the layer is being observed already")
        self._observed = on = True

        def report(z: Tensor, dz: Tensor) -> None:
            if on:
                tap(z, dz)

        handle = (self._watch_embedding if self.of_embedding else self._watch_linear)(report)

        def stop() -> None:
            nonlocal on
            self._observed = on = False
            handle.remove()

        return stop

    def _watch_linear(self, report: Tap) -> Any:
        def watch(_: nn.Module, __: Any, z: Tensor) -> None:
            if z.requires_grad:
                # A convolution has its channels in dimension 1.
                last = 1 if self.lora_B.ndim > 2 else -1
                values = z.detach().movedim(last, -1)
                z.register_hook(lambda dz: report(values, dz.movedim(last, -1)))  # type: ignore[no-untyped-call]

        return self.module.lora_A[self.adapter].register_forward_hook(watch)

    def _watch_embedding(self, report: Tap) -> Any:
        # No module has z for its output here, so both come from the layer's own input and output.
        def watch(module: Any, inputs: tuple[Tensor, ...], y: Tensor) -> None:
            if y.requires_grad and not module.merged and not module.disable_adapters:
                values = F.embedding(inputs[0], self.lora_A.detach().mT)
                # Gemma 3 scales its embedding.
                scaling = self.scaling * getattr(self.base, "embed_scale", 1.0)

                def report_at_z(g: Tensor) -> None:
                    report(values, scaling * (g.to(values.dtype) @ self.lora_B.detach()))

                y.register_hook(report_at_z)  # type: ignore[no-untyped-call]

        return self.module.register_forward_hook(watch)
