"""Inspecting and compressing a stored adapter by its factors alone; neither a model nor PEFT is needed."""

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from math import floor
from pathlib import Path
from statistics import mean

import torch
from rich.table import Table

from dynrank.adapters.folder import adapter_folder
from dynrank.adapters.precision import FLOAT8, FileDtype, Rounding, check_file_dtype
from dynrank.adapters.read import Adapter, open_stored
from dynrank.adapters.sidecar_files import new_adapter_folder
from dynrank.adapters.single_file import SUFFIX, SingleFile, rewrite_file
from dynrank.adapters.stored import Factors, StoredAdapter, StoredLayer
from dynrank.adapters.write import rewrite_adapter
from dynrank.change.reports import LayerReport, report_of
from dynrank.errors import ConfigurationError
from dynrank.linalg import effective_rank, energy_rank, products, stacked, truncate_product
from dynrank.output.console import empty_table, span, table_text
from dynrank.output.output_folder import new_file
from dynrank.output.ranks import change_table, layer_kinds
from dynrank.targets import Budget, Energy, LayerState, Rank, Target


@dataclass(frozen=True)
class LayerSpectrum(StoredLayer):
    """A layer of a stored adapter and the singular values of its update.

    Attributes:
        layer: name of the layer in the model.
        singular_values: singular values of the update (scaling included), descending, one for each direction.
    """

    layer: str
    singular_values: tuple[float, ...] = field(repr=False)

    def energy_rank(self, share: float) -> int:
        """How many directions keep ``share`` of the energy (sum of squared singular values); 0 for a zero update."""
        return energy_rank(torch.tensor(self.singular_values), share) if any(self.singular_values) else 0

    @property
    def effective_rank(self) -> float:
        """Effective rank of the singular values (Roy and Vetterli, 2007); 0 for a zero update."""
        return effective_rank(torch.tensor(self.singular_values)) if any(self.singular_values) else 0.0


class Spectra(list[LayerSpectrum]):
    """The layers of a stored adapter; shown in an interactive session, they are a table with a line for each kind."""

    def table(self) -> Table:
        """A table of rich; for ``rich.print``."""
        headings = ("count", "rank", "alpha", "sigma max", "90% energy (mean)", "effective rank (mean)", "parameters")
        table = empty_table("LoRA layers of the adapter", "layers", *headings)
        kinds = layer_kinds(layer.layer for layer in self)
        for kind in dict.fromkeys(kinds.values()):
            table.add_row(kind, *_cells([layer for layer in self if kinds[layer.layer] == kind]))
        table.add_section()
        table.add_row("all", *_cells(self))
        return table

    def __repr__(self) -> str:
        return table_text(self.table()) if self else "[]"


def _cells(layers: Sequence[LayerSpectrum]) -> tuple[str, ...]:
    alphas = sorted({layer.alpha for layer in layers})
    return (
        str(len(layers)),
        span([layer.rank for layer in layers]),
        "-".join(f"{alpha:g}" for alpha in dict.fromkeys((alphas[0], alphas[-1]))),
        f"{max(layer.singular_values[0] for layer in layers):.3g}",
        f"{mean(layer.energy_rank(0.9) for layer in layers):.1f}",
        f"{mean(layer.effective_rank for layer in layers):.1f}",
        f"{sum(layer.parameters for layer in layers):,}",
    )


class Squeezed(list[LayerReport]):
    """What was squeezed in each layer; shown in an interactive session, it is a table with a line for each kind.

    Attributes:
        rounding: what was lost to the dtype of the new files; None if they have the dtypes of the old ones.
    """

    def __init__(self, reports: Iterable[LayerReport], rounding: Rounding | None) -> None:
        super().__init__(reports)
        self.rounding = rounding

    def table(self) -> Table:
        """A table of rich; for ``rich.print``."""
        return change_table("squeezed adapter", self, {layer.layer: layer.rank_after for layer in self})

    def __repr__(self) -> str:
        return table_text(self.table()) if self else "[]"


def inspect(path: str | Path) -> Spectra:
    """The layers of a stored LoRA, ordered by name, with the singular values of their updates, as a list.

    Neither a model nor PEFT is needed, and one layer is in memory at a time.

    Args:
        path: folder of a PEFT adapter, or of the run that made it; or a safetensors file of diffusers, kohya or
            ComfyUI.

    Raises:
        ConfigurationError: if the adapter cannot be read, or is not plain LoRA.

    >>> import tempfile, torch, dynrank
    >>> model = dynrank.add_lora(torch.nn.Sequential(torch.nn.Linear(8, 8)), rank=2, alpha=2)
    >>> with torch.no_grad():
    ...     _ = model[0].lora_A.copy_(torch.eye(2, 8) * 3)
    ...     _ = model[0].lora_B.copy_(torch.eye(8, 2))
    >>> folder = tempfile.mkdtemp()
    >>> dynrank.save_adapter(model, folder)
    >>> [(layer.layer, layer.rank, layer.singular_values, layer.effective_rank) for layer in inspect(folder)]
    [('0', 2, (3.0, 3.0), 2.0)]
    """
    with open_stored(adapter_folder(Path(path))) as adapter:
        spectra = []
        for name, stored in adapter.layers.items():
            values = tuple(adapter.singular_values(name).tolist())
            spectra.append(LayerSpectrum(**vars(stored), layer=name, singular_values=values))
        return Spectra(spectra)


def squeeze(
    source: str | Path,
    out: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    budget: int | float | str | None = None,
    dtype: FileDtype | None = None,
) -> Squeezed:
    """Write the adapter in ``source`` to ``out`` with lower ranks, or with fewer bits.

    Each layer gets its best approximation in the Frobenius norm. Scaling is kept, so alpha changes with the rank, and
    rsLoRA becomes plain LoRA with the same scaling. Without a ``dtype``, layers whose rank does not change keep their
    factors bit for bit, and so do all other tensors (modules_to_save). All other settings are kept; tokenizer files and
    label names are copied. Memory use is the new adapter and one pair of old factors. ``out`` is written whole or not
    at all.

    A file of diffusers, kohya or ComfyUI is computed in float32 and stored in its own dtypes (float8 becomes bfloat16),
    or in ``dtype``, which may not be float8, since such a file has one alpha for all layers. Its other layers (LoHa,
    LoKr, DoRA) are copied. All layers get the same alpha.

    Give one of ``rank``, ``energy`` and ``budget``; or a ``dtype`` alone, to keep the ranks.

    Args:
        source: folder of a PEFT LoRA adapter (adapter_config.json, adapter_model.safetensors), or of the run that made
            it; or a safetensors file.
        out: new or empty folder; a new file if ``source`` is a file.
        rank: highest rank of every layer.
        energy: share of each layer's energy (sum of squared singular values) to keep, in (0, 1].
        budget: parameters of all factors together (an int), or a share of the present ones ("0.5", "50%", 0.5); the
            directions with the most energy of the update (scaling included) for a parameter are kept.
        dtype: dtype of the new files, see :func:`dynrank.save_adapter`; "nf4": codes of 4 bits (arXiv:2305.14314) with
            a least-squares scale for each 64, about a seventh of float32, which change the update by about 12%. All of
            dynrank reads them as they lie; others read them after a squeeze to torch.float32. None: as stored.

    Returns:
        A list with a report for each layer, unchanged ones included: ``layer``, ``rank_before``, ``rank_after``,
        ``energy_kept``, …; and ``rounding``, what was lost to ``dtype``.

    Raises:
        ConfigurationError: if an option or the adapter cannot be used, or ``out`` is not free or cannot be written.

    >>> import tempfile, torch, dynrank
    >>> model = dynrank.add_lora(torch.nn.Sequential(torch.nn.Linear(8, 8)), rank=4)
    >>> folder = tempfile.mkdtemp()
    >>> dynrank.save_adapter(model, f"{folder}/adapter")
    >>> [(layer.rank_before, layer.rank_after) for layer in squeeze(f"{folder}/adapter", f"{folder}/small", rank=2)]
    [(4, 2)]
    """
    check_file_dtype(dtype, packed=True)
    with open_stored(adapter_folder(Path(source))) as adapter:
        if dtype is not None and rank is None and energy is None and budget is None:
            ranks = {name: layer.rank for name, layer in adapter.layers.items()}
        else:
            ranks = _ranks(adapter, _target(adapter, rank, energy, budget))
        return _write(adapter, ranks, Path(out), dtype)


def _target(adapter: StoredAdapter, rank: int | None, energy: float | None, budget: int | float | str | None) -> Target:
    """The target that the options of :func:`squeeze` set for ``adapter``."""
    options = {"rank": rank, "energy": energy, "budget": budget}
    given = [f"{name}={value}" for name, value in options.items() if value is not None]
    if len(given) != 1:
        got = ", ".join(given) or "none"
        raise ConfigurationError(
            f"give one of rank, energy and budget, got {got}; a dtype alone keeps the ranks", *options
        )
    if energy is not None and not 0 < energy <= 1:
        raise ConfigurationError(f"energy must be a share in (0, 1], got {energy}", "energy")
    if rank is not None:
        # The target's own message would also speak of ranks by layer.
        if not isinstance(rank, int) or rank < 1:
            raise ConfigurationError(f"rank must be a whole number of at least 1, got {rank!r}", "rank")
        return Rank(rank)
    return Energy(energy) if energy is not None else _budget(budget, adapter)


def _budget(budget: int | float | str | None, adapter: StoredAdapter) -> Budget:
    text = str(budget).strip()
    share = 0.0
    if re.fullmatch(r"\d+(_\d+)*", text):
        parameters = int(text)
    else:
        with suppress(ValueError):
            share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        if not 0 < share <= 1:
            raise ConfigurationError(
                f"budget must be a number of parameters, or a share in (0, 1] such as 0.5 or 50%, got {budget!r}",
                "budget",
            )
        # The small number cancels rounding errors: 0.29 * 100 is below 29 in floats.
        parameters = floor(share * sum(layer.parameters for layer in adapter.layers.values()) + 1e-9)
    least = sum(layer.params_per_rank for layer in adapter.layers.values())
    if parameters < least:
        raise ConfigurationError(f"budget must be at least {least:,} parameters (rank 1), got {budget}", "budget")
    return Budget(parameters, by="weight")


def _ranks(adapter: StoredAdapter, target: Target) -> dict[str, int]:
    """{layer: its new rank}; one layer is in memory at a time."""
    states = {}
    for name, layer in adapter.layers.items():
        values = adapter.singular_values(name) if target.needs else None
        states[name] = LayerState(layer.rank, *layer.shape, values=values, num_products=layer.experts)
    return dict(target.ranks(states))


def _write(adapter: Adapter | SingleFile, ranks: Mapping[str, int], out: Path, dtype: FileDtype | None) -> Squeezed:
    """Write ``adapter`` to ``out`` with ``ranks``; returns a report for each layer."""
    if not isinstance(adapter, SingleFile):
        with new_adapter_folder(out, Path(adapter.source)) as folder:
            factors, reports = _squeezed(adapter, ranks, dtype)
            lost = rewrite_adapter(folder, adapter, factors, dtype)
        return Squeezed(reports, lost)
    if isinstance(dtype, str) or dtype == FLOAT8:
        raise ConfigurationError(
            f"dtype must be torch.float32 or torch.bfloat16 for a file of diffusers, kohya or ComfyUI, got {dtype}",
            "dtype",
        )
    if out.suffix != SUFFIX:
        raise ConfigurationError(f"out must be a new file, NAME{SUFFIX}, got {str(out)!r}", "out")
    with new_file(out) as file:
        factors, reports = _squeezed(adapter, ranks, dtype)
        lost = rewrite_file(file, adapter, factors, dtype)
    return Squeezed(reports, lost)


def _squeezed(
    adapter: StoredAdapter, ranks: Mapping[str, int], dtype: FileDtype | None
) -> tuple[dict[str, Factors], list[LayerReport]]:
    """({layer: new factors}, a report for each layer); one pair of old factors is in memory at a time.

    For a new ``dtype`` the factors are at least float32, so that they are rounded only once.
    """
    factors = {}
    reports = []
    for name, rank in ranks.items():
        layer = adapter.layers[name]
        lora_B, lora_A = adapter.factors(name)
        if dtype is not None:
            wide = torch.promote_types(lora_A.dtype, torch.float32)
            lora_B = lora_B.to(wide)
            lora_A = lora_A.to(wide)
        if rank < layer.rank:
            pairs = products(lora_B, lora_A, layer.experts)
            change = stacked([truncate_product(b, a, rank) for b, a in pairs])
            lora_B = change.lora_B
            lora_A = change.lora_A
            values = change.singular_values * abs(layer.scaling)
        else:
            values = adapter.singular_values(name)
        factors[name] = lora_A, lora_B, layer.scaling
        reports.append(report_of(name, rank, values, layer.params_per_rank))
    return factors, reports
