"""CONTRIBUTING.md's map of the code is right: every path exists, and every name is defined in its file."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
PLACES = re.findall(r"^\| [^|]+\| `([\w/.]+)` \| (?:`([\w.]+)`)? ?\|$", PAGE, re.MULTILINE)
PATHS = sorted(set(re.findall(r"`((?:nse_tools|tests|docs|benchmarks|notebooks|\.github)/[\w/.]*|\w+\.(?:md|cff|txt))`", PAGE)))


def definitions(path: Path) -> set[str]:
    """Return the names that a file defines: functions, classes, their methods as Class.method."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
            if isinstance(node, ast.ClassDef):
                names |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
    return names


@pytest.mark.parametrize(("path", "name"), PLACES)
def test_a_question_of_the_map_is_answered_where_it_says(path: str, name: str) -> None:
    assert (ROOT / path).is_file()
    assert not name or name in definitions(ROOT / path)


def test_every_path_exists_except_placeholders() -> None:
    assert [path for path in PATHS if not (ROOT / path).exists() and path != "docs/NAME.md"] == []


@pytest.mark.parametrize(
    "question",
    ["optimiser of step 1", "neuron score", "α band", "AlphaEdit's projection", "weight written", "undo happen", "forgetting matrix"],
)
def test_the_questions_of_a_stranger_are_on_the_map(question: str) -> None:
    assert question in "\n".join(row for row in PAGE.splitlines() if row.startswith("| Where"))


def test_every_package_is_on_the_map() -> None:
    packages = {path.parent.name for path in (ROOT / "nse_tools").glob("*/__init__.py")}
    assert packages <= set(re.findall(r"^\| `nse_tools/(\w+)/` \|", PAGE, re.MULTILINE))
