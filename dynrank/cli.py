"""``dynrank``: what one does with runs and adapters besides training."""

from __future__ import annotations

from typing import Annotated

import typer

from dynrank.exits import usage_errors

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def dynrank() -> None:
    """LoRA adapters whose rank changes while they train. Training itself: dynrank-train."""


@app.command()
def ranks(
    overrides: Annotated[list[str] | None, typer.Argument(help="Hydra overrides, as for dynrank-train")] = None,
) -> None:
    """Show every LoRA layer of the composed run with its rank, and the rule that set it; nothing is trained."""
    from dynrank.config import compose
    from dynrank.rank_table import print_ranks

    print_ranks(compose(overrides or ()))


def main() -> None:
    """Entry point."""
    with usage_errors():
        app()


if __name__ == "__main__":
    main()
