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
Out = Annotated[Path, typer.Option(help="New or empty folder to write to; for a single file, a new file")]
Base = Annotated[
    str | None,
    typer.Option(help="Folder, hub name or short name of the base model; by default, the one that the adapter names"),
]
FileDtype = Annotated[
    str | None,
    typer.Option(metavar="D", help="float32, bfloat16, float8_e4m3fn; for squeeze also nf4; by default as stored"),
]
ConfigDir = Annotated[
    Path | None, typer.Option(exists=True, file_okay=False, help="Folder with your own groups, as for dynrank-train")
]


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
    config = _composed(overrides, "train", config_dir)
    from dynrank.app.commands.ranks import print_ranks

    print_ranks(config)


@app.command()
def plan(overrides: Overrides = None, config_dir: ConfigDir = None) -> None:
    """Count parameters and bytes of training by rank, from the model's config alone; say what fits a budget.

    Two overrides are its own: ranks=[4,8] and budget=24GiB.
    """
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
    adapter: Adapter,
    out: Out,
    rank: Annotated[int | None, typer.Option(metavar="N", help="New rank of every layer that has a higher one")] = None,
    energy: Annotated[
        float | None, typer.Option(metavar="E", help="Share of each layer's squared singular values to keep")
    ] = None,
    budget: Annotated[
        str | None, typer.Option(metavar="P", help="Parameters of all factors, or a share of the present ones: 50%")
    ] = None,
    dtype: FileDtype = None,
) -> None:
    """Compress an adapter to lower ranks (one of --rank, --energy and --budget) or fewer bits (--dtype), or both.

    It may also be a single .safetensors file of diffusers, kohya or ComfyUI.
    """
    from dynrank.adapters.precision import named_dtype
    from dynrank.app.commands.adapters import print_squeeze

    kind = None if dtype is None else named_dtype(dtype, packed=True)
    print_squeeze(adapter, out, rank=rank, energy=energy, budget=budget, dtype=kind)


@app.command()
def export(
    adapter: Adapter,
    to: Annotated[
        str, typer.Option(metavar="SERVER", help="vllm, gguf (llama.cpp), ollama or padded (SGLang, TGI, LoRAX)")
    ],
    out: Out,
    model: Base = None,
    multiple: Annotated[int, typer.Option(metavar="N", help="With padded: the rank is a multiple; TGI needs 16")] = 1,
    dtype: FileDtype = None,
) -> None:
    """Write a PEFT adapter in a form for a server, and print the command that serves it.

    Not every server supports ranks and alphas that differ between layers. An adapter that the server would read only in
    part or wrongly is refused.
    """
    from dynrank.adapters.export import export_adapter
    from dynrank.adapters.precision import named_dtype
    from dynrank.app.console import print_facts
    from dynrank.app.models.names import model_source
    from dynrank.output.console import span

    # export_adapter checks that it knows the server.
    options: Any = {"to": to, "multiple": multiple, "dtype": None if dtype is None else named_dtype(dtype)}
    base = None if model is None else model_source(model, "--model")
    done = export_adapter(adapter, out, model=base, **options)
    ranks = [layer.rank for layer in done.layers.values()]
    facts: dict[str, object] = {"layers": f"{len(ranks)}, rank {span(ranks)}, {sum(ranks) / len(ranks):.1f} on average"}
    if done.rounding is not None:
        facts["rounding"] = done.rounding
    print_facts({**facts, "files": f"{done.out}, {done.bytes / 1e6:.2f} MB", "serve": done.line})


@app.command()
def merge(adapter: Adapter, out: Out, model: Base = None) -> None:
    """Write the model with a PEFT adapter merged into it: a plain Hugging Face model."""
    from dynrank.app.console import print_facts, quiet_loading
    from dynrank.app.models.merging import merge_adapter

    quiet_loading()
    merged = merge_adapter(adapter, model, out)
    kind = f"{type(merged).__name__}, {str(merged.dtype).removeprefix('torch.')}"
    print_facts({"merged": kind, "parameters": f"{merged.num_parameters():,}", "files": out})


@app.command()
def predict(
    adapter: Adapter,
    texts: Annotated[
        list[str],
        typer.Argument(
            metavar="TEXT... | FILE",
            help="Texts; or one file: csv, tsv, json, jsonl or parquet with the columns of training, or a text a line",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write all answers here, in the order of the rows: .csv, .jsonl or .parquet"),
    ] = None,
    model: Base = None,
    batch_size: Annotated[int, typer.Option(metavar="N", help="Texts in a batch")] = 16,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", help="Largest number of tokens of an answer")] = 64,
) -> None:
    """Answer texts or the rows of a file: labels with probabilities, or the generated text."""
    from dynrank.app.commands.predict import predict
    from dynrank.app.console import quiet_loading

    quiet_loading()
    predict(adapter, texts, out, base=model, batch_size=batch_size, max_new_tokens=max_new_tokens)


@app.command()
def inspect(
    adapter: Adapter,
    plot: Annotated[Path | None, typer.Option(help="Picture of the singular values: FILE.png")] = None,
) -> None:
    """Show each layer of an adapter, also of a file as in squeeze: rank, scaling, singular values, energy."""
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
) -> None:
    """Print the results of a sweep, mean and deviation over seeds; write them to sweep.csv and sweep.png."""
    from dynrank.app.runs.sweep import show_sweep

    show_sweep(folder)


def main() -> None:
    """Entry point."""
    with usage_errors():
        app()


if __name__ == "__main__":
    main()
