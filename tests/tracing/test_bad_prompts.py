"""Subjects that the tokenizer cannot find, targets of no or very many tokens, prompts that the model has no room for."""

from __future__ import annotations

import copy

import pytest
from tokenizers import normalizers

from helpers.models import CONTEXTS, build, moments_for, tokenizer
from nse_tools import methods
from nse_tools.data.fact import Fact
from nse_tools.editing.session import EditSession
from nse_tools.errors import FactError
from nse_tools.models.editable_model import EditableModel
from nse_tools.tracing.prompts import locate_fact

METHOD = methods.nse(None, name="test", layers=(1,), v_num_grad_steps=2, mom2_update_weight=2.0)


def forgetful(*patterns: str) -> EditableModel:
    """A model whose tokenizer leaves some letters out."""
    model = build("llama")
    model.tokenizer = copy.deepcopy(tokenizer())
    model.tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.Replace(p, "") for p in patterns])
    return model


def session_of(model: EditableModel) -> EditSession:
    return EditSession(model, METHOD, contexts=CONTEXTS, moments=moments_for(model, (1,)), progress=False, value_cache=False)


def test_a_subject_that_the_tokenizer_leaves_out_names_fact_and_letter() -> None:
    model = forgetful("~")
    session = session_of(model)
    with pytest.raises(FactError, match=r"Fact 'odd': the tokenizer has no token for '~', the end of the subject 'Rome~'.*normalizer"):
        session.edit(Fact("odd", "Rome~", "The city of {} is in", "Italy"))
    with pytest.raises(FactError, match="Fact 'odd'"):
        session.edit(Fact("odd", "~~~", "The city of {} is in", "Italy"))
    assert not len(session)
    assert session.edit(Fact("fine", "~Rome", "The city of {} is in", "Italy")).number == 1


def test_a_target_of_no_tokens_names_the_fact() -> None:
    session = session_of(forgetful("~", " "))
    with pytest.raises(FactError, match="Fact 'none': the target '~' tokenizes to nothing"):
        session.edit(Fact("none", "Rome", "The city of {} is in", "~"))
    assert not len(session)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_prompt_that_the_model_has_no_room_for_names_fact_and_lengths(name: str) -> None:
    model = build(name)
    session = session_of(model)
    long = Fact("long", "Rome", "The city of {} is in", " ".join(["x"] * 200))
    with pytest.raises(FactError, match=rf"Fact 'long': .*takes \d+ tokens with its target, and {name} has room for 128"):
        session.edit(long)
    assert not len(session)
    fits = Fact("fits", "Rome", "The city of {} is in", " ".join(["x"] * 40))
    assert session.edit(fits).facts.ids == ["fits"]


def test_a_target_of_two_hundred_tokens_is_edited_where_there_is_room() -> None:
    model = build("llama")
    model.hf.config.max_position_embeddings = 1024  # rotary positions have no table that could end
    fact = Fact("long", "Rome", "The city of {} is in", " ".join(["x"] * 100))
    assert len(locate_fact(model, fact).target_ids) == 200
    done = session_of(model).edit(fact)
    assert done.skipped == {}
    assert done.final_residuals[0] < done.passes[0].layers[1].residuals[0]


def test_the_embedded_models_room_is_read_from_its_config(smollm: EditableModel) -> None:
    assert smollm.n_positions == smollm.hf.config.max_position_embeddings
