"""``nse-tools …``: the notebook's verbs in a shell."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.table import Table

from nse_tools.cli import editing, figures, sharing
from nse_tools.cli.shell import (
    Facts,
    Model,
    Number,
    Preset,
    RoundsOf,
    Settings,
    Skip,
    console,
    errors_in_one_line,
    numbers_of,
    print_table,
    settings_of,
    some_of,
)
from nse_tools.errors import NSEError

if TYPE_CHECKING:
    import pandas as pd

    from nse_tools.comparison import Comparison

app = typer.Typer(help="See and steer what a language model knows.", no_args_is_help=True, add_completion=False)
app.add_typer(sharing.commands)
app.add_typer(figures.commands, name="figures")
app.command()(editing.edit)
_SHOWN = {
    "round": "round",
    "facts": "facts",
    "efficacy_fresh": "fresh",
    "efficacy": "efficacy",
    "efficacy_accuracy": "accuracy",
    "generalization": "general.",
    "specificity": "specific.",
    "score": "Score",
    "perplexity": "perpl.",
}
_CAPTION = (
    "percent, all facts edited so far (round 0: the unedited model on the first round's facts) · fresh: efficacy on the round's own facts"
    " · accuracy: the new target is the first choice · general.: paraphrases · specific.: neighbours keep theirs"
)
_HEADS = {
    "method": "",
    "edits": "edits",
    "score": "Score",
    "efficacy": "efficacy",
    "efficacy_accuracy": "accuracy",
    "generalization": "general.",
    "specificity": "specific.",
    "score_token_accuracy": "Score",
    "efficacy_token_accuracy": "efficacy",
    "generalization_token_accuracy": "general.",
    "locality_token_accuracy": "locality",
    "perplexity": "perpl.",
    "first_round_accuracy": "first",
    "seconds_per_edit": "s/edit",
}
_COMPARED = (
    "percent, on all facts, mean ± deviation over seeds · accuracy: the new target is the first choice · general.: paraphrases"
    " · specific.: neighbours keep theirs · first: accuracy on the first round's facts · s/edit: where every value was searched for"
)


@app.callback()
def main(verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what is done.")] = False) -> None:
    """Set up logging for all commands."""
    handler = RichHandler(console=Console(stderr=True), show_path=False)
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(message)s", handlers=[handler])
    logging.getLogger("httpx").setLevel(logging.WARNING)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for tables and figures.")] = Path("runs/demo"),
    model: Model = "smollm2-135m",
    facts: Facts = "world",
    n: Number = None,
    rounds_of: RoundsOf = 20,
    method: Annotated[str, typer.Option(help="'nse', 'memit' or 'memit_seq'.")] = "nse",
    seed: Annotated[int, typer.Option(help="Seed of contexts and key statistics.")] = 0,
    skip: Skip = 0,
) -> None:
    """Edit a model round after round; show and draw what was learned, kept and forgotten."""
    from nse_tools import methods
    from nse_tools.figures import run_stream, save_stream
    from nse_tools.figures.save import make_folder
    from nse_tools.models import load_model

    makers = {"nse": methods.nse, "memit": methods.memit, "memit_seq": methods.memit_seq}
    with errors_in_one_line():
        if method not in makers:
            raise NSEError(f"--method {method}: expected one of {', '.join(makers)}.")
        chosen = some_of(facts, n, skip)
        make_folder(out)  # before hours of work, not after
        wrapped = load_model(model)
        result = run_stream(wrapped, chosen, makers[method](), rounds_of=rounds_of, seed=seed)
        files = save_stream(result, out)
    console.print(score_table(result.scores, f"{method} on {wrapped.name}"))
    console.print(f"[bold]{result.forgetting!r}[/bold]")
    console.print("Written:", *(str(f) for f in files), sep="\n  ")


@app.command()
def compare(
    methods: Annotated[str, typer.Option(help="Names of methods, with commas.")] = "nse,memit,memit_seq",
    out: Annotated[Path, typer.Option(help="Folder; a run that was killed goes on there.")] = Path("runs/compare"),
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
    contexts: Annotated[int, typer.Option(help="How many contexts besides the bare prompt; fewer take less time.", min=0, max=5)] = 5,
    preset: Preset = "smollm2-135m",
    change: Settings = None,
) -> None:
    """Compare methods on the same facts, contexts and key statistics; table, CSV files and figures."""
    from nse_tools import methods as known_methods
    from nse_tools.comparison import compare
    from nse_tools.figures import save_comparison
    from nse_tools.models import load_model
    from nse_tools.tracing.contexts import STARTERS

    with errors_in_one_line():
        settings = {"preset": None if preset == "none" else preset, **settings_of(change or [])}
        chosen = [known_methods.get(name.strip(), common=settings) for name in methods.split(",")]
        stream = some_of(facts, n, skip)
        tested, numbers = numbers_of("--test-at", test_at), numbers_of("--seeds", seeds)
        result = compare(
            load_model(model),
            stream,
            chosen,
            rounds_of=rounds_of,
            seeds=numbers,
            folder=out,
            test_at=tested if "," in test_at else tested[0],
            facts_of=None if facts_of is None else numbers_of("--facts-of", facts_of),
            shuffle=shuffle,
            starters=STARTERS[:contexts],
        )
        files = save_comparison(result, out)
    console.print(comparison_table(result))
    for halt in result.stopped.itertuples():
        console.print(escape(f"{halt.method}, seed {halt.seed}, could not go on after round {halt.after_round}: {halt.why}"), style="red")
    console.print("Written:", *(str(f) for f in files), sep="\n  ")


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

    with errors_in_one_line():
        make_folder(out.parent)
        table = knowledge(load_model(model), load_facts(facts), progress=True).sort_values("id")
        table.to_csv(out, index=False, lineterminator="\n")
    console.print(f"{int(table.known.sum())} of {len(table)} facts are known; written to {out}")


def comparison_table(comparison: Comparison) -> Table:
    """Return the summary of a comparison: a row a method, mean ± deviation over seeds."""
    shown = comparison.shown()
    shown = shown[[column for column in _HEADS if column in shown]]
    title = f"after the last round, on {comparison.about['model']}, seeds {', '.join(map(str, comparison.seeds))}"
    table = Table(title=title, caption=_COMPARED, box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    for column in shown.columns:
        table.add_column(_HEADS[column], justify="left" if column == "method" else "right", overflow="fold", no_wrap=column == "method")
    for row in shown.itertuples(index=False):
        table.add_row(*(escape(cell.replace(" ± ", "±")) for cell in row))
    return table


def score_table(scores: pd.DataFrame, title: str) -> Table:
    """Return the table of scores per round that the demo prints."""
    table = Table(title=title, caption=_CAPTION, box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    columns = [c for c in _SHOWN if c in scores]
    for column in columns:
        table.add_column(_SHOWN[column], justify="right")
    for _, row in scores.iterrows():
        table.add_row(*(_cell(c, row[c]) for c in columns))
    return table


def _cell(column: str, value: float) -> str:
    if value != value:
        return "–"
    return f"{value:.0f}" if column in ("round", "facts") else f"{value:.1f}"


@app.command()
def check(model: Annotated[str, typer.Argument(help="A hub id, a folder or a .gguf file.")]) -> None:
    """Say what works on a model and what would go wrong; exit code 1 where there is a problem."""
    from nse_tools.editing import check_model

    with errors_in_one_line():
        found = check_model(model)
    console.print(escape(repr(found)))
    print_table(found.to_frame())
    if not found.ok:
        raise typer.Exit(1)
