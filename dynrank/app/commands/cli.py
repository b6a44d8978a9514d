"""``dynrank``: the commands for runs and adapters, except training; and the exit codes of all commands."""

from pathlib import Path
from typing import Annotated, Any

import typer
from omegaconf import DictConfig
from typer.core import TyperGroup

from dynrank import __version__
from dynrank.app.console import quiet_imports
from dynrank.app.keys import named
from dynrank.app.runs.overrides import usage_errors
from dynrank.errors import ConfigurationError


class _Commands(TyperGroup):
    """Commands whose errors name the options that set the arguments at fault."""

    def invoke(self, ctx: Any) -> Any:
        def option(argument: str) -> str | None:
            command = self.get_command(ctx, ctx.invoked_subcommand)
            options = [of.opts[0] for of in command.params if of.name == argument] if command else []
            return next((name for name in options if name.startswith("--")), None)

        with named(option):
            return super().invoke(ctx)


# Each command imports its modules when it is called, so that --help does not wait for torch.
app = typer.Typer(cls=_Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def _adapter_of(place: Path) -> Path:
    from dynrank.adapters.folder import existing_adapter

    return existing_adapter(place)


Overrides = Annotated[list[str] | None, typer.Argument(help="Hydra overrides, as for dynrank-train")]
Adapter = Annotated[
    Path, typer.Argument(callback=_adapter_of, help="Folder of a PEFT LoRA adapter, or of the run that made it")
]
Stored = Annotated[
    Path,
    typer.Argument(
        metavar="ADAPTER",
        callback=_adapter_of,
        help="Folder of a PEFT LoRA adapter, or of the run that made it; or a .safetensors file of diffusers, kohya or "
        "ComfyUI",
    ),
]
Base = Annotated[
    str | None,
    typer.Option(help="Folder, hub name or short name of the base model; by default, the one that the adapter names"),
]
FileDtype = Annotated[
    str | None,
    typer.Option(
        metavar="D",
        help="float32, bfloat16 or float8_e4m3fn (half and a quarter of float32's bytes), which PEFT loads; with "
        "squeeze also nf4 (a seventh), see dynrank pack; by default as stored",
    ),
]
ConfigDir = Annotated[
    Path | None, typer.Option(exists=True, file_okay=False, help="Folder with your own groups, as for dynrank-train")
]


def _count(text: str | int) -> int:
    # typer's own messages do not name the value; defaults are passed as they are.
    if not str(text).isdecimal() or int(text) < 1:
        raise typer.BadParameter(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def _decimal(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"must be a number, got {text!r}") from None


def _pairs(columns: list[str] | None) -> dict[str, str | tuple[str, ...]]:
    """{our name of a column: the user's name, or several} of OURS=THEIRS or OURS=ONE,TWO."""
    cut = (pair.partition("=") for pair in columns or ())
    return {ours: tuple(theirs.split(",")) if "," in theirs else theirs for ours, _, theirs in cut}


def _print_version(asked: bool) -> None:
    if asked:
        print(f"dynrank {__version__}")
        raise typer.Exit


@app.callback()
def dynrank(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version")
    ] = False,
) -> None:
    """LoRA adapters whose rank changes during training. The command for training is dynrank-train."""
    quiet_imports()


@app.command("ranks")
def show_ranks(overrides: Overrides = None, config_dir: ConfigDir = None) -> None:
    """Show every LoRA layer of the composed run: start and final rank, and the rule that set it; nothing is trained."""
    for text in overrides or ():
        if Path(text).is_dir():
            raise ConfigurationError(f"{text!r} is a folder; the ranks of its adapter: dynrank inspect {text}")
    print_ranks(_composed(overrides, "train", config_dir))


def print_ranks(config: DictConfig) -> None:
    """Print the LoRA layers of a run with ``config``; the model is built without weights."""
    from dynrank.app.keys import keys_of
    from dynrank.app.runs.job import build
    from dynrank.driver.slot_notice import pool_at_end, rank_spans, slot_notice
    from dynrank.layers.finding import own_layers
    from dynrank.output.console import empty_table, print_table, shape_of_update, span
    from dynrank.output.ranks import ranks
    from dynrank.output.slots import slot_line

    job = build(config, on_meta=True)
    model: Any = job.module.model
    stages = job.scheduler.driver.stages
    own = own_layers(model)
    ends = rank_spans(model, stages)
    headings = ("layer", "d_out x d_in", "rank", "final rank", "alpha", "scaling", "parameters", "final parameters")
    table = empty_table("LoRA layers of the composed run", *headings, "rule", texts=["rule"])
    layers = ranks(model)
    end = 0
    for layer in layers:
        low, high = ends[layer.layer]
        bounds = own[layer.layer].bounds
        parameters = layer.parameters // layer.rank * low
        end += parameters
        rule = "" if low < high or not str(bounds) else f" ({bounds})"
        table.add_row(
            layer.layer,
            shape_of_update(layer.experts, layer.d_out, layer.d_in),
            str(layer.rank),
            f"{span((low, high))}{rule}",
            f"{layer.alpha:g}",
            f"{layer.scaling:g}",
            f"{layer.parameters:,}",
            f"{parameters:,}" if low == high else "",
            own[layer.layer].rule or "lora.rank",
        )
    table.add_section()
    if all(low == high for low, high in ends.values()):
        said = slot_line({name: low for name, (low, _) in ends.items()})
        total = f"{end:,}"
    else:
        # The data decide which layers get more than others, so only bounds and the sum are known.
        pool = pool_at_end(model, stages)
        total = ""
        size = ""
        if pool is not None:
            total = f"{pool:,}"
            size = f" from one pool of at most {total} parameters, {pool / 2**18:.2f} MiB in float32"
        notice = slot_notice(model, stages, name=keys_of(config.schedule, "schedule")("highest"))
        said = "; ".join(filter(None, (f"the run decides each rank{size}", notice)))
    table.add_row(f"{len(layers)} layers", *[""] * 5, f"{layers.parameters:,}", total, "")
    table.caption = f"at the end, {said}"
    print_table(table)


@app.command(hidden=True)
def train(overrides: Overrides = None) -> None:
    """Say what the command for training is."""
    raise ConfigurationError("the command for training is dynrank-train, with the same overrides")


@app.command()
def plan(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Hydra overrides, as for dynrank-train; also ranks=[4,8], budget=24GiB"),
    ] = None,
    config_dir: ConfigDir = None,
) -> None:
    """Count parameters and bytes of training by rank, from the model's config alone; say what fits a budget."""
    config = _composed(overrides, "plan", config_dir)
    from dynrank.app.planner.plan import show_plan

    show_plan(config)


def _composed(overrides: list[str] | None, name: str, folder: Path | None) -> DictConfig:
    """The configuration of a run, after the checks for which no library has to be loaded."""
    from dynrank.app.runs.config import compose
    from dynrank.app.runs.first_look import look

    config = compose(overrides or (), name, folder)
    look(config)
    return config


@app.command()
def squeeze(
    adapter: Stored,
    out: Annotated[Path, typer.Option(help="New or empty folder to write to; for a file, a new file")],
    rank: Annotated[
        int | None, typer.Option(parser=_count, metavar="N", help="New rank of every layer that has a higher one")
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option(
            parser=_decimal, metavar="E", help="Share of each layer's energy (sum of squared singular values) to keep"
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(metavar="P", help="Parameters of all factors, or a share of the present ones: 0.5 or 50%"),
    ] = None,
    dtype: FileDtype = None,
) -> None:
    """Compress an adapter to lower ranks or fewer bits; give one of --rank, --energy and --budget, or --dtype, or both.

    It prints by how much the update changes.
    """
    from dynrank.adapters.precision import named_dtype
    from dynrank.app.commands.adapters import print_squeeze

    kind = None if dtype is None else named_dtype(dtype, packed=True)
    print_squeeze(adapter, out, rank=rank, energy=energy, budget=budget, dtype=kind)


NewFolder = Annotated[Path, typer.Argument(metavar="OUT", help="New or empty folder to write to")]


@app.command()
def pack(adapter: Adapter, out: NewFolder) -> None:
    """Write a PEFT adapter in 4 bits: the same as dynrank squeeze --dtype nf4.

    All commands here read it as it lies, PEFT after dynrank unpack. It prints by how much the update changes.
    """
    squeeze(adapter, out, dtype="nf4")


@app.command()
def unpack(adapter: Adapter, out: NewFolder) -> None:
    """Write a packed adapter as PEFT's files in float32: the same as dynrank squeeze --dtype float32."""
    squeeze(adapter, out, dtype="float32")


@app.command()
def export(
    adapter: Adapter,
    to: Annotated[
        str,
        typer.Option(metavar="SERVER", help="vllm, gguf (llama.cpp), ollama or padded (SGLang, TGI, LoRAX)"),
    ],
    out: Annotated[Path, typer.Option(help="New or empty folder to write to; for gguf, a new file")],
    model: Base = None,
    multiple: Annotated[
        int, typer.Option(parser=_count, metavar="N", help="With padded: the rank is a multiple of N; TGI needs 16")
    ] = 1,
    dtype: FileDtype = None,
) -> None:
    """Write a PEFT adapter in a form for a server, and print the command that serves it.

    Not every server supports ranks and alphas that differ between layers. An adapter that the server would read only in
    part or wrongly is refused.
    """
    from dynrank.adapters.export import export_adapter
    from dynrank.adapters.precision import named_dtype
    from dynrank.app.console import print_facts
    from dynrank.app.models.base_model import base_for_server
    from dynrank.output.slots import slot_line, slot_rank

    # export_adapter checks that it knows the server.
    server: Any = to
    options: Any = {"multiple": multiple, "dtype": None if dtype is None else named_dtype(dtype)}
    done = export_adapter(adapter, out, to=server, model=base_for_server(adapter, model, to), **options)
    ranks = {name: layer.rank for name, layer in done.layers.items()}
    facts: dict[str, object] = {"layers": f"{len(ranks)}, {sum(ranks.values()) / len(ranks):.1f} ranks on average"}
    if done.rank is not None:
        # A server reserves a slot of one rank for the adapter; a number in bfloat16 has 2 bytes.
        slot = 2 * done.rank * sum(layer.params_per_rank for layer in done.layers.values()) / 2**20
        own = 2 * sum(layer.rank * layer.params_per_rank for layer in done.layers.values()) / 2**20
        facts["ranks"] = slot_line(ranks, slot_rank if to == "vllm" else lambda rank: rank + -rank % multiple)
        facts["a slot"] = f"{slot:.2f} MiB in bfloat16; at the layers' own ranks {own:.2f} MiB"
    if done.rounding is not None:
        facts["rounding"] = done.rounding
    print_facts({**facts, "files": f"{done.out}, {done.bytes / 1e6:.2f} MB", "serve": done.line})


@app.command()
def merge(
    adapter: Adapter,
    out: Annotated[Path, typer.Option(help="New or empty folder to write to")],
    model: Base = None,
    ollama: Annotated[bool, typer.Option("--ollama", help="Write a Modelfile for Ollama, too")] = False,
) -> None:
    """Write the model with a PEFT adapter merged into it: a plain Hugging Face model."""
    from dynrank.app.console import print_facts, quiet_loading
    from dynrank.app.models.merging import merge_adapter

    quiet_loading()
    merged = merge_adapter(adapter, model, out, ollama=ollama)
    kind = f"{type(merged).__name__}, {str(merged.dtype).removeprefix('torch.')}"
    facts = {"merged": kind, "parameters": f"{merged.num_parameters():,}", "files": out}
    if merged.can_generate():
        facts["for llama.cpp"] = f"convert_hf_to_gguf.py {out} --outfile {out.name}.gguf"
    if ollama:
        facts["for Ollama"] = f"ollama create {out.name} -f {out / 'Modelfile'}"
    print_facts(facts)


@app.command()
def predict(
    adapter: Adapter,
    texts: Annotated[
        list[str],
        typer.Argument(
            metavar="TEXT... | FILE",
            help="Texts; or one file: csv, tsv, json, jsonl or parquet as training reads it, or other text with a text "
            "in each line",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write the answers here, in the order of the rows: .csv, .jsonl or .parquet; if this is interrupted, "
            "the same command begins anew",
        ),
    ] = None,
    model: Base = None,
    columns: Annotated[
        list[str] | None,
        typer.Option(
            metavar="OURS=THEIRS",
            help="A column with another name than in training, such as text=review; several are joined: "
            "text=Subject,Body",
        ),
    ] = None,
    system: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="System prompt of chats without one; by default what training learned"),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Each text is a user's turn in a chat; what training learned is known")
    ] = False,
    skip_unusable: Annotated[
        bool, typer.Option("--skip-unusable", help="Leave out rows that cannot be used, and count them")
    ] = False,
    batch_size: Annotated[int, typer.Option(parser=_count, metavar="N", help="Texts in a batch")] = 16,
    max_new_tokens: Annotated[
        int, typer.Option(parser=_count, metavar="N", help="Largest number of tokens to generate for a text")
    ] = 64,
) -> None:
    """Answer texts or the rows of a file: labels with probabilities, or the generated text.

    For a server such as vLLM or llama.cpp, see dynrank export.
    """
    from dynrank.app.commands.predict import predict
    from dynrank.app.console import quiet_loading

    quiet_loading()
    options: Any = {"model": model, "columns": _pairs(columns), "system": system, "chat": chat}
    options |= {"skip_unusable": skip_unusable, "batch_size": batch_size, "max_new_tokens": max_new_tokens}
    predict(adapter, texts, out, **options)


@app.command()
def inspect(
    adapter: Stored,
    plot: Annotated[Path | None, typer.Option(help="Picture of the singular values: FILE.png")] = None,
) -> None:
    """Show each layer of an adapter: rank, scaling, singular values, and how many directions have its energy."""
    from dynrank.app.commands.adapters import show_adapter

    show_adapter(adapter, plot)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Folder of a finished run")],
    against: Annotated[
        list[Path] | None, typer.Option(metavar="RUN...", help="Folders of other finished runs to compare it with")
    ] = None,
) -> None:
    """Write report.html of a finished run into its folder: its results, losses, ranks and spectra."""
    from dynrank.app.runs.report.page import write_report

    run, *more = runs
    if more and not against:
        raise typer.BadParameter("a report is of one run; write the runs to compare it with after --against")
    print(f"report           {write_report(run, against=[*(against or ()), *more])}")


@app.command()
def sweep(
    folder: Annotated[Path, typer.Argument(help="Folder of a sweep: hydra.sweep.dir, or multirun/DATE/TIME")],
    plot: Annotated[bool, typer.Option(help="Also draw sweep.png")] = True,
) -> None:
    """Print the results of a sweep, mean and deviation over seeds; write them to sweep.csv and sweep.png."""
    if "=" in folder.name:
        raise ConfigurationError(
            f"dynrank sweep takes the FOLDER of a sweep that was made, got {str(folder)!r}; the command that makes one "
            "is dynrank-train --multirun, with the same overrides"
        )
    from dynrank.app.runs.sweep import show_sweep

    show_sweep(folder, plot=plot)


def main() -> None:
    """Entry point."""
    with usage_errors():
        app()


if __name__ == "__main__":
    main()
