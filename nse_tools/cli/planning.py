"""``nse-tools plan | check``: what edits will take, and whether a model can be edited, in a shell."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape

from nse_tools.cli.shell import console, errors_in_one_line, print_table

commands = typer.Typer()


@commands.command()
def plan(
    model: Annotated[str, typer.Argument(help="A name such as 'llama3-8b', a folder with config.json, or a hub id.")],
    facts: Annotated[int, typer.Option(help="Facts in a round.")] = 100,
    rounds: Annotated[int, typer.Option(help="Rounds.")] = 20,
    device_memory: Annotated[float | None, typer.Option(help="Memory of the device that holds the model, GB.")] = None,
    host_memory: Annotated[float | None, typer.Option(help="Memory of the host, GB.")] = None,
) -> None:
    """Say what edits take in memory and work, from a configuration alone."""
    from nse_tools.planning.plans import plan as make

    with errors_in_one_line():
        found = make(model, facts, rounds, device_memory=device_memory, host_memory=host_memory)
    console.print(escape(repr(found)))
    print_table(found.steps().round(3))
    print_table(found.settings())


@commands.command()
def check(model: Annotated[str, typer.Argument(help="A hub id, a folder or a .gguf file.")]) -> None:
    """Say what works on a model and what would go wrong; exit code 1 where there is a problem."""
    from nse_tools.planning.check import check_model

    with errors_in_one_line():
        found = check_model(model)
    console.print(escape(repr(found)))
    print_table(found.to_frame())
    if not found.ok:
        raise typer.Exit(1)
