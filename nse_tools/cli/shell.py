"""What all commands share: the console, common options, errors in one line."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from nse_tools.errors import FactError, NSEError

if TYPE_CHECKING:
    import pandas as pd

    from nse_tools.data.fact_list import FactList

console = Console()
Model = Annotated[str, typer.Option(help="'smollm2-135m', a hub id, a folder or a .gguf file.")]
FACTS_HELP = (
    "'world' (facts the embedded model knows first), 'world-development' or 'world-test' (every fourth of them; the others), "
    "'world-all' (all of them, then further facts that 'world' does not have), or a JSON file of CounterFact, zsRE or our own schema."
)
Facts = Annotated[str, typer.Option(help=FACTS_HELP)]
Number = Annotated[int | None, typer.Option("--n", help="How many facts; by default 100, or all where there are fewer.", min=1)]
RoundsOf = Annotated[int, typer.Option(help="Facts in a round.", min=1)]
Skip = Annotated[int, typer.Option(help="Leave out the first facts.", min=0)]
Preset = Annotated[str, typer.Option(help="Preset of all methods, or 'none' (then --set layers=…).")]
Settings = Annotated[list[str] | None, typer.Option("--set", help="A setting of all methods: name=value, value as in JSON.")]


class errors_in_one_line:  # noqa: N801  (used like a function)
    """Turn errors of the library, and files that cannot be read or written, into one readable line and exit code 2."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, NSEError) or (isinstance(error, OSError) and error.filename is not None):
            Console(stderr=True).print(f"[red]{type(error).__name__}[/red]:", error, markup=True)
            raise typer.Exit(2)


def stream_of(facts: str) -> FactList:
    """Return the facts that an option names."""
    from nse_tools.data.bundled import world_by_knowledge
    from nse_tools.data.readers import load_facts

    return world_by_knowledge() if facts == "world" else load_facts(facts)


def some_of(facts: str, n: int | None, skip: int) -> FactList:
    """Return the facts that ``--facts``, ``--n`` and ``--skip`` ask for; without ``--n`` 100, or all where there are fewer.

    Raises
    ------
    FactError
        If there are not as many.
    """
    stream = stream_of(facts)
    left = len(stream) - skip
    if left < (n or 1):
        raise FactError(f"--facts {facts}: there are {len(stream)}, too few for --n {n or 1} after --skip {skip}. Ask for fewer.")
    return stream[skip : skip + (n or min(left, 100))]


def settings_of(changes: list[str]) -> dict[str, Any]:
    """Return the settings that ``--set name=value`` options change."""
    settings: dict[str, Any] = {}
    for change in changes:
        name, found, value = change.partition("=")
        if not found:
            raise NSEError(f"--set {change}: expected name=value, e.g. --set passes=1.")
        try:
            settings[name] = json.loads(value)
        except json.JSONDecodeError:  # a word
            settings[name] = value
    return settings


def numbers_of(option: str, text: str) -> list[int]:
    """Return the whole numbers of an option, which are given with commas."""
    numbers = [part.strip() for part in text.split(",") if part.strip()]
    if not numbers or not all(re.fullmatch(r"-?\d+", number) for number in numbers):
        raise NSEError(f"{option} {text}: expected whole numbers, with commas.")
    return [int(number) for number in numbers]


def print_table(frame: pd.DataFrame) -> None:
    """Print a table, or where it does not fit the terminal's width, its rows one below another."""
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    for column in frame.columns:
        table.add_column(escape(str(column)), overflow="fold")
    for row in frame.itertuples(index=False):
        table.add_row(*map(_cell, row))
    if console.measure(table, options=console.options.update(width=10_000)).maximum <= console.width:
        console.print(table)
        return
    for row in frame.itertuples(index=False):
        console.print("\n".join(f"{escape(str(name))}: {_cell(value)}" for name, value in zip(frame.columns, row, strict=True)), end="\n\n")


def _cell(value: object) -> str:
    return "" if value is None else escape(f"{value:.2g}" if isinstance(value, float) else str(value))
