"""``nse-tools figures list | run | draw``: the paper's experiments in a shell."""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from nse_tools.cli.shell import FACTS_HELP, Model, Preset, Settings, console, errors_in_one_line, numbers_of, settings_of, stream_of
from nse_tools.errors import NSEError

commands = typer.Typer(help="The paper's experiments: run them, draw them from what is stored.", no_args_is_help=True)
Name = Annotated[str, typer.Argument(metavar="NAME", help="A figure (nse-tools figures list), or for run also a run.")]
Folder = Annotated[Path, typer.Option("--out", help="Folder of the runs' results.")]


@commands.command("list")
def list_() -> None:
    """List the figures, what each shows and which run it needs; in a source checkout also the runs."""
    from nse_tools.figures.paper import FIGURES

    figures = Table("figure", "shows", "run", box=box.SIMPLE_HEAD)
    for figure in FIGURES.values():
        figures.add_row(figure.name, escape(figure.shows), figure.run or "–")
    console.print(figures)
    if find_spec("experiments") is None:
        return
    runs = Table("run", "asks", "facts", "of", "in rounds of", "seeds", box=box.SIMPLE_HEAD)
    for run in _experiments().RUNS.values():
        runs.add_row(run.name, escape(run.asks), str(run.size.n), run.facts, str(run.size.rounds_of), str(len(run.size.seeds)))
    console.print(runs)


def _experiments() -> ModuleType:
    """Return the module that makes the runs."""
    try:
        return import_module("experiments.runs")
    except ModuleNotFoundError as error:
        if error.name not in ("experiments", "experiments.runs"):
            raise
        raise NSEError(
            "figures run: expected a source checkout with the folder experiments/, got an installed package. "
            "Clone the repository, and install it with: pip install -e ."
        ) from error


@commands.command()
def run(
    name: Name,
    out: Folder = Path("runs/figures"),
    model: Model = "smollm2-135m",
    facts: Annotated[
        str | None, typer.Option(help=f"{FACTS_HELP} By default those of the stored results (nse-tools figures list).")
    ] = None,
    n: Annotated[int | None, typer.Option(help="How many facts; the run's own number by default.")] = None,
    rounds_of: Annotated[int | None, typer.Option(help="Facts in a round.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds, with commas.")] = None,
    tests: Annotated[int | None, typer.Option(help="After how many rounds, evenly spread, all facts so far are tested.")] = None,
    contexts: Annotated[
        int | None, typer.Option(help="How many contexts besides the bare prompt; fewer take less time.", min=0, max=5)
    ] = None,
    as_in_paper: Annotated[bool, typer.Option(help="The paper's sizes instead of those for the embedded model.")] = False,
    only: Annotated[list[str] | None, typer.Option(help="Only this of its methods (may be repeated); others can follow later.")] = None,
    written: Annotated[bool, typer.Option(help="In 'sequence', also let the model write about edited facts: fluency.")] = False,
    references: Annotated[
        Path | None, typer.Option(help="Reference texts (ROME's attribute_snippets.json): also consistency of what is written.")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="A text file for C, all of it; by default each seed's is sampled from the model.")
    ] = None,
    texts: Annotated[bool, typer.Option(help="Keep tables that quote facts; without, facts are named by their ids only.")] = True,
    preset: Preset = "smollm2-135m",
    change: Settings = None,
) -> None:
    """Run what a figure needs; a run that was killed goes on where it was."""
    from nse_tools.figures.paper import FIGURES
    from nse_tools.metrics.generation import load_reference_texts
    from nse_tools.models.loading import load_model
    from nse_tools.tracing.corpus import load_corpus

    with errors_in_one_line():
        runs_module = _experiments()
        chosen = runs_module.find_run((FIGURES[name].run or name) if name in FIGURES else name)
        usual = chosen.paper if as_in_paper else chosen.size
        asked: dict[str, Any] = {"n": n, "rounds_of": rounds_of, "tests": tests, "contexts": contexts}
        asked |= {"seeds": None if seeds is None else tuple(numbers_of("--seeds", seeds))}
        size = replace(usual, **{name: value for name, value in asked.items() if value is not None})
        given, snippets = stream_of(facts or chosen.facts), None if references is None else load_reference_texts(references)
        loaded = load_model(model)
        made = runs_module.make_run(
            chosen.name,
            loaded,
            given,
            out,
            size=size,
            preset=None if preset == "none" else preset,
            settings=settings_of(change or []),
            only=only,
            written=written,
            references=snippets,
            corpus=None if text is None else load_corpus(loaded, text, n_tokens=sys.maxsize),
            texts=texts,
        )
    for part, result in made.items():
        console.print(f"[bold]{escape(part)}[/bold]: {escape(repr(result))}")
    console.print(f"Stored in {escape(str(out / chosen.name))}")


@commands.command()
def draw(
    name: Name,
    out: Folder = Path("runs/figures"),
    into: Annotated[Path | None, typer.Option(help="Where the figure goes; the folder of the results by default.")] = None,
    form: Annotated[str, typer.Option("--as", help="'html', or 'png', 'svg', 'pdf' where a browser is found.")] = "html",
) -> None:
    """Draw a figure from stored results, with its table as CSV beside it; no model is loaded."""
    from nse_tools.figures.paper import draw_figure
    from nse_tools.figures.save import make_folder
    from nse_tools.plots.exporting import export

    with errors_in_one_line():
        figure, table = draw_figure(name, out)
        place = make_folder(into or out)
        export(figure, place / f"{name}.{form}")
        table.to_csv(place / f"{name}.csv", index=False, lineterminator="\n")
    console.print("Written:", *(escape(str(place / f"{name}.{ending}")) for ending in (form, "csv")), sep="\n  ")
