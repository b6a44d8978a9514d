"""FSDP2 with LoRA: the frozen base is sharded, and trained parameters stay whole, so that their rank can change."""

import inspect
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from dynrank.distributed.processes import average_over_processes, copy_from_first, from_first
from dynrank.errors import ConfigurationError
from dynrank.layers.base import LoRALayer, max_rank, take_rank
from dynrank.layers.compiled import named_modules, plain_name
from dynrank.layers.finding import lora_layers
from dynrank.layers.peft_layers import take_peft_ranks


def shard_frozen(
    model: nn.Module, mesh: DeviceMesh, *, blocks: Iterable[nn.Module] | None = None, **options: Any
) -> None:
    """Shard the frozen parameters of ``model`` by FSDP2; call this in ``configure_model``, after LoRA is added.

    Adapters (and heads that are trained without LoRA) stay plain tensors with the same values in all processes. This
    function gives them the values of process 0. :class:`dynrank.callbacks.RankScheduler`, which the trainer must have,
    averages their gradients before each optimizer step. A second call does nothing.

    ::

        def configure_model(self):
            if self.device_mesh is not None:  # not so in load_from_checkpoint
                shard_frozen(self.model, self.device_mesh["data_parallel"])

    Args:
        model: a model with LoRA layers.
        mesh: mesh of one dimension, over which to shard: ``device_mesh["data_parallel"]`` of ModelParallelStrategy.
        blocks: modules of ``model`` that are gathered one at a time; none may be a part of a LoRA layer. None: the
            transformer blocks, which are the members of every outermost ModuleList.
        **options: options of ``torch.distributed.fsdp.fully_shard`` (mp_policy, reshard_after_forward, offload_policy).
    """
    if isinstance(model, FSDPModule):
        return
    layers = dict(lora_layers(model))
    # The order of the parameters is the same in all processes.
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not layers or all(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigurationError("shard_frozen needs a frozen model with LoRA layers; call dynrank.add_lora first")
    if any(parameter.is_meta for parameter in trained):
        raise ConfigurationError("adapters on the meta device have no values; load the model before shard_frozen")
    if "ignored_params" not in inspect.signature(fully_shard).parameters:
        raise ConfigurationError(f"FSDP2 with LoRA needs torch >= 2.7, got {torch.__version__}")
    blocks = list(blocks if blocks is not None else _transformer_blocks(model))
    inside = {id(part) for layer in layers.values() for part in layer.module.modules() if part is not layer.module}
    for block in blocks:
        if id(block) in inside:
            raise ConfigurationError(
                f"blocks must be whole layers of the model, got {type(block).__name__}, a part of a LoRA layer"
            )
    copy_from_first(parameter.data for parameter in trained)
    for module in [*blocks, model]:
        fully_shard(module, mesh=mesh, ignored_params=set(trained), **options)


def _transformer_blocks(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        yield from child if isinstance(child, nn.ModuleList) else _transformer_blocks(child)


def sharded_layers(model: nn.Module) -> list[str]:
    """Names of the LoRA layers with sharded factors, whose rank cannot change."""
    layers = lora_layers(model)
    return [name for name, layer in layers if isinstance(layer.lora_A, DTensor) or isinstance(layer.lora_B, DTensor)]


def sharded_error(names: list[str]) -> ConfigurationError:
    return ConfigurationError(
        f"the factors of {names[0]!r} ({len(names)} layers in all) are sharded by FSDP2, so their rank cannot change; "
        "keep them out of sharding: dynrank.distributed.sharding.shard_frozen(model, mesh) in configure_model, or "
        "fully_shard(..., ignored_params=...)"
    )


def trains_shards(optimizer: Optimizer) -> bool:
    """Whether any parameter of ``optimizer`` is sharded."""
    return any(isinstance(parameter, DTensor) for group in optimizer.param_groups for parameter in group["params"])


@torch.no_grad()
def average_gradients(optimizer: Optimizer) -> None:
    """Average the gradients of all parameters of ``optimizer`` that are not sharded over all processes; collective.

    A parameter without a gradient in any process keeps none; a gradient that only some processes lack counts as zero.
    """
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    whole = [p for p in trained if p.requires_grad and not isinstance(p, DTensor)]
    users = [p.new_tensor(p.grad is not None) for p in whole]
    means = [p.grad if p.grad is not None else torch.zeros_like(p) for p in whole]
    average_over_processes([*users, *means])
    for parameter, used, mean in zip(whole, users, means, strict=True):
        if parameter.grad is None and used:
            parameter.grad = mean


def take_saved_ranks(model: nn.Module, path: str | Path) -> None:
    """Give the LoRA layers of ``model`` the ranks of a checkpoint, before it is loaded; a collective call.

    FSDP2 loads into existing tensors, without a ``load_state_dict`` with whole factors. From a single file it does not
    load the layers' scalings either, so this function loads them. ``path`` is such a file, or a folder of shards
    (``save_distributed_checkpoint=True``).
    """
    shapes, scalings = from_first(lambda: _saved_shapes(Path(path)))
    saved = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    factors = {plain_name(name): value for name, value in saved.items()}
    scalings = {plain_name(name): value for name, value in scalings.items()}
    ranks = {name: layer.rank for name, layer in lora_layers(model)}
    changing = [
        name
        for name in sharded_layers(model)
        if any(key.startswith(f"{name}.lora_A") and len(value) != ranks[name] for key, value in factors.items())
    ]
    if changing:
        raise sharded_error(changing)
    own = {name: module for name, module in named_modules(model) if isinstance(module, LoRALayer)}
    for name, layer in own.items():
        pair = (factors.get(f"{name}.{factor}") for factor in ("lora_A", "lora_B"))
        take_rank(layer, name, *pair, most=max_rank(layer))
        layer.scaling = scalings.get(f"{name}._extra_state", layer.scaling)
    take_peft_ranks(model, saved)


def _saved_shapes(path: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, float]]:
    """({name: shape of its tensor}, {name: scaling}, which is empty unless the checkpoint is a single file)."""
    if path.is_dir():
        # This import is slow, and few runs need it.
        from torch.distributed.checkpoint import filesystem

        entries = filesystem.FileSystemReader(path).read_metadata().state_dict_metadata
        sizes = {name: getattr(entry, "size", None) for name, entry in entries.items()}
        start = "state_dict."
        return {name.removeprefix(start): tuple(s) for name, s in sizes.items() if s and name.startswith(start)}, {}
    stored = torch.load(path, map_location="cpu", mmap=True, weights_only=True)["state_dict"]
    tensors = {name: value for name, value in stored.items() if isinstance(value, Tensor)}
    scalings = {
        name: float(value) for name, value in tensors.items() if name.endswith("._extra_state") and value.numel() == 1
    }
    return {name: tuple(value.shape) for name, value in tensors.items()}, scalings
