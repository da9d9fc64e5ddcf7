"""A comparison's folder: finished cells are read, more can be added, what differs or is damaged is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pandas as pd
import pytest
import torch

from helpers.comparison import FACTS, MEMIT, NSE, contents, run
from helpers.models import build
from nse_tools.comparison import runner as comparison_run
from nse_tools.comparison.result import load_comparison
from nse_tools.comparison.store import sketch
from nse_tools.data.fact import Fact
from nse_tools.data.fact_list import FactList
from nse_tools.errors import SettingError
from nse_tools.steps._value_cache import ValueCache

pytestmark = pytest.mark.usefixtures("small_comparisons")


def test_a_finished_comparison_is_read_not_made_again(tmp_path: Path) -> None:
    cache = ValueCache(tmp_path / "values")
    first = run([NSE, MEMIT], folder=tmp_path / "run", value_cache=cache)
    for file in cache.folder.iterdir():
        os.utime(file, ns=(1, 1))  # a value that is read is marked as used now
    before = contents(tmp_path / "run")
    again = run([NSE, MEMIT], folder=tmp_path / "run", value_cache=cache)
    assert {name: held for name, held in contents(tmp_path / "run").items() if name != "comparison.json"} == {
        name: held for name, held in before.items() if name != "comparison.json"
    }
    assert {f.stat().st_mtime_ns for f in cache.folder.iterdir()} == {1}
    loaded = load_comparison(tmp_path / "run")
    for table in ("scores", "rounds"):
        pd.testing.assert_frame_equal(getattr(again, table), getattr(first, table), check_dtype=False, check_exact=True)
        pd.testing.assert_frame_equal(getattr(loaded, table), getattr(first, table), check_dtype=False, check_exact=True)
    pd.testing.assert_frame_equal(loaded.summary(), first.summary(), check_dtype=False)
    assert loaded.about == first.about
    assert loaded.methods == first.methods
    assert set(loaded.scores.fact) == {"007", "NA", "c", "d"}


def test_other_facts_settings_or_model_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    run([NSE], folder=tmp_path)
    before = contents(tmp_path)
    changed = FactList([*FACTS[:3], Fact("d", "Berlin", "The capital, {}, plays the", "Rome", "piano")])
    for options, said in [
        ({"facts": FACTS[:3]}, r"facts\.n is 4 there, 3 here"),
        ({"facts": changed}, r"facts\.digest is"),
        ({"rounds_of": 1}, "rounds_of is 2 there, 1 here"),
        ({"test_at": 2}, r"test_at is \[1, 2\] there"),
        ({"shuffle": True}, "shuffle is False there"),
        ({"model": build("llama", "bos", seed=2)}, "model_fingerprint"),
    ]:
        with pytest.raises(SettingError, match=said):
            run([NSE], folder=tmp_path, **options)
    with pytest.raises(SettingError, match="other settings of 'nse': passes is 2 there, 1 here"):
        run([NSE.with_(passes=1)], folder=tmp_path)
    after = contents(tmp_path)
    assert {name: held[0] for name, held in after.items()} == {name: held[0] for name, held in before.items()}


def test_a_cell_older_than_a_setting_was_made_with_its_default(tmp_path: Path) -> None:
    made = run([NSE], folder=tmp_path)
    (about,) = (tmp_path / "cells").glob("*/cell.json")
    cell = json.loads(about.read_text())
    assert cell["method"]["apply"].pop("max_update_norm") == 100
    about.write_text(json.dumps(cell))
    assert run([NSE], folder=tmp_path).scores.equals(made.scores)  # read, not made again
    with pytest.raises(SettingError, match="max_update_norm is 100.0 there, 5.0 here"):
        run([NSE.with_(max_update_norm=5.0)], folder=tmp_path)


def test_a_cell_with_settings_of_another_version_is_refused(tmp_path: Path) -> None:
    run([MEMIT], folder=tmp_path)
    (about,) = (tmp_path / "cells").glob("*/cell.json")
    cell = json.loads(about.read_text())
    cell["method"]["a_setting_of_another_version"] = 1
    about.write_text(json.dumps(cell))
    with pytest.raises(SettingError, match="memit-seed0: expected settings of this version"):
        run([MEMIT], folder=tmp_path)


def test_methods_and_seeds_can_be_added_later(tmp_path: Path) -> None:
    run([MEMIT], folder=tmp_path)
    both = run([NSE, MEMIT], folder=tmp_path, seeds=(0, 1))
    assert both.rounds.method.unique().tolist() == ["nse", "memit"]
    loaded = load_comparison(tmp_path)
    assert list(loaded.methods) == ["memit", "nse"]
    assert loaded.seeds == [0, 1]
    assert run([NSE], folder=tmp_path).rounds.method.unique().tolist() == ["nse"]


def test_other_key_statistics_than_those_of_finished_cells_are_refused(tmp_path: Path) -> None:
    run([MEMIT], folder=tmp_path)
    noted = tmp_path / "seeds" / "seed0.json"
    data = json.loads(noted.read_text())
    data["moments"]["2"] = "0" * 32
    data["sketches"]["2"][3] *= 1.001
    noted.write_text(json.dumps(data))
    with pytest.raises(SettingError, match="seed 0: the key statistics C of layers 2"):
        run([NSE, MEMIT], folder=tmp_path)


def test_a_comparison_goes_on_where_numbers_are_rounded_in_another_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run([MEMIT], folder=tmp_path)
    noted = tmp_path / "seeds" / "seed0.json"
    data = json.loads(noted.read_text())
    data["moments"]["2"] = "0" * 32  # as if other bits had come out
    noted.write_text(json.dumps(data))
    monkeypatch.setattr(comparison_run, "sample_corpus", lambda *_, **__: pytest.fail("the text of the folder was not used"))
    both = run([NSE, MEMIT], folder=tmp_path)
    assert both.rounds.method.unique().tolist() == ["nse", "memit"]
    assert "up to rounding" in caplog.text
    assert json.loads(noted.read_text()) == data  # what the finished cells were made with stays noted


def test_a_sketch_tells_matrices_apart() -> None:
    draw = torch.Generator().manual_seed(0)
    keys = torch.randn(50, 20, generator=draw)
    moments = keys.T @ keys / 50
    expected = []
    directions = torch.randn(20, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for column in directions.T:
        unit = column / column.norm()
        expected.append(sum(float(unit[i] * moments[i, j].double() * unit[j]) for i in range(20) for j in range(20)))
    assert sketch(moments) == pytest.approx(expected, rel=1e-10)


def test_noted_contexts_are_used_again(tmp_path: Path) -> None:
    run([MEMIT], folder=tmp_path)
    noted = tmp_path / "seeds" / "seed0.json"
    data = json.loads(noted.read_text())
    data["contexts"] = ["", "The city of. "]
    noted.write_text(json.dumps(data))
    other = run([NSE], folder=tmp_path)
    assert other.ends().efficacy_magnitude[0] != run([NSE]).ends().efficacy_magnitude[0]


def test_damaged_and_missing_files_are_said(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="holds no comparison"):
        load_comparison(tmp_path)
    run([NSE, MEMIT.with_(name="../odd name")], folder=tmp_path / "run")
    places = sorted(f.name for f in (tmp_path / "run" / "cells").iterdir())
    assert len(places) == 2
    assert places[0].startswith("_odd_name-")
    file = tmp_path / "run" / "cells" / "nse-seed0" / "scores.csv"
    file.write_text(file.read_text().replace("007", "008"))
    with pytest.raises(SettingError, match=r"nse-seed0 is damaged \(scores.csv changed"):
        load_comparison(tmp_path / "run")
    with pytest.raises(SettingError, match="damaged"):
        run([NSE], folder=tmp_path / "run")


def test_an_unfinished_cell_is_not_read(tmp_path: Path) -> None:
    run([NSE], folder=tmp_path)
    scratch = tmp_path / "cells" / ".writing-x" / "new"
    scratch.mkdir(parents=True)
    (scratch / "cell.json").write_text("{")
    assert list(load_comparison(tmp_path).methods) == ["nse"]


def test_the_manifest_says_what_was_compared(tmp_path: Path) -> None:
    run([NSE], folder=tmp_path)
    about = json.loads((tmp_path / "comparison.json").read_text())
    assert about["machine"]["threads"] == str(torch.get_num_threads())
    assert about["facts"]["ids"] == FACTS.ids
    assert set(about["versions"]) == {"nse_tools", "torch", "transformers", "nnsight"}
