"""README and docs hold together: links lead somewhere, code parses and names what there is, commands have their options."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

import nse_tools
from helpers.pages import PAGES, ROOT, blocks, label, prose
from nse_tools import errors
from nse_tools.cli import app

LINK = re.compile(r"\]\((?!\w+:)([^)#\s]*)(?:#([^)\s]+))?\)")
NAME = re.compile(r"(?<![\w.])nse\.(\w+(?:\.\w+)*)")
every_page = pytest.mark.parametrize("page", PAGES, ids=label)


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in LINK.findall(prose(page)):
        there = page.parent / target if target else page
        assert there.exists(), f"{label(page)}: {target}"
        assert not anchor or anchor in anchors(there), f"{label(page)}: {target}#{anchor}, of {sorted(anchors(there))}"


@every_page
def test_python_parses_and_marks_are_known(page: Path) -> None:
    for block in blocks(page):
        assert block.mark in ("", "run", "run: edited", "run: long", "raises")
        assert not block.mark or block.kind == "python"
        assert (block.mark == "raises") == bool(block.says)
        if block.kind == "python":
            ast.parse(block.code)


@every_page
def test_names_of_the_library_exist(page: Path) -> None:
    for path in NAME.findall(page.read_text(encoding="utf-8")):
        found: Any = nse_tools
        for part in path.split("."):
            assert hasattr(found, part), f"{label(page)}: nse.{path}"
            found = getattr(found, part)


def commands() -> Iterator[tuple[Path, list[str]]]:
    """Yield what is to be typed into a shell, from blocks and within lines."""
    for page in PAGES:
        lines = [line for block in blocks(page) if block.kind != "python" for line in block.code.splitlines()]
        for line in [*lines, *re.findall(r"`([^`\n]+)`", prose(page))]:
            if re.match(r"(nse-tools|make|python) [\w./-]", line.strip()):
                yield page, shlex.split(line, comments=True)


def options_of(script: Path) -> set[str]:
    """Return the options that a script reads."""
    return set(re.findall(r"\"(--[\w-]+)\"", script.read_text(encoding="utf-8")))


def check_command(words: list[str]) -> None:
    """Raise if a program, target, script or option does not exist."""
    given = {word.split("=")[0] for word in words if word.startswith("-") and word != "-m"}
    if words[0] == "make":
        targets = set(re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
        assert {word for word in words[1:] if "=" not in word} <= targets
    elif words[0] == "python":
        script = words[2].replace(".", "/") + ".py" if words[1] == "-m" else words[1]
        assert given <= options_of(ROOT / script), script
    else:
        command: Any = typer.main.get_command(app)
        for word in words[1:]:
            if not hasattr(command, "commands"):
                break
            command = command.commands[word]
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        assert given <= known, sorted(known)


def test_commands_and_their_options_exist() -> None:
    found = list(commands())
    assert {words[0] for _, words in found} == {"nse-tools", "make", "python"}
    for page, words in found:
        try:
            check_command(words)
        except (AssertionError, LookupError, OSError) as wrong:
            pytest.fail(f"{label(page)}: {shlex.join(words)}: {wrong!r}")


@pytest.mark.parametrize("line", ["make cofee", "nse-tools demo --no-such", "nse-tools brew", "python benchmarks/run_all.py --no-such"])
def test_a_command_that_does_not_exist_is_noticed(line: str) -> None:
    with pytest.raises((AssertionError, LookupError)):
        check_command(shlex.split(line))


def test_every_namespace_is_in_the_reference() -> None:
    page = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^   nse_tools\.(\w+)$", page, re.MULTILINE))
    public = {path.parent.name for path in (ROOT / "nse_tools").glob("*/__init__.py")} - {"cli"}
    assert public <= listed


def test_every_error_has_a_section_with_an_example() -> None:
    page = ROOT / "docs" / "errors.md"
    classes = {c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.NSEError)} - {errors.NSEError}
    titles = re.findall(r"^## (\w+Error)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(titles) == sorted(c.__name__ for c in classes)
    assert set(titles) <= {block.says.split(":")[0] for block in blocks(page) if block.mark == "raises"}


def test_every_page_is_listed_in_the_index_and_its_toctree() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    listed = set(index.split("```{toctree}", 1)[1].split())
    for page in (ROOT / "docs").glob("*.md"):
        assert page.stem == "index" or page.stem in listed
        assert page.stem == "index" or f"]({page.name})" in index
    for notebook in (ROOT / "notebooks").glob("*.ipynb"):
        assert f"../notebooks/{notebook.stem}" in listed
        assert f"](../notebooks/{notebook.name})" in index


def test_a_word_of_the_glossary_is_defined_once() -> None:
    words = re.findall(r"^\*\*([^*]+)\*\*", (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(words) > 30
    assert len(set(words)) == len(words)
