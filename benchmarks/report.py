"""Fill the tables of docs/performance.md from csv files of the benchmarks.

    python benchmarks/report.py --results docs/results/bench
    python benchmarks/report.py --page docs/scaling.md --names cluster
    python benchmarks/report.py --page docs/placement.md --names precision

Between ``<!-- begin NAME -->`` and ``<!-- end NAME -->`` the summary of NAME.csv is put, as the benchmark itself prints it,
below a line that says on what machine it was measured. A table without a csv file is left as it is.
"""

from __future__ import annotations

import argparse
import re
from importlib import import_module
from pathlib import Path

import pandas as pd

from _machine import MACHINE

NAMES = ("value_search", "round", "scoring", "moments", "wide", "memory", "rounds_flat")


def markdown(frame: pd.DataFrame) -> str:
    """Return a table in Markdown, numbers with three significant digits."""
    head = [str(column).replace("_", " ") for column in frame.columns]
    lines = [head, ["---:" if pd.api.types.is_numeric_dtype(frame[c]) else "---" for c in frame.columns]]
    lines += [[_cell(value) for value in row] for row in frame.itertuples(index=False)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: object) -> str:
    if isinstance(value, float):
        whole = value == value and value.is_integer() or abs(value) >= 1000
        return "" if value != value else f"{value:,.0f}" if whole else f"{value:.3g}"
    return str(value)


def machine_of(frame: pd.DataFrame) -> str:
    """Say what machine a table was measured on."""
    return "; ".join(f"{cpu}, {cores} cores, {threads} threads, torch {torch}" for cpu, cores, threads, torch in _machines(frame))


def _machines(frame: pd.DataFrame) -> list[tuple[object, ...]]:
    return list(dict.fromkeys(frame[list(MACHINE)].itertuples(index=False, name=None)))


def table(name: str, file: Path) -> str:
    """Return a benchmark's table and machine, from its csv file."""
    frame = pd.read_csv(file)
    return f"Measured on {machine_of(frame)}.\n\n{markdown(import_module(name).summary(frame))}"


def fill(text: str, name: str, content: str) -> str:
    """Put a text between the markers of a name.

    Raises
    ------
    ValueError
        If the page does not have both markers, in order.
    """
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    filled, count = re.subn(f"{begin}.*?{end}", lambda _: f"{begin}\n{content}\n{end}", text, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"the page has {count} pairs of markers for {name!r}; one is needed")
    return filled


def main() -> None:
    """Read the arguments, fill the page."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--results", type=Path, default=Path("docs/results/bench"))
    made.add_argument("--page", type=Path, default=Path("docs/performance.md"))
    made.add_argument("--names", nargs="+", default=list(NAMES), help="benchmarks whose tables are on the page")
    chosen = made.parse_args()
    text = chosen.page.read_text(encoding="utf-8")
    for name in chosen.names:
        file = chosen.results / f"{name}.csv"
        if file.is_file():
            text = fill(text, name, table(name, file))
        print(f"{name}: {'filled' if file.is_file() else 'no csv file, left as it is'}")
    chosen.page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
