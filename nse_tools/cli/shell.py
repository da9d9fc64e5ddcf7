"""What all commands share: the console, common options, errors in one line."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from nse_tools.errors import NSEError

console = Console()

Model = Annotated[str, typer.Option(help="'smollm2-135m', a hub id, a folder or a .gguf file.")]


class errors_in_one_line:  # noqa: N801  (used like a function)
    """Turn errors of the library into one readable line and exit code 2."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, NSEError):
            Console(stderr=True).print(f"[red]{type(error).__name__}[/red]: ", error, markup=True)
            raise typer.Exit(2)
