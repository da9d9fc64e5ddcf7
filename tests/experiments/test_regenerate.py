"""The stored figures are those of the stored results, and are drawn without a model."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch

from experiments.regenerate import PANELS, STORED, figure_data, main, read_data, regenerate
from nse_tools import plots
from nse_tools.errors import NSEError, SettingError
from nse_tools.figures.paper import FIGURES

ROOT = Path(__file__).parents[2]
RESULTS, IMAGES = ROOT / "docs" / "results", ROOT / "docs" / "images"


def same(found: object, stored: object) -> bool:
    """Whether two pieces of JSON are equal, numbers up to rounding."""
    if isinstance(found, dict) and isinstance(stored, dict):
        return found.keys() == stored.keys() and all(same(found[k], stored[k]) for k in found)
    if isinstance(found, list) and isinstance(stored, list):
        return len(found) == len(stored) and all(map(same, found, stored))
    if isinstance(found, float) or isinstance(stored, float):
        return found == pytest.approx(stored, rel=1e-9)
    return found == stored


@pytest.mark.parametrize("name", list(STORED))
def test_the_stored_figure_is_that_of_the_stored_results(name: str) -> None:
    stored = dict(read_data(IMAGES)[name])
    assert stored.pop("reads") == STORED[name].sources(RESULTS), f"make figures: {name} was drawn from other results"
    assert same(json.loads(json.dumps(figure_data(STORED[name].figure(RESULTS)))), stored), f"make figures: {name} is drawn otherwise now"
    assert (IMAGES / f"{name}.png").read_bytes()[:4] == b"\x89PNG"


def test_every_picture_shown_is_regenerated_and_every_one_stored_is_shown() -> None:
    shown = set()
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        shown |= {Path(target).stem for target in re.findall(r"images/([\w.-]+\.png)", page.read_text(encoding="utf-8"))}
    assert shown == set(STORED)
    assert set(FIGURES) - shown == set(PANELS)
    assert {p.name for p in IMAGES.iterdir()} == {"figures.json", *(f"{name}.png" for name in STORED)}
    assert set(read_data(IMAGES)) == set(STORED)


def test_the_gallery_names_every_plot() -> None:
    listed = set(re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / "plots.md").read_text(encoding="utf-8"), re.MULTILINE))
    others = {"COLORS", "COLUMN", "DARK", "TEMPLATE", "at_width", "dark", "export", "export_all", "skipped_facts"}
    assert listed == set(plots.__all__) - others


def test_the_comparison_of_json_notices_a_changed_number() -> None:
    assert same({"a": [1.0, "x"]}, {"a": [1.0 + 1e-12, "x"]})
    assert not same({"a": [1.0]}, {"a": [1.001]})
    assert not same({"a": [1.0]}, {"a": [1.0, 2.0]})


def test_a_changed_result_changes_figure_and_hash(tmp_path: Path) -> None:
    shutil.copytree(RESULTS, tmp_path / "results")
    file = tmp_path / "results" / "world_nse.csv"
    table = pd.read_csv(file)
    table.loc[5, "score"] = 12.5
    table.to_csv(file, index=False)
    written = regenerate(tmp_path / "results", tmp_path / "out", ["world_scores"], pictures=False)
    assert [f.name for f in written] == ["figures.json"]
    new, old = (read_data(folder)["world_scores"] for folder in (tmp_path / "out", IMAGES))
    assert 12.5 in new["data"][0]["y"]
    assert new["reads"]["world_nse.csv"] != old["reads"]["world_nse.csv"]
    assert new["reads"]["world_memit.csv"] == old["reads"]["world_memit.csv"]


def test_no_model_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a model was made")

    monkeypatch.setattr(torch.nn.Module, "__init__", refuse)
    regenerate(RESULTS, tmp_path, ["world_scores", "forgetting_lost", "ablation"], pictures=False)
    regenerate(RESULTS, tmp_path, ["reported"], pictures=False)
    assert set(read_data(tmp_path)) == {"world_scores", "forgetting_lost", "ablation", "reported"}


def test_the_shell_writes_the_data_and_says_errors_in_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["world_scores", "--results", str(RESULTS), "--out", str(tmp_path), "--no-pictures"]) == 0
    assert set(read_data(tmp_path)) == {"world_scores"}
    assert main(["world_scors", "--results", str(RESULTS)]) == 2
    assert "Did you mean 'world_scores'" in caplog.text
    assert main(["--results", str(tmp_path), "--out", str(tmp_path)]) == 2
    assert "expected the folder of stored results" in caplog.text
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    assert left.value.code == 0
    assert "world_residuals" in capsys.readouterr().out


def test_where_pictures_cannot_be_drawn_the_data_stay_those_of_the_old_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise NSEError("no browser")

    (tmp_path / "figures.json").write_text("{}")
    monkeypatch.setattr(plots, "export_all", fail)
    with pytest.raises(NSEError, match="no browser"):
        regenerate(RESULTS, tmp_path, ["world_scores"])
    assert (tmp_path / "figures.json").read_text() == "{}"


def test_missing_results_are_named(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=re.escape("world_nse.csv, world_memit.csv")):
        regenerate(tmp_path, tmp_path, ["world_scores"])
