"""The gradients of each optimizer's last step, as the importance of layers needs them."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dynrank.change.closures import Closure, with_closure
from dynrank.change.optimizer_state import overwrites_gradients
from dynrank.errors import ConfigurationError
from dynrank.importance.importance import Importance
from dynrank.private import version_of


class StepGradients:
    """Watches the steps of an optimizer, until :meth:`remove`.

    Args:
        optimizer: the optimizer to hook.
        adapters: the factors of all LoRA layers.

    Attributes:
        made: how many steps the optimizer has made since :meth:`forget`.
        scale: what the gradients are still multiplied by after the step (a number on the device of GradScaler's scale);
            None: one. An optimizer with ``fused=True`` unscales gradients itself, except in a step that it leaves out
            because a gradient of any of its parameters, perhaps of a head, is not finite.
        gradients: {id of a factor: its gradient before the step}, if the optimizer may overwrite gradients.
    """

    def __init__(self, optimizer: Optimizer, adapters: Collection[nn.Parameter]) -> None:
        self._optimizer = optimizer
        self._adapters = {id(parameter) for parameter in adapters}
        self._handles = [optimizer.register_step_post_hook(self._after)]
        if overwrites_gradients(optimizer):
            self._handles.append(optimizer.register_step_pre_hook(self._before))
        self.forget()

    def forget(self) -> None:
        """Forget the last step."""
        self.made = 0
        self.gradients: dict[int, Tensor] = {}
        self.scale: Tensor | None = None
        # A factor that had a gradient in the step, and the version of this gradient.
        self._witness: tuple[nn.Parameter, int] | None = None

    def remove(self) -> None:
        """Watch no longer."""
        for handle in self._handles:
            handle.remove()

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The optimizer's parameters."""
        return [parameter for group in self._optimizer.param_groups for parameter in group["params"]]

    @property
    def trains_adapters(self) -> bool:
        """Whether the optimizer has factors of LoRA layers."""
        return any(id(parameter) in self._adapters for parameter in self.parameters)

    @property
    def has_lost_gradients(self) -> bool:
        """Whether the factors had gradients in the step, and have none any more, or only zeros."""
        if self._witness is None:
            return False
        factor, version = self._witness
        if factor.grad is not None and version_of(factor.grad) == version:
            return False
        # Only here, because a look at the values waits for the GPU.
        return all(p.grad is None or not p.grad.any() for p in self.parameters if id(p) in self._adapters)

    def _before(self, _: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._keep_gradients()

        def watched(closure: Closure) -> Closure:
            def run() -> Any:
                result = closure()
                self._keep_gradients()
                return result

            return run

        return with_closure(args, kwargs, watched)

    def _keep_gradients(self) -> None:
        own = [parameter for parameter in self.parameters if id(parameter) in self._adapters]
        self.gradients = {id(p): p.grad.detach().clone() for p in own if p.grad is not None}

    @property
    def _moves_nothing(self) -> bool:
        """Whether the step's rates and gradients are zero: so torch makes the state of an optimizer before it saves it.

        torch.distributed.checkpoint makes such a step in each save of an optimizer that has no state, as SGD.
        """
        for group in self._optimizer.param_groups:
            rate = group.get("lr")
            # That of torch is no tensor of a GPU, whose value would have to be waited for.
            if (isinstance(rate, Tensor) and rate.device.type != "cpu") or rate != 0:
                return False
        return not any(p.grad is not None and p.grad.any() for p in self.parameters)

    def _after(self, *_: Any) -> None:
        if self._moves_nothing:
            return
        self.made += 1
        if self.made > 1 and self.trains_adapters:
            # A loop that calls end_step before it counts the step is one step behind.
            raise ConfigurationError(
                "the importance of layers is measured by each step, and end_step was not called for the last one: call "
                "driver.end_step(training) after each step, when training.step is raised and before zero_grad (under "
                "Lightning's manual optimization scheduler.step(self)). A search for a rate or a batch size, which "
                "makes steps of its own, belongs before the training"
            )
        # GradScaler lends both to the optimizer for the step; without a scale the gradients were unscaled before it.
        scale = getattr(self._optimizer, "grad_scale", None)
        found_inf = getattr(self._optimizer, "found_inf", None)
        self.scale = None
        if scale is not None and found_inf is not None:
            # Those that were kept are of before the step.
            self.scale = scale if self.gradients else torch.where(found_inf > 0, scale, 1.0)
        found = (p for p in self.parameters if id(p) in self._adapters and p.grad is not None)
        factor = next(found, None)
        if factor is not None and factor.grad is not None:
            self._witness = factor, version_of(factor.grad)


class StepsOfAll:
    """Passes the steps of the optimizers to the importance of layers, until :meth:`remove`."""

    def __init__(
        self, importance: Importance, optimizers: Iterable[Optimizer], adapters: Collection[nn.Parameter]
    ) -> None:
        self._importance = importance
        self._steps = [StepGradients(optimizer, adapters) for optimizer in optimizers]

    def end_step(self) -> None:
        """Measure by the step just made; its gradients must still exist."""
        made = [step for step in self._steps if step.made]
        if any(step.has_lost_gradients for step in made):
            raise ConfigurationError(
                "the importance of layers is measured by the gradients of each step, and zero_grad has deleted them "
                "before end_step: call end_step (under Lightning RankScheduler.step) before zero_grad"
            )
        # A single optimizer has made the step, so every gradient is of this step (None). Of several, perhaps not all
        # have: the gradients of the others may be old.
        ids = None if len(self._steps) == 1 else {id(p) for step in made for p in step.parameters}
        scales = {id(p): step.scale for step in made if step.scale is not None for p in step.parameters}
        kept = {key: gradient for step in made for key, gradient in step.gradients.items()}
        self._importance.end_step(ids, scales, kept)
        for step in made:
            step.forget()

    def remove(self) -> None:
        """Watch no longer."""
        for step in self._steps:
            step.remove()
