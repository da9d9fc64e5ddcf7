"""A hundred sequential edits, at full length: `make test-long`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nse_tools import methods
from nse_tools.data.bundled import known_facts
from nse_tools.data.fact_list import FactList
from nse_tools.data.readers import load_facts
from nse_tools.figures.save import StreamResult, run_stream
from nse_tools.models.editable_model import EditableModel

pytestmark = [pytest.mark.long, pytest.mark.timeout(3600)]
COUNTERFACT = Path(__file__).parents[2] / ".." / "shared" / "data" / "counterfact_200.json"


@pytest.fixture(autouse=True)
def _two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def stream(model: EditableModel, facts: FactList, method: str = "nse") -> StreamResult:
    result = run_stream(model, facts, getattr(methods, method)(), progress=False)
    result.session.rewind(to=0)
    return result


def test_world_is_kept_and_better_than_with_memit(smollm: EditableModel) -> None:
    facts = known_facts()[:100]
    nse = stream(smollm, facts).scores.set_index("round")
    memit = stream(smollm, facts, "memit").scores.set_index("round")
    assert nse.score[5] > 85
    assert nse.efficacy_accuracy[5] >= 97
    assert nse.score[5] > memit.score[5]
    assert nse.efficacy_accuracy[5] >= memit.efficacy_accuracy[5]


@pytest.mark.skipif(not COUNTERFACT.exists(), reason="the CounterFact records are not part of the repository")
def test_counterfact_reaches_what_the_released_code_reached(smollm: EditableModel) -> None:
    last = stream(smollm, load_facts(COUNTERFACT)[:100]).scores.iloc[-1]
    assert last.score >= 82
