"""The wrappers of DDP, Lightning, Fabric and accelerate around models and optimizers.

DDP follows a change of its parameters' shapes, whichever library has wrapped the model.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from dynrank.private import is_fabrics


def unwrapped_model(model: nn.Module) -> nn.Module:
    """The model inside the wrappers of DDP and of Lightning Fabric; accelerate wraps only by DDP."""
    inside: Any = model
    while isinstance(inside, DistributedDataParallel) or is_fabrics(inside):
        inside = inside.module
    return inside  # type: ignore[no-any-return]


def unwrapped_optimizer(optimizer: Any) -> Optimizer:
    """The optimizer inside the wrapper of Lightning, Fabric or accelerate, if it has one."""
    raw: Optimizer = getattr(optimizer, "optimizer", optimizer)
    return raw


def stepping_optimizer(optimizer: Any) -> Any:
    """The optimizer that makes the steps, inside of all wrappers, also of DeepSpeed's, and of what stands for it."""
    inside = getattr(optimizer, "optimizer", getattr(optimizer, "stepping", None))
    return optimizer if inside is None else stepping_optimizer(inside)


def ddp_modules(model: nn.Module) -> list[DistributedDataParallel]:
    """The DDP modules in ``model``, which is wrapped as the training loop calls it."""
    return [module for module in model.modules() if isinstance(module, DistributedDataParallel)]


@contextmanager
def new_reducers(modules: Sequence[DistributedDataParallel]) -> Iterator[None]:
    """A block in which parameters may change their shapes: ``modules`` have no reducers in it, and new ones after it.

    The buckets of a reducer fit the shapes for which it was made. With others it averages wrongly, without a word.
    Training loops keep references to their DDP module, so it cannot be replaced by a new one.
    """
    averaged = [_averaged(module) for module in modules]
    for module in modules:
        del module.reducer, module.logger
    try:
        yield
    finally:
        for module, parameters in zip(modules, averaged, strict=True):
            with _trainable(parameters):
                _make_reducer(module)


def _averaged(module: DistributedDataParallel) -> list[Tensor]:
    """The parameters whose gradients the reducer of ``module`` averages; none beside sparse gradients.

    A bucket of a sparse gradient has no numbers, for which torch has an error here.
    """
    if any(isinstance(inside, nn.Embedding | nn.EmbeddingBag) and inside.sparse for inside in module.modules()):
        return []
    return [p for bucket in module.reducer._get_zeros_like_grad_buckets() for p in bucket.parameters()]


@contextmanager
def _trainable(parameters: Iterable[Tensor]) -> Iterator[None]:
    """A block in which ``parameters`` require gradients.

    A reducer is made for those that do at that moment; some may be frozen for a while, and are averaged again later.
    """
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def _make_reducer(module: DistributedDataParallel) -> None:
    """Make a reducer by the code for unpickling, and register the communication hooks again."""
    # Without its group a module would go to the default one.
    module.__setstate__({"process_group": module.process_group})  # type: ignore[no-untyped-call]
    # Unpickling does not reset this flag. A static graph would then not average the first backward's gradients.
    module._static_graph_delay_allreduce_enqueued = False
    for hook, of_hook in module._comm_hooks:
        # PowerSGD remembers errors and factors of the old shapes by the numbers of buckets.
        for memory in ("error_dict", "p_memory_dict", "q_memory_dict"):
            getattr(of_hook, memory, {}).clear()
        distributed._register_comm_hook(  # type: ignore[attr-defined]
            module.reducer, of_hook, hook
        )
