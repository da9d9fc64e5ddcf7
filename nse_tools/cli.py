"""``nse-tools …``: the notebook's verbs in a shell."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table

from nse_tools.errors import NSEError

if TYPE_CHECKING:
    import pandas as pd

app = typer.Typer(help="See and steer what a language model knows.", no_args_is_help=True, add_completion=False)
console = Console()

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

Model = Annotated[str, typer.Option(help="'smollm2-135m', a hub id, a folder or a .gguf file.")]
Facts = Annotated[str, typer.Option(help="'world', or a JSON file of CounterFact, zsRE or our own schema.")]


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
    n: Annotated[int, typer.Option(help="How many facts.")] = 100,
    rounds_of: Annotated[int, typer.Option(help="Facts in a round.")] = 20,
    method: Annotated[str, typer.Option(help="'nse', 'memit' or 'memit_seq'.")] = "nse",
    seed: Annotated[int, typer.Option(help="Seed of contexts and key statistics.")] = 0,
    skip: Annotated[int, typer.Option(help="Leave out the first facts.")] = 0,
) -> None:
    """Edit a model round after round; show and draw what was learned, kept and forgotten."""
    from nse_tools.editing import methods
    from nse_tools.facts import known_facts, load_facts
    from nse_tools.figures import run_stream, save_stream
    from nse_tools.models import load_model

    makers = {"nse": methods.nse, "memit": methods.memit, "memit_seq": methods.memit_seq}
    with _errors_in_one_line():
        if method not in makers:
            raise NSEError(f"--method {method}: expected one of {', '.join(makers)}.")
        chosen = known_facts() if facts == "world" else load_facts(facts)
        wrapped = load_model(model)
        result = run_stream(wrapped, chosen[skip : skip + n], makers[method](), rounds_of=rounds_of, seed=seed)
        files = save_stream(result, out)
    console.print(score_table(result.scores, f"{method} on {wrapped.name}"))
    console.print(f"[bold]{result.forgetting!r}[/bold]")
    console.print("Written:", *(str(f) for f in files), sep="\n  ")


@app.command()
def known(
    out: Annotated[Path, typer.Option(help="CSV file to write.")],
    model: Model = "smollm2-135m",
    facts: Facts = "world",
) -> None:
    """Ask a model which facts it knows by itself (the table shipped for 'world' is made by this command)."""
    from nse_tools.evaluation import knowledge
    from nse_tools.facts import load_facts
    from nse_tools.models import load_model

    with _errors_in_one_line():
        table = knowledge(load_model(model), load_facts(facts), progress=True).sort_values("id")
        table.to_csv(out, index=False, lineterminator="\n")
    console.print(f"{int(table.known.sum())} of {len(table)} facts are known; written to {out}")


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


class _errors_in_one_line:  # noqa: N801  (used like a function)
    """Turn errors of the library into one readable line and exit code 2."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, NSEError):
            Console(stderr=True).print(f"[red]{type(error).__name__}[/red]: ", error, markup=True)
            raise typer.Exit(2)


if __name__ == "__main__":
    app()
