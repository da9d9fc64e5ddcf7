"""``nse-tools apply | inspect | verify``: exported edits in a shell."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from nse_tools.cli.shell import Model, console, errors_in_one_line, print_table

if TYPE_CHECKING:
    from nse_tools.io._patch_manifest import SharedEdit

commands = typer.Typer()
PatchPath = Annotated[Path, typer.Argument(metavar="PATCH", help="A file that session.export(…, as_='patch') wrote.")]


@commands.command()
def apply(
    patch: PatchPath,
    out: Annotated[Path, typer.Option(help="Folder for the edited model, which plain transformers loads.")],
    model: Model = "smollm2-135m",
    overwrite: Annotated[bool, typer.Option(help="Replace an earlier export in that folder.")] = False,
) -> None:
    """Apply a patch to a model and write the edited model."""
    from nse_tools.io.export import export_patched
    from nse_tools.io.patch import apply_patch, inspect_patch
    from nse_tools.models.loading import load_model

    with errors_in_one_line():
        inspect_patch(patch)  # before the model is loaded
        wrapped = load_model(model)
        written = export_patched(wrapped, apply_patch(wrapped, patch), out, overwrite=overwrite)
    console.print(escape(repr(written)))
    console.print(f"Written: {escape(str(out))}")


@commands.command()
def inspect(
    path: Annotated[Path, typer.Argument(metavar="PATCH|FOLDER", help="A patch file, or a folder exported as adapter or model.")],
    facts: Annotated[int, typer.Option(help="How many facts to list.")] = 10,
) -> None:
    """Say what an exported edit does to which model, without a model."""
    from nse_tools.io.patch import inspect_patch

    with errors_in_one_line():
        edit = inspect_patch(path)
    _show(edit, facts)


@commands.command()
def verify(patch: PatchPath, model: Model = "smollm2-135m") -> None:
    """Check that a patch is whole, fits a model and gives the result it promises; nothing is written."""
    from nse_tools.io.patch import inspect_patch, verify_patch
    from nse_tools.models.loading import load_model

    with errors_in_one_line():
        inspect_patch(patch)
        wrapped = load_model(model)
        edit = verify_patch(wrapped, patch)
    console.print(escape(repr(edit)))
    console.print(f"It fits {escape(wrapped.name)}, and the result is what it promises, bit for bit.")


def _show(edit: SharedEdit, facts: int) -> None:
    console.print(escape(repr(edit)))
    print_table(edit.to_frame())
    listed = edit.facts_frame()
    print_table(listed.head(facts))
    if len(listed) > facts:
        console.print(f"… and {len(listed) - facts} more facts (--facts {len(listed)})")
