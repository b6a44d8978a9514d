"""FSDP2 with LoRA: the frozen base is sharded, and trained parameters stay whole, so that their rank can change."""

import re
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, distributed, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from dynrank.distributed.accelerated import fsdp_settings
from dynrank.distributed.processes import average_over_processes, copy_from_first, from_all, from_first, process_count
from dynrank.distributed.zero import has_flat_copy
from dynrank.errors import ConfigurationError
from dynrank.layers.compiled import named_modules, plain_name
from dynrank.layers.finding import lora_layers
from dynrank.layers.lora_layer import LoRALayer
from dynrank.layers.peft_layers import peft_layers, take_peft_ranks
from dynrank.layers.ranked_layer import take_rank
from dynrank.layers.vocabulary import extended_parameters
from dynrank.private import at_end_of_backward, backward_number

M = TypeVar("M", bound=nn.Module)

# The group of each model that shard_frozen has sharded; after a validation its parameters may be whole for a while, and
# do not tell it.
_GROUPS: WeakKeyDictionary[nn.Module, ProcessGroup | None] = WeakKeyDictionary()


def shard_frozen(
    model: M, mesh: DeviceMesh | None = None, *, blocks: Iterable[nn.Module] | None = None, **options: Any
) -> M:
    """Shard the frozen parameters of ``model`` by FSDP2, in place; call this after LoRA is added.

    Adapters (and heads that are trained without LoRA, and embeddings that tokens were added to) stay plain tensors with
    the same values in all processes, on the devices of ``mesh``. This function gives them the values of process 0, and
    the gradients of what trains are averaged over all processes at the end of each backward pass, whichever loop calls
    it. With an ``mp_policy`` they are computed with in its ``param_dtype``, by autocast. Parameters that are no floats,
    such as 4-bit weights in bytes, stay whole, too. A second call does nothing.

    The base may be on the meta device in all processes but the first: they get it from process 0, one block at a time,
    and keep their shards alone.

    ::

        def configure_model(self):  # Lightning
            # load_from_checkpoint has no mesh.
            if self.device_mesh is not None:
                shard_frozen(self.model, self.device_mesh["data_parallel"])


        strategy = ModelParallelStrategy(lambda model, mesh: shard_frozen(model, mesh["data_parallel"]))  # Fabric


        # Set to FSDP2.
        accelerator = Accelerator()
        model, optimizer = accelerator.prepare(shard_frozen(model), optimizer)

    Args:
        model: a model with LoRA layers.
        mesh: mesh over which to shard: ``device_mesh["data_parallel"]`` of ModelParallelStrategy. One of fewer than all
            processes has one dimension; other processes may train another model meanwhile. None: all processes; if
            accelerate is set to FSDP2, its mesh and all of its settings but the state dicts and wrapping by size.
        blocks: modules of ``model`` that are gathered one at a time; none may be a part of a LoRA layer. None: the
            transformer blocks, which are the members of every outermost ModuleList.
        **options: options of ``torch.distributed.fsdp.fully_shard`` (mp_policy, reshard_after_forward, offload_policy,
            ignored_params).

    Returns:
        ``model`` itself.

    Raises:
        ConfigurationError: if the model has no LoRA layers or nothing frozen, the mesh has several dimensions and not
            all processes, or accelerate is set to something that shards adapters.
    """
    if isinstance(model, FSDPModule):
        return model
    settings = fsdp_settings(model) if mesh is None else {}
    mesh = mesh or settings.pop("mesh", None) or _all_processes()
    group = _group_of_mesh(mesh)
    blocks = blocks if blocks is not None else settings.pop("blocks", None)
    options = settings | options
    layers = dict(lora_layers(model))
    # The order of the parameters is the same in all processes.
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not layers or all(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigurationError("shard_frozen needs a frozen model with LoRA layers; call dynrank.add_lora first")
    # Whether process 0, which is asked first, lacks an adapter, and which processes lack a part of the base.
    lacks_adapter, *_ = from_all(any(parameter.is_meta for parameter in trained), group)
    first_lacks, *others_lack = from_all(any(parameter.is_meta for parameter in model.parameters()), group)
    if lacks_adapter:
        raise ConfigurationError("adapters on the meta device have no values; load the model before shard_frozen")
    blocks = list(blocks if blocks is not None else _transformer_blocks(model))
    device = torch.device(mesh.device_type)
    whole = {*trained, *options.pop("ignored_params", ())}
    whole |= {parameter for parameter in model.parameters() if not parameter.is_floating_point()}
    # Process 0 saves them with the adapter alone, and each process may have drawn their rows by itself.
    embeddings = _with_added_tokens(model, group)
    whole |= {*embeddings}
    filled = _fill_from_first([*trained, *embeddings], device, group)
    parts: list[nn.Module] = [*blocks, model]
    for module in parts:
        if any(others_lack) and not first_lacks:
            tensors = [t for t in (*module.parameters(), *module.buffers()) if not isinstance(t, DTensor)]
            filled |= _fill_from_first((tensor for tensor in tensors if id(tensor) not in filled), device, group)
        fully_shard(module, mesh=mesh, ignored_params=whole, **options)
    dtype = getattr(options.get("mp_policy"), "param_dtype", None)
    if dtype in (torch.bfloat16, torch.float16):
        # FSDP2 casts its shards alone to this dtype, and a head that is whole has to meet it, too.
        model.forward = torch.autocast(device.type, dtype)(model.forward)
    _average_in_backward(trained, group)
    _GROUPS[model] = group
    return model


def _all_processes() -> DeviceMesh:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return init_device_mesh("cpu" if accelerator is None else accelerator.type, (process_count(),))


def _group_of_mesh(mesh: DeviceMesh) -> ProcessGroup | None:
    """The processes of ``mesh``; None: all."""
    if mesh.size() == process_count():
        return None
    if mesh.ndim > 1:
        raise ConfigurationError(
            f"a mesh of {mesh.size()} of {process_count()} processes must have one dimension, got {mesh}; shard over "
            "one, or over all processes",
            "mesh",
        )
    return mesh.get_group()


@torch.no_grad()
def _fill_from_first(tensors: Iterable[Tensor], device: torch.device, group: ProcessGroup | None) -> set[int]:
    """Move ``tensors`` to ``device``, with the values of process 0, as the same objects; their ids."""
    filled = set()
    for tensor in tensors:
        value = torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.data.to(device)
        copy_from_first([value], group)
        if tensor.is_meta:
            is_parameter = isinstance(tensor, nn.Parameter)
            # The exchange may still hold the value itself, which then could not be swapped.
            new = nn.Parameter(value, tensor.requires_grad) if is_parameter else value.detach()
            torch.utils.swap_tensors(tensor, new)  # type: ignore[no-untyped-call]
        else:
            tensor.data = value
        filled.add(id(tensor))
    return filled


def _with_added_tokens(model: nn.Module, group: ProcessGroup | None) -> list[nn.Parameter]:
    """The frozen parameters of embeddings that tokens were added to, as process 0 knows them."""

    def names() -> set[str]:
        extended = {*map(id, extended_parameters(model))}
        return {name for name, parameter in model.named_parameters() if id(parameter) in extended}

    # The files of the base may be on the machine of process 0 alone.
    known = from_first(names, group)
    return [p for name, p in model.named_parameters() if name in known and not p.requires_grad]


def _transformer_blocks(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        yield from child if isinstance(child, nn.ModuleList) else _transformer_blocks(child)


def _average_in_backward(parameters: Collection[nn.Parameter], group: ProcessGroup | None) -> None:
    """Average the gradients of ``parameters`` over all processes, in one message at the end of each backward pass.

    So clipping, loss scalers and optimizers see them averaged. Under accumulation each pass averages what has been
    accumulated so far: a mean stays as it is when it is averaged again.
    """
    # The backward pass whose end is waited for. One that has failed has no end.
    waiting = [-1]

    def ask(_: Tensor) -> None:
        if waiting[0] != backward_number():
            waiting[0] = backward_number()
            at_end_of_backward(lambda: _average_gradients(parameters, group))

    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(ask)  # type: ignore[no-untyped-call]


@torch.no_grad()
def _average_gradients(parameters: Collection[nn.Parameter], group: ProcessGroup | None) -> None:
    """Replace the gradients of ``parameters`` by their means over all processes; collective.

    A parameter without a gradient in any process keeps none; a gradient that only some processes lack counts as zero.
    """
    used = torch.tensor([float(p.grad is not None) for p in parameters], device=next(iter(parameters)).device)
    means = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    average_over_processes([used, *means], group)
    if any(parameter.grad is None for parameter in parameters):
        for parameter, mean, is_used in zip(parameters, means, used.tolist(), strict=True):
            if is_used:
                parameter.grad = mean


def process_group(model: nn.Module, ddp: Iterable[DistributedDataParallel]) -> ProcessGroup | None:
    """The processes that train ``model``, by its DDP modules or the mesh of :func:`shard_frozen`; None: all."""
    groups: list[ProcessGroup | None] = [module.process_group for module in ddp]
    groups += [_GROUPS[module] for module in model.modules() if module in _GROUPS]
    by_members = {tuple(distributed.get_process_group_ranks(group)): group for group in groups}
    if len(by_members) > 1:
        raise ConfigurationError(
            "all layers of a model change ranks together, and here different processes train its parts: "
            f"{[*by_members]}; give all of its DDP modules one process_group"
        )
    return next(iter(by_members.values()), None)


def plain_class(model: nn.Module) -> type[nn.Module]:
    """The class of ``model``; if FSDP2 shards it, the one from which FSDP2 has derived the present one."""
    classes: Any = type(model).__mro__
    return next(cls for cls in classes if not issubclass(cls, FSDPModule))  # type: ignore[no-any-return]


def sharded_layers(model: nn.Module) -> list[str]:
    """Names of the LoRA layers with sharded factors, whose rank cannot change."""
    layers = lora_layers(model)
    return [name for name, layer in layers if isinstance(layer.lora_A, DTensor) or isinstance(layer.lora_B, DTensor)]


def sharded_error(names: list[str]) -> ConfigurationError:
    return ConfigurationError(
        f"the factors of {names[0]!r} ({len(names)} layers in all) are sharded by FSDP2, so their rank cannot change; "
        "keep them out of sharding by dynrank.distributed.sharding.shard_frozen: shard_frozen(model, mesh) in "
        "configure_model of Lightning and in parallelize_fn of Fabric, shard_frozen(model) before accelerator.prepare. "
        "RankTrainerCallback does it, if transformers' Trainer gets it in its constructor, or later by attach(trainer)"
    )


def check_whole(model: nn.Module) -> None:
    """Refuse factors that FSDP has sharded, or of which DeepSpeed trains copies."""
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise ConfigurationError("FSDP1 flattens parameters, so ranks cannot change; use FSDP2 (fsdp_version: 2)")
    names = sharded_layers(model)
    if names:
        raise sharded_error(names)
    for name, layer in lora_layers(model):
        if has_flat_copy(layer.lora_A):
            raise ConfigurationError(
                f"DeepSpeed trains a flat copy of {name!r}, so its rank changes in transformers' Trainer alone; "
                "elsewhere use DDP, or FSDP2 (dynrank.distributed.sharding.shard_frozen), which "
                "shards the base and leaves adapters whole"
            )


def trains_shards(optimizer: Optimizer) -> bool:
    """Whether any parameter of ``optimizer`` is sharded."""
    return any(isinstance(parameter, DTensor) for group in optimizer.param_groups for parameter in group["params"])


def take_saved_ranks(model: nn.Module, path: str | Path, *, prefix: str = "state_dict.") -> None:
    """Give the LoRA layers of ``model`` the ranks of a checkpoint, before it is loaded; a collective call.

    FSDP2 loads into existing tensors, without a ``load_state_dict`` with whole factors. From a single file it does not
    load the layers' scalings either, so this function loads them. ``path`` is such a file, or a folder of shards
    (``save_distributed_checkpoint=True``), where ``prefix`` stands before the names of parameters.
    """
    shapes, scalings = from_first(lambda: saved_shapes(Path(path), prefix), process_group(model, ()))
    saved = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    for adapter in {layer.adapter for layer in peft_layers(model).values()}:
        # PEFT leaves the adapter's name out of what accelerate saves.
        saved = {
            re.sub(r"(\.lora_(?:embedding_)?[AB])(?=$|\.weight$)", rf"\1.{adapter}", n): v for n, v in saved.items()
        }
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
        take_rank(layer, name, *pair, most=layer.max_rank)
        layer.scaling = scalings.get(f"{name}._extra_state", layer.scaling)
    take_peft_ranks(model, saved)


def saved_shapes(path: Path, prefix: str) -> tuple[dict[str, tuple[int, ...]], dict[str, float]]:
    """({name: shape of its tensor}, {name: scaling}, which is empty unless the checkpoint is a single file).

    In a folder of shards ``prefix`` stands before the names.
    """
    if path.is_dir():
        # This import is slow, and few runs need it.
        from torch.distributed.checkpoint import filesystem

        entries = filesystem.FileSystemReader(path).read_metadata().state_dict_metadata
        sizes = {name: getattr(entry, "size", None) for name, entry in entries.items()}
        return {name.removeprefix(prefix): tuple(s) for name, s in sizes.items() if s and name.startswith(prefix)}, {}
    stored = torch.load(path, map_location="cpu", mmap=True, weights_only=True)["state_dict"]
    tensors = {name: value for name, value in stored.items() if isinstance(value, Tensor)}
    scalings = {
        name: float(value) for name, value in tensors.items() if name.endswith("._extra_state") and value.numel() == 1
    }
    return {name: tuple(value.shape) for name, value in tensors.items()}, scalings
