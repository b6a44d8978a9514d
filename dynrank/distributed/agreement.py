"""A check that all processes hold the same adapters and the same optimizer state for them."""

from collections.abc import Iterable

from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from dynrank.digest import digest
from dynrank.distributed.processes import from_all, process_count
from dynrank.errors import ConfigurationError
from dynrank.layers.finding import lora_layers


def check_processes(model: nn.Module, optimizers: Iterable[Optimizer], when: str) -> None:
    """Compare the digest of every adapter, and of its optimizer state, in all processes; a collective call.

    Other trained parameters that are whole in every process (a head) are compared, too; shards are not.
    """
    if process_count() == 1:
        return
    optimizers = list(optimizers)
    mine = {
        name: (digest(parameters), digest([sorted(o.state.get(p, {}).items()) for o in optimizers for p in parameters]))
        for name, parameters in _trained(model).items()
    }
    everywhere = from_all(mine)
    faults = []
    for name in dict.fromkeys(name for digests in everywhere for name in digests):
        weights, states = zip(*(digests.get(name, ("", "")) for digests in everywhere), strict=True)
        kind, found = ("optimizer state", states) if len(set(weights)) == 1 else ("weights", weights)
        others = [process for process, value in enumerate(found) if value != found[0]]
        if others:
            faults.append(f"{name!r} ({kind}: processes {others} differ from process 0)")
    if faults:
        more = f"\n  and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise ConfigurationError(
            f"{when}, the processes do not hold the same adapters:\n  " + "\n  ".join(faults[:5]) + more + "\n"
            "Their gradients are not averaged, or they started with different values: set trainer.strategy=ddp, or "
            "shard only the frozen base (dynrank.distributed.sharding.shard_frozen); give all processes the same seed"
        )


def _trained(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Trained parameters that every process holds whole: factors by layer, others by their own name."""
    layers = {name: [layer.lora_A, layer.lora_B] for name, layer in lora_layers(model)}
    of_layers = {id(parameter) for parameters in layers.values() for parameter in parameters}
    rest = {n: [p] for n, p in model.named_parameters() if p.requires_grad and id(p) not in of_layers}
    return {n: ps for n, ps in (layers | rest).items() if not any(isinstance(p, DTensor) for p in ps)}
