"""The code on the page about going back and forth runs, in its order, and does what its comments say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from helpers.models import build, moments_for
from nse_tools import methods
from nse_tools.data.fact import Fact
from nse_tools.data.fact_list import FactList
from nse_tools.editing.session import EditSession
from nse_tools.tracing.contexts import Contexts

PAGE = (Path(__file__).parents[2] / "docs" / "history.md").read_text(encoding="utf-8")
FACTS = FactList([Fact(str(i), f"Rome {i}", "The city of {} is in", "Japan", target_true="Italy") for i in range(8)])


def test_the_code_runs_and_its_comments_are_true(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = build("llama", "bos")
    method = methods.nse(None, name="nse", layers=(1, 2), v_num_grad_steps=2, mom2_update_weight=2.0)
    session = EditSession(model, method, contexts=Contexts(("",)), moments=moments_for(model, (1, 2)), progress=False)
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names = {"session": session, "facts": FACTS}
    for block in blocks:
        exec(block, names)
    said = re.search(r'approximate\s+# "(.*)"', PAGE).group(1)
    assert session.rounds[1].approximate == said
    assert [batch.ids for batch in session.facts] == [["0", "1"], ["4", "5"], ["6", "7"]]
    assert "dropped" in session.rounds[1].approximate
    assert session.verify().ok
    assert (tmp_path / "runs" / "report.html").stat().st_size > 10_000
