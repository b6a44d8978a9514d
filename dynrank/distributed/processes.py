"""Exchange of values and tensors between the processes of a training run, and their comparison.

Every function is collective: all processes of ``group`` must call it, in the same order. In a single process nothing is
sent. ``group`` None is torch's default group, all processes. Numbers of processes are those within the group.
"""

import io
import pickle
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from dynrank.digest import digest
from dynrank.errors import ConfigurationError
from dynrank.layers.finding import lora_layers

T = TypeVar("T")


def process_count(group: ProcessGroup | None = None) -> int:
    """How many processes train together."""
    return distributed.get_world_size(group) if distributed.is_available() and distributed.is_initialized() else 1


def process_index(group: ProcessGroup | None = None) -> int:
    """The number of this process, from 0."""
    return distributed.get_rank(group) if process_count(group) > 1 else 0


def _first(group: ProcessGroup | None) -> int:
    """The number among all processes of the first of ``group``."""
    return 0 if group is None else distributed.get_global_rank(group, 0)


def from_first(make: Callable[[], T], group: ProcessGroup | None = None, *, device: torch.device | None = None) -> T:
    """The result of ``make``, which runs only in process 0; an error there is raised in all processes.

    The result is pickled, but its tensors on ``device`` (this process's own) are sent as they are, so that no second
    copy of them is made; other tensors in it should be on the CPU. Every error, KeyboardInterrupt included, is sent to
    the other processes, so that none of them waits forever. Instead of an error that cannot be pickled, they raise a
    RuntimeError with its text.
    """
    if process_count(group) == 1:
        return make()
    result = failure = None
    outcome = [b""]
    tensors: list[Tensor] = []
    if process_index(group) == 0:
        try:
            result = make()
            outcome = [_pickled(result, device, tensors)]
        except BaseException as error:
            failure = error
            outcome = [_pickled_error(error)]
    distributed.broadcast_object_list(outcome, src=_first(group), group=group)
    if process_index(group) > 0:
        result, failure = _Unpickler(outcome[0], device, tensors).load()
    if failure is not None:
        raise failure
    copy_from_first(tensors, group)
    return result  # type: ignore[return-value]


def _pickled(result: object, device: torch.device | None, tensors: list[Tensor]) -> bytes:
    """``result`` without its tensors on ``device``, which are appended to ``tensors``."""
    content = io.BytesIO()
    _Pickler(content, device, tensors).dump((result, None))
    return content.getvalue()


class _Pickler(pickle.Pickler):
    def __init__(self, content: io.BytesIO, device: torch.device | None, tensors: list[Tensor]) -> None:
        super().__init__(content)
        self._device = device
        self._tensors = tensors

    def persistent_id(self, value: object) -> tuple[torch.Size, torch.dtype] | None:
        """What stands for a tensor that is sent by itself; None pickles the value."""
        if not isinstance(value, Tensor) or value.device != self._device:
            return None
        self._tensors.append(value.contiguous())
        return value.shape, value.dtype


class _Unpickler(pickle.Unpickler):
    def __init__(self, content: bytes, device: torch.device | None, tensors: list[Tensor]) -> None:
        super().__init__(io.BytesIO(content))
        self._device = device
        self._tensors = tensors

    def persistent_load(self, like: tuple[torch.Size, torch.dtype]) -> Tensor:
        """An empty tensor that gets its values afterwards."""
        shape, dtype = like
        self._tensors.append(torch.empty(shape, dtype=dtype, device=self._device))
        return self._tensors[-1]


def _pickled_error(error: BaseException) -> bytes:
    try:
        outcome = pickle.dumps((None, error))
        # Some errors can be pickled but not unpickled, so process 0 tries it.
        pickle.loads(outcome)
    except Exception:
        outcome = pickle.dumps((None, RuntimeError(f"{type(error).__name__} in process 0: {error}")))
    return outcome


def from_all(value: T, group: ProcessGroup | None = None) -> list[T]:
    """``value`` of every process, in the order of their numbers; values are pickled as in :func:`from_first`."""
    if process_count(group) == 1:
        return [value]
    values: list[Any] = [None] * process_count(group)
    distributed.all_gather_object(values, value, group=group)
    return values


def mean_over_processes(value: float, group: ProcessGroup | None = None) -> float:
    """The mean of every process's ``value``, exactly equal in all processes."""
    values = from_all(value, group)
    return sum(values) / len(values)


@torch.no_grad()
def copy_from_first(tensors: Iterable[Tensor], group: ProcessGroup | None = None) -> None:
    """Copy the values of ``tensors`` in process 0 to all processes; shapes must be equal."""
    if process_count(group) > 1:
        for tensor in tensors:
            distributed.broadcast(tensor, src=_first(group), group=group)


@torch.no_grad()
def average_over_processes(tensors: Iterable[Tensor], group: ProcessGroup | None = None) -> None:
    """Replace each of ``tensors`` by its mean over all processes, in one message for each device and dtype."""
    if process_count(group) == 1:
        return
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    for alike in kinds.values():
        message = torch.cat([tensor.flatten() for tensor in alike])
        distributed.all_reduce(message, group=group)
        means = torch.split(message.div_(process_count(group)), [tensor.numel() for tensor in alike])
        for tensor, mean in zip(alike, means, strict=True):
            tensor.copy_(mean.view_as(tensor))


def check_processes(
    model: nn.Module, optimizers: Iterable[Optimizer], when: str, group: ProcessGroup | None = None
) -> None:
    """Compare the digest of every adapter, and of its optimizer state, in all processes; a collective call.

    Other trained parameters that are whole in every process (a head) are compared, too; shards are not.
    """
    if process_count(group) == 1:
        return
    optimizers = list(optimizers)
    mine = {
        name: (digest(parameters), digest([sorted(o.state.get(p, {}).items()) for o in optimizers for p in parameters]))
        for name, parameters in _trained(model).items()
    }
    everywhere = from_all(mine, group)
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
            "Their gradients are not averaged, or they started with different values: use DDP, or shard only "
            "the frozen base (dynrank.distributed.sharding.shard_frozen); give all processes the same seed",
            "strategy",
        )


def _trained(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Trained parameters that every process holds whole: factors by layer, others by their own name."""
    layers = {name: [layer.lora_A, layer.lora_B] for name, layer in lora_layers(model)}
    of_layers = {id(parameter) for parameters in layers.values() for parameter in parameters}
    rest = {n: [p] for n, p in model.named_parameters() if p.requires_grad and id(p) not in of_layers}
    return {n: ps for n, ps in (layers | rest).items() if not any(isinstance(p, DTensor) for p in ps)}
