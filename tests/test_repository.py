"""The files around the code hold together: packaging, environment, README, notebooks."""

from __future__ import annotations

import ast
import json
import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def name_of(requirement: str) -> str:
    return re.split(r"[<>=!\[ ]", requirement)[0].lower().replace("_", "-")


def direct() -> set[str]:
    extras = [r for group in PROJECT["optional-dependencies"].values() for r in group]
    return {name_of(r) for r in PROJECT["dependencies"] + extras}


def test_every_direct_dependency_is_pinned_and_nothing_else() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[^ ]+", line) for line in lines)
    assert {name_of(line) for line in lines} == direct()
    assert "torch==2.13.0" in lines


def test_conda_environment_installs_the_project_with_its_extras_under_the_same_constraints() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    pip = next(d["pip"] for d in environment["dependencies"] if isinstance(d, dict))
    assert "-c constraints.txt" in pip
    project = next(p for p in pip if p.startswith("-e "))
    assert set(re.findall(r"\w+", project.split("[")[1])) == set(PROJECT["optional-dependencies"])
    python = next(d for d in environment["dependencies"] if isinstance(d, str) and d.startswith("python="))
    assert tuple(map(int, python.split("=")[1].split("."))) >= tuple(map(int, PROJECT["requires-python"].strip(">=").split(".")))


def test_version_is_the_same_in_package_citation_and_changelog() -> None:
    import nse_tools

    assert PROJECT["dynamic"] == ["version"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == nse_tools.__version__
    newest = re.search(r"^## \[?(\d[^]\s]*)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest
    assert newest[1] == nse_tools.__version__


def test_the_public_vocabulary_can_be_imported() -> None:
    import nse_tools

    for name in nse_tools.__all__:
        assert getattr(nse_tools, name) is not None
    with pytest.raises(AttributeError, match="no attribute"):
        _ = nse_tools.nothing


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda p: p.name)
def test_notebooks_are_stored_without_outputs(path: Path) -> None:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = [c for c in cells if c["cell_type"] == "code"]
    assert code
    assert all(not c["outputs"] and c["execution_count"] is None for c in code)


def test_library_prints_nothing_and_names_no_device() -> None:
    for path in (ROOT / "nse_tools").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert ".cuda()" not in text, path
        calls = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "print"]
        assert not calls, path


def test_public_functions_have_docstrings() -> None:
    for path in (ROOT / "nse_tools").rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            overload = any(isinstance(d, ast.Name) and d.id == "overload" for d in getattr(node, "decorator_list", ()))
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_") and not overload:
                assert ast.get_docstring(node), f"{path.name}: {node.name}"
