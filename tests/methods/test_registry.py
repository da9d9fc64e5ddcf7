"""Methods by name, a user's own among them, and in what they differ."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.models import CONTEXTS, FACTS, build, moments_for
from nse_tools import methods
from nse_tools.data.fact_list import FactList
from nse_tools.editing.session import EditSession
from nse_tools.errors import SettingError
from nse_tools.methods import base as registry
from nse_tools.methods.base import Method

OWN = ["nse", "memit", "memit_seq", "alphaedit", "rect", "prune", "rome", "ft", "ft_l"]
DOCS = Path(__file__).parents[2] / "docs" / "methods.md"


@pytest.fixture(autouse=True)
def _registry_as_before() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_BUILDERS", dict(registry._BUILDERS))
        yield


@pytest.mark.parametrize("preset", methods.presets())
@pytest.mark.parametrize("name", OWN)
def test_every_method_can_be_built_by_its_name_for_every_preset(name: str, preset: str) -> None:
    layer = {"layers": (5,)} if (name, preset) == ("ft_l", "llama3-8b") else {}  # no such setting was released
    method = methods.get(name, preset=preset, **layer)
    assert (method.name, method.preset) == (name, preset)
    assert method == getattr(methods, name)(preset, **layer)
    assert methods.from_dict(method.to_dict()) == method


def test_the_relatives_are_memit_with_one_part_changed() -> None:
    for preset in methods.presets():
        memit, seq = methods.memit(preset), methods.memit_seq(preset)
        assert tuple(map(memit.setting, ("values_under", "solver", "ridge"))) == ("current", "least_squares", 0)
        assert set(methods.describe(memit, seq).to_frame().setting) == {"use_previous_keys"}
        assert set(methods.describe(memit, methods.rect(preset)).to_frame().setting) == {"keep_share", "post_process"}
        assert set(methods.describe(memit, methods.prune(preset)).to_frame().setting) == {"compress_base", "post_process"}
        alpha = methods.alphaedit(preset)
        differing = set(methods.describe(seq, alpha).to_frame().setting)
        assert differing == {"solver", "ridge", "mom2_update_weight", "nullspace_threshold", "nullspace_unit"}
        if not preset.startswith("smollm2-135m"):  # as released
            assert tuple(map(alpha.setting, ("nullspace_threshold", "nullspace_unit", "ridge"))) == (0.02, "absolute", 10)
    assert (methods.rect().setting("keep_share"), methods.prune().setting("compress_base")) == (0.4, 1.2)


def test_a_method_of_ones_own_is_found_by_its_name() -> None:
    @methods.register
    def gentle(preset: str | None = "smollm2-135m", **settings: object) -> Method:
        """NSE with a ridge."""
        return methods.build(methods.LocateThenEdit, "gentle", preset, {"ridge": 2.0}, settings)

    assert methods.names()[-1] == "gentle"
    assert methods.get("gentle", passes=3) == methods.nse(ridge=2.0, passes=3, name="gentle")
    assert methods.table().set_index("method").what["gentle"] == "NSE with a ridge."
    with pytest.raises(SettingError, match="already.*replace=True"):
        methods.register(gentle)
    assert methods.register(gentle, replace=True) is gentle
    methods.register(name="other")(gentle)
    assert methods.get("other").name == "gentle"


@pytest.mark.parametrize("name", OWN)
def test_the_librarys_own_methods_stay(name: str) -> None:
    with pytest.raises(SettingError, match=f"{name!r} is a method of the library"):
        methods.register(lambda **s: methods.nse(**s), name=name, replace=True)


def test_what_is_no_method_is_refused() -> None:
    with pytest.raises(SettingError, match="no method 'memitt'. Did you mean 'memit'"):
        methods.get("memitt")
    with pytest.raises(SettingError, match="expected a function"):
        methods.register("gentle")
    methods.register(lambda **settings: settings, name="odd")
    with pytest.raises(SettingError, match="'odd' returned dict, expected a Method"):
        methods.get("odd")
    with pytest.raises(SettingError, match="expected two or more methods"):
        methods.describe("nse")


def test_the_table_of_differences_has_only_what_differs() -> None:
    found = methods.describe("nse", methods.nse(passes=1, kl_factor=0.0), "memit_seq")
    frame = found.to_frame().set_index("setting")
    assert list(frame.columns) == ["nse", "nse (2)", "memit_seq"]
    assert frame.loc["passes"].tolist() == [2, 1, 1]
    assert set(frame.index) == {"passes", "kl_factor", "values_under", "alpha", "upper_bound"}
    assert "passes" in repr(found)
    assert "<table" in found._repr_html_()
    same = methods.describe("nse", "nse")
    assert len(same) == 0
    assert repr(same) == "MethodDifferences(nse, nse: none)"
    assert same._repr_html_()


def test_the_example_of_the_docs_runs_and_edits() -> None:
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), flags=re.DOTALL)
    example = next(b for b in blocks if "methods.register" in b)
    assert len([line for line in example.splitlines() if line.strip()]) <= 20
    names: dict = {}
    exec(example, names)
    name = methods.names()[-1]
    assert name not in OWN
    method = methods.get(name, preset=None, layers=(0, 2), v_num_grad_steps=3)
    model = build("llama")
    session = EditSession(model, method, contexts=CONTEXTS, moments=moments_for(model, (0, 2)), progress=False, value_cache=False)
    done = session.edit(FactList(list(FACTS)[:2]))
    assert done.method is method
    session.undo()


def test_the_docs_name_every_method_and_every_switch() -> None:
    text = DOCS.read_text(encoding="utf-8")
    assert [name for name in OWN if f"`{name}`" not in text] == []
    missing = [
        s for s in methods.nse(None, name="x", layers=(1,)).settings() if f"`{s}`" not in text and not s.startswith("ft_") and s != "name"
    ]
    assert missing == []
