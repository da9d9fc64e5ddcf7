"""Orders of facts by name, with the keys of a model."""

from __future__ import annotations

import pytest
import torch

from helpers.models import CONTEXTS, FACTS, build
from nse_tools.editing.ordering import order_facts, packed_order, spread_order
from nse_tools.errors import SettingError
from nse_tools.steps.keys import collect_keys


def test_orders_by_name() -> None:
    model = build("llama")
    assert order_facts(FACTS) == FACTS
    assert order_facts(FACTS, "shuffled", seed=3) == FACTS.shuffled(3)
    keys = collect_keys(model, FACTS, CONTEXTS, 2).matrix.numpy()
    for policy, order in (("packed", packed_order), ("spread", spread_order)):
        found = order_facts(FACTS, policy, model=model, contexts=CONTEXTS, layer=2)
        assert found.ids == [FACTS[row].id for row in order(keys)]
        assert found.name == FACTS.name


def test_keys_are_those_of_the_unedited_model() -> None:
    model = build("llama")
    model.originals.keep([1])
    expected = order_facts(FACTS, "packed", model=model, layer=2)
    model.weight(1).add_(torch.randn(model.weight(1).shape, generator=torch.Generator().manual_seed(0)))
    edited = packed_order(collect_keys(model, FACTS, CONTEXTS, 2).matrix.numpy())
    assert order_facts(FACTS, "packed", model=model, layer=2) == expected
    assert expected.ids != [FACTS[row].id for row in edited]


def test_what_is_missing_is_said() -> None:
    with pytest.raises(SettingError, match="Did you mean 'packed'"):
        order_facts(FACTS, "packd")
    with pytest.raises(SettingError, match="expected a model and a layer"):
        order_facts(FACTS, "spread")
