"""Build the documentation site into a folder: `make docs`, or `make docs QUICK=1` without executing notebooks."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from sphinx.cmd.build import main as sphinx

from executed import execute

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

log = logging.getLogger("docs")


def build(out: Path, kept: Path, *, quick: bool = False) -> int:
    """Build the site.

    Parameters
    ----------
    out : Path
        Where the site is written.
    kept : Path
        Where executed notebooks are kept from one build to the next.
    quick : bool
        Execute nothing; notebooks whose executed copy is kept for this very code are shown with their outputs all the same.

    Returns
    -------
    int
        0, or sphinx's exit code; a warning (a link that leads nowhere, for one) is an error.
    """
    if not quick:
        for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):
            execute(notebook, kept)
    options = [
        "-c",
        str(HERE),
        "-d",
        str(out.parent / f".{out.name}-read"),
        "-D",
        f"nse_executed={kept}",
        "--fail-on-warning",
        "--keep-going",
    ]
    return sphinx(["-q", *options, str(ROOT), str(out)])


def main(arguments: list[str] | None = None) -> int:
    """Read the command line and build."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "site")
    parser.add_argument("--kept", type=Path, default=ROOT / "build" / "notebooks", help="where executed notebooks are kept")
    parser.add_argument("--quick", action="store_true", help="execute no notebook")
    asked = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    code = build(asked.out.resolve(), asked.kept.resolve(), quick=asked.quick)
    if code == 0:
        log.info("open %s", asked.out / "index.html")
    return code


if __name__ == "__main__":
    sys.exit(main())
