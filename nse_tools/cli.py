"""``nse-tools …``: the verbs of a notebook in a shell. Libraries are imported inside the verbs, so that ``--help`` is fast."""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Iterable
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich import box
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.table import Table
from typer.core import TyperGroup

from nse_tools.errors import FactError, NSEError

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import JustifyMethod

    from nse_tools.comparison import Comparison
    from nse_tools.data import FactList
    from nse_tools.editing.batches import OnConflict
    from nse_tools.editing.session import EditSession
    from nse_tools.methods.base import Method
    from nse_tools.models import EditableModel


class _OneLineErrors(TyperGroup):
    """Turn errors of the library, and files that cannot be read or written, into one readable line and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (NSEError, OSError) as error:
            if isinstance(error, OSError) and error.filename is None:
                raise
            Console(stderr=True).print(f"[red]{type(error).__name__}[/red]:", error, markup=True)
            raise typer.Exit(2) from None


console = Console()
app = typer.Typer(cls=_OneLineErrors, help="See and steer what a language model knows.", no_args_is_help=True, add_completion=False)
figures = typer.Typer(help="The paper's experiments: run them, draw them from what is stored.", no_args_is_help=True)
app.add_typer(figures, name="figures")

_MODEL = "'smollm2-135m', a hub id, a folder or a .gguf file."
_FACTS = (
    "'world' (facts the embedded model knows first), 'world-development' or 'world-test' (every fourth of them; the others), "
    "'world-all' (all of them, then further facts that 'world' does not have), or a JSON file of CounterFact, zsRE or our own schema."
)
Model = Annotated[str, typer.Option(help=_MODEL)]
Facts = Annotated[str, typer.Option(help=_FACTS)]
Number = Annotated[int | None, typer.Option("--n", help="How many facts; by default 100, or all where there are fewer.", min=1)]
RoundsOf = Annotated[int, typer.Option(help="Facts per round.", min=1)]
Skip = Annotated[int, typer.Option(help="Leave out the first facts.", min=0)]
Seed = Annotated[int, typer.Option(help="Seed of contexts and key statistics.")]
ContextCount = typer.Option(help="How many contexts besides the bare prompt; fewer take less time.", min=0, max=5)
Preset = Annotated[str, typer.Option(help="Preset of all methods, or 'none' (then --set layers=…).")]
Settings = Annotated[list[str] | None, typer.Option("--set", help="A setting of all methods: name=value, value as in JSON.")]
PatchPath = Annotated[Path, typer.Argument(metavar="PATCH", help="A file that session.export(…, as_='patch') wrote.")]
FigureName = Annotated[str, typer.Argument(metavar="NAME", help="A figure (nse-tools figures list), or for run also a run.")]
RunsFolder = Annotated[Path, typer.Option("--out", help="Folder of the runs' results.")]


@app.callback()
def main(verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log progress.")] = False) -> None:
    """Set up logging for all commands."""
    handler = RichHandler(console=Console(stderr=True), show_path=False)
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(message)s", handlers=[handler])
    logging.getLogger("httpx").setLevel(logging.WARNING)


# ---- editing and measuring ---------------------------------------------------------------------------------------------
@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for tables and figures.")] = Path("runs/demo"),
    model: Model = "smollm2-135m",
    facts: Facts = "world",
    n: Number = None,
    rounds_of: RoundsOf = 20,
    method: Annotated[str, typer.Option(help="'nse', 'memit' or 'memit_seq'.")] = "nse",
    seed: Seed = 0,
    skip: Skip = 0,
) -> None:
    """Edit a model round by round; show and draw what was learned, kept and forgotten."""
    from nse_tools import methods
    from nse_tools.figures import run_stream, save_stream
    from nse_tools.figures.save import make_folder
    from nse_tools.models import load_model

    makers = {"nse": methods.nse, "memit": methods.memit, "memit_seq": methods.memit_seq}
    if method not in makers:
        raise NSEError(f"--method {method}: expected one of {', '.join(makers)}.")
    stream = some_of(facts, n, skip)
    make_folder(out)  # before hours of work, not after
    loaded = load_model(model)
    result = run_stream(loaded, stream, makers[method](), rounds_of=rounds_of, seed=seed)
    files = save_stream(result, out)
    console.print(score_table(result.scores, f"{method} on {loaded.name}"))
    console.print(f"[bold]{result.forgetting!r}[/bold]")
    _print_written(files)


@app.command()
def edit(
    model: Annotated[str, typer.Argument(help=_MODEL)],
    facts: Annotated[str, typer.Argument(help=_FACTS)],
    folder: Annotated[Path, typer.Option(help="Folder of the session; an existing one is continued.")],
    rounds_of: RoundsOf = 20,
    method: Annotated[str, typer.Option(help="Name of a method.")] = "nse",
    preset: Preset = "smollm2-135m",
    change: Settings = None,
    seed: Seed = 0,
    on_conflict: Annotated[
        str, typer.Option(help="Where a question has another target already: 'error', 'replace' (the newest), 'skip' (keep the oldest).")
    ] = "error",
) -> None:
    """Edit facts round by round and keep every round in a folder; facts that are edited already are skipped."""
    from nse_tools.models import load_model

    session_method = _method(method, preset, change)
    stream = facts_of_option(facts)
    session = _open_session(load_model(model), session_method, folder, seed)
    try:
        edited = session.edit_all(stream, rounds_of, cast("OnConflict", on_conflict))
    except KeyboardInterrupt:
        console.print(f"Stopped after round {len(session)}; the same command continues.", markup=False)
        raise typer.Exit(130) from None
    finally:
        _close(session)
    console.print(repr(edited), markup=False)
    console.print(repr(session), markup=False)


@app.command()
def compare(
    methods: Annotated[str, typer.Option(help="Names of methods, with commas.")] = "nse,memit,memit_seq",
    out: Annotated[Path, typer.Option(help="Folder; a run that was killed continues there.")] = Path("runs/compare"),
    model: Model = "smollm2-135m",
    facts: Facts = "world",
    n: Number = None,
    rounds_of: RoundsOf = 20,
    seeds: Annotated[str, typer.Option(help="Seeds, with commas.")] = "0",
    test_at: Annotated[str, typer.Option(help="Test after every k-th round (a number), or after these (with commas).")] = "1",
    facts_of: Annotated[
        str | None, typer.Option(help="Ask the facts of these rounds (with commas) and of the newest only; of all by default.")
    ] = None,
    shuffle: Annotated[bool, typer.Option(help="Shuffle the facts with each seed.")] = False,
    skip: Skip = 0,
    contexts: Annotated[int, ContextCount] = 5,
    preset: Preset = "smollm2-135m",
    change: Settings = None,
) -> None:
    """Compare methods on the same facts, contexts and key statistics; table, CSV files and figures."""
    from nse_tools.comparison import compare
    from nse_tools.figures import save_comparison
    from nse_tools.models import load_model
    from nse_tools.tracing.contexts import STARTERS

    compared = [_method(name.strip(), preset, change) for name in methods.split(",")]
    stream = some_of(facts, n, skip)
    tested, seed_numbers = _numbers("--test-at", test_at), _numbers("--seeds", seeds)
    result = compare(
        load_model(model),
        stream,
        compared,
        rounds_of=rounds_of,
        seeds=seed_numbers,
        folder=out,
        test_at=tested if "," in test_at else tested[0],
        facts_of=None if facts_of is None else _numbers("--facts-of", facts_of),
        shuffle=shuffle,
        starters=STARTERS[:contexts],
    )
    files = save_comparison(result, out)
    console.print(comparison_table(result))
    for halt in result.stopped.itertuples():
        console.print(
            escape(f"{halt.method}, seed {halt.seed}, could not continue after round {halt.after_round}: {halt.why}"), style="red"
        )
    _print_written(files)


@app.command()
def known(
    out: Annotated[Path, typer.Option(help="CSV file to write.")],
    model: Model = "smollm2-135m",
    facts: Facts = "world",
) -> None:
    """Ask a model which facts it knows by itself (the table shipped for 'world' is made by this command)."""
    from nse_tools.data import load_facts
    from nse_tools.figures.save import make_folder
    from nse_tools.metrics import knowledge
    from nse_tools.models import load_model

    make_folder(out.parent)
    table = knowledge(load_model(model), load_facts(facts), progress=True).sort_values("id")
    table.to_csv(out, index=False, lineterminator="\n")
    console.print(f"{int(table.known.sum())} of {len(table)} facts are known; written to {out}")


@app.command()
def check(model: Annotated[str, typer.Argument(help=_MODEL)]) -> None:
    """Say what works on a model and what would go wrong; exit code 1 where there is a problem."""
    from nse_tools.editing import check_model

    result = check_model(model)
    console.print(escape(repr(result)))
    _print_frame(result.to_frame())
    if not result.ok:
        raise typer.Exit(1)


# ---- exported edits ----------------------------------------------------------------------------------------------------
@app.command()
def apply(
    patch: PatchPath,
    out: Annotated[Path, typer.Option(help="Folder for the edited model, which plain transformers loads.")],
    model: Model = "smollm2-135m",
    overwrite: Annotated[bool, typer.Option(help="Replace an earlier export in that folder.")] = False,
) -> None:
    """Apply a patch to a model and write the edited model."""
    from nse_tools.io.export import export_patched
    from nse_tools.io.patch import apply_patch, inspect_patch
    from nse_tools.models import load_model

    inspect_patch(patch)  # before the model is loaded
    loaded = load_model(model)
    exported = export_patched(loaded, apply_patch(loaded, patch), out, overwrite=overwrite)
    console.print(escape(repr(exported)))
    console.print(f"Written: {escape(str(out))}")


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(metavar="PATCH|FOLDER", help="A patch file, or a folder exported as adapter or model.")],
    facts: Annotated[int, typer.Option(help="How many facts to list.")] = 10,
) -> None:
    """Say what an exported edit does to which model, without a model."""
    from nse_tools.io.patch import inspect_patch

    shared = inspect_patch(path)
    console.print(escape(repr(shared)))
    _print_frame(shared.to_frame())
    edited_facts = shared.facts_frame()
    _print_frame(edited_facts.head(facts))
    if len(edited_facts) > facts:
        console.print(f"… and {len(edited_facts) - facts} more facts (--facts {len(edited_facts)})")


@app.command()
def verify(patch: PatchPath, model: Model = "smollm2-135m") -> None:
    """Check that a patch is whole, fits a model and gives the result it promises; nothing is written."""
    from nse_tools.io.patch import inspect_patch, verify_patch
    from nse_tools.models import load_model

    inspect_patch(patch)  # before the model is loaded
    loaded = load_model(model)
    console.print(escape(repr(verify_patch(loaded, patch))))
    console.print(f"It fits {escape(loaded.name)}, and the result is what it promises, bit for bit.")


# ---- the paper's figures -----------------------------------------------------------------------------------------------
@figures.command("list")
def list_figures() -> None:
    """List the figures, what each shows and which run it needs; in a source checkout also the runs."""
    from nse_tools.figures.paper import FIGURES

    console.print(_table(("figure", "shows", "run"), ((f.name, escape(f.shows), f.run or "–") for f in FIGURES.values())))
    if find_spec("experiments") is not None:
        rows = ((r.name, escape(r.asks), r.size.n, r.facts, r.size.rounds_of, len(r.size.seeds)) for r in _runs().RUNS.values())
        console.print(_table(("run", "asks", "facts", "of", "per round", "seeds"), (map(str, row) for row in rows)))


@figures.command("run")
def run_figure(
    name: FigureName,
    out: RunsFolder = Path("runs/figures"),
    model: Model = "smollm2-135m",
    facts: Annotated[str | None, typer.Option(help=f"{_FACTS} By default those of the stored results (nse-tools figures list).")] = None,
    n: Annotated[int | None, typer.Option(help="How many facts; the run's own number by default.")] = None,
    rounds_of: Annotated[int | None, typer.Option(help="Facts per round.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds, with commas.")] = None,
    tests: Annotated[int | None, typer.Option(help="After how many rounds, evenly spread, all facts so far are tested.")] = None,
    contexts: Annotated[int | None, ContextCount] = None,
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
    """Run what a figure needs; a run that was killed continues where it was."""
    from nse_tools.figures.paper import FIGURES
    from nse_tools.metrics.generation import load_reference_texts
    from nse_tools.models import load_model
    from nse_tools.tracing.corpus import load_corpus

    runs = _runs()
    run = runs.find_run((FIGURES[name].run or name) if name in FIGURES else name)
    sizes: dict[str, Any] = {"n": n, "rounds_of": rounds_of, "tests": tests, "contexts": contexts}
    sizes["seeds"] = None if seeds is None else tuple(_numbers("--seeds", seeds))
    size = replace(run.paper if as_in_paper else run.size, **{key: value for key, value in sizes.items() if value is not None})
    stream, snippets = facts_of_option(facts or run.facts), None if references is None else load_reference_texts(references)
    loaded = load_model(model)
    results = runs.make_run(
        run.name,
        loaded,
        stream,
        out,
        size=size,
        preset=None if preset == "none" else preset,
        settings=_settings(change),
        only=only,
        written=written,
        references=snippets,
        corpus=None if text is None else load_corpus(loaded, text, n_tokens=sys.maxsize),
        texts=texts,
    )
    for part, result in results.items():
        console.print(f"[bold]{escape(part)}[/bold]: {escape(repr(result))}")
    console.print(f"Stored in {escape(str(out / run.name))}")


@figures.command()
def draw(
    name: FigureName,
    out: RunsFolder = Path("runs/figures"),
    into: Annotated[Path | None, typer.Option(help="Where the figure goes; the folder of the results by default.")] = None,
    form: Annotated[str, typer.Option("--as", help="'html', or 'png', 'svg', 'pdf' where a browser is found.")] = "html",
) -> None:
    """Draw a figure from stored results, with its table as CSV next to it; no model is loaded."""
    from nse_tools.figures.paper import draw_figure
    from nse_tools.figures.save import make_folder
    from nse_tools.plots.exporting import export

    figure, table = draw_figure(name, out)
    folder = make_folder(into or out)
    export(figure, folder / f"{name}.{form}")
    table.to_csv(folder / f"{name}.csv", index=False, lineterminator="\n")
    _print_written([folder / f"{name}.{form}", folder / f"{name}.csv"])


def _runs() -> ModuleType:
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


# ---- options -----------------------------------------------------------------------------------------------------------
def facts_of_option(facts: str) -> FactList:
    """Return the facts that an option names."""
    from nse_tools.data import load_facts, world_by_knowledge

    return world_by_knowledge() if facts == "world" else load_facts(facts)


def some_of(facts: str, n: int | None, skip: int) -> FactList:
    """Return the facts that ``--facts``, ``--n`` and ``--skip`` name; without ``--n`` 100, or all where there are fewer."""
    stream = facts_of_option(facts)
    left = len(stream) - skip
    if left < (n or 1):
        raise FactError(f"--facts {facts}: there are {len(stream)}, too few for --n {n or 1} after --skip {skip}. Ask for fewer.")
    return stream[skip : skip + (n or min(left, 100))]


def _method(name: str, preset: str, changes: list[str] | None) -> Method:
    """Return a registered method with the options ``--preset`` and ``--set``."""
    from nse_tools import methods

    return methods.get(name, common={"preset": None if preset == "none" else preset, **_settings(changes)})


def _settings(changes: list[str] | None) -> dict[str, Any]:
    """Return the settings that ``--set name=value`` options change."""
    settings: dict[str, Any] = {}
    for change in changes or []:
        name, equals, value = change.partition("=")
        if not equals:
            raise NSEError(f"--set {change}: expected name=value, e.g. --set passes=1.")
        try:
            settings[name] = json.loads(value)
        except json.JSONDecodeError:  # a word
            settings[name] = value
    return settings


def _numbers(option: str, text: str) -> list[int]:
    """Return the whole numbers of an option, which are separated by commas."""
    numbers = [part.strip() for part in text.split(",") if part.strip()]
    if not numbers or not all(re.fullmatch(r"-?\d+", number) for number in numbers):
        raise NSEError(f"{option} {text}: expected whole numbers, with commas.")
    return [int(number) for number in numbers]


def _open_session(model: EditableModel, method: Method, folder: Path, seed: int) -> EditSession:
    """Return the session of a folder, or a new one that is kept there."""
    from nse_tools.editing.session import EditSession
    from nse_tools.io.saved_session import holds_session

    if not holds_session(folder):
        return EditSession(model, method, seed=seed, autosave=folder)
    session = EditSession.load(folder, model, autosave=True)
    if session.method != method or session.seed != seed:
        _close(session)
        raise NSEError(
            f"--folder {folder}: expected a session of {method!r} with seed {seed}, got one of {session.method!r} with seed "
            f"{session.seed}. Give the options it was begun with, or another folder."
        )
    return session


def _close(session: EditSession) -> None:
    if session.autosave is not None:
        session.autosave.close()


# ---- tables ------------------------------------------------------------------------------------------------------------
_HEADINGS = {
    "efficacy_fresh": "fresh",
    "efficacy_accuracy": "accuracy",
    "generalization": "general.",
    "specificity": "specific.",
    "score": "Score",
    "score_token_accuracy": "Score",
    "efficacy_token_accuracy": "efficacy",
    "generalization_token_accuracy": "general.",
    "locality_token_accuracy": "locality",
    "perplexity": "perpl.",
    "first_round_accuracy": "first",
    "seconds_per_edit": "s/edit",
    "method": "",
}
_OF_ROUNDS = "round facts efficacy_fresh efficacy efficacy_accuracy generalization specificity score perplexity".split()
_OF_METHODS = (
    "method edits score efficacy efficacy_accuracy generalization specificity score_token_accuracy efficacy_token_accuracy "
    "generalization_token_accuracy locality_token_accuracy perplexity first_round_accuracy seconds_per_edit"
).split()
_ABBREVIATIONS = "accuracy: the new target is the first choice · general.: paraphrases · specific.: neighbours keep theirs"


def score_table(scores: pd.DataFrame, title: str) -> Table:
    """Return the table of scores per round that the demo prints."""
    caption = (
        "percent, all facts edited so far (round 0: the unedited model on the first round's facts)"
        f" · fresh: efficacy on the round's own facts · {_ABBREVIATIONS}"
    )
    columns = [column for column in _OF_ROUNDS if column in scores]
    rows = ([_score(column, row[column]) for column in columns] for _, row in scores.iterrows())
    return _table([_HEADINGS.get(c, c) for c in columns], rows, justify="right", title=title, caption=caption)


def comparison_table(comparison: Comparison) -> Table:
    """Return the summary of a comparison: one row per method, mean ± deviation over seeds."""
    shown = comparison.shown()
    shown = shown[[column for column in _OF_METHODS if column in shown]]
    title = f"after the last round, on {comparison.about['model']}, seeds {', '.join(map(str, comparison.seeds))}"
    caption = (
        f"percent, on all facts, mean ± deviation over seeds · {_ABBREVIATIONS} · first: accuracy on the first round's facts"
        " · s/edit: where every value was optimised"
    )
    rows = ([escape(cell.replace(" ± ", "±")) for cell in row] for row in shown.itertuples(index=False))
    table = _table([_HEADINGS.get(c, c) for c in map(str, shown)], rows, justify="right", title=title, caption=caption)
    table.columns[0].justify, table.columns[0].no_wrap = "left", True
    return table


def _score(column: str, value: float) -> str:
    if value != value:
        return "–"
    return f"{value:.0f}" if column in ("round", "facts") else f"{value:.1f}"


def _table(headings: Iterable[str], rows: Iterable[Iterable[str]], justify: JustifyMethod = "left", **options: Any) -> Table:
    """Return a table without lines; its cells are escaped already."""
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False, **options)
    for heading in headings:
        table.add_column(heading, justify=justify, overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def _print_frame(frame: pd.DataFrame) -> None:
    """Print a table, or where it does not fit the terminal's width, its rows one below another."""
    names = [escape(str(column)) for column in frame.columns]
    rows = [[_cell(value) for value in row] for row in frame.itertuples(index=False, name=None)]
    table = _table(names, rows)
    if console.measure(table, options=console.options.update(width=10_000)).maximum <= console.width:
        console.print(table)
        return
    for row in rows:
        console.print("\n".join(f"{name}: {cell}" for name, cell in zip(names, row, strict=True)), end="\n\n")


def _cell(value: object) -> str:
    return "" if value is None else escape(f"{value:.2g}" if isinstance(value, float) else str(value))


def _print_written(files: Iterable[Path]) -> None:
    console.print("Written:", *(escape(str(file)) for file in files), sep="\n  ")


if __name__ == "__main__":
    app()
