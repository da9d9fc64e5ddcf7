"""What the runs measure besides the scores, each a table of a session as of a number of rounds (:func:`nse_tools.compare`'s ``also``)."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import pandas as pd
import torch
from torch import Tensor

from nse_tools.data.fact import Fact
from nse_tools.data.fact_list import FactList
from nse_tools.editing.edit_round import EditRound
from nse_tools.editing.session import EditSession
from nse_tools.metrics.drift import hidden_shift
from nse_tools.metrics.forgetting import round_scores
from nse_tools.metrics.forgotten_facts import relative_push
from nse_tools.metrics.generation import ReferenceTexts, consistency, fluency, generate_texts, session_texts
from nse_tools.metrics.neuron_reports import round_update
from nse_tools.metrics.scores import NEIGHBORHOOD, REWRITE
from nse_tools.models.editable_model import EditableModel

WITH_TEXTS = ("answers", "shift")
"""The tables that quote facts: prompts, targets."""
_EARLY = 20
"""Facts of the first round that are asked again and again."""
_NEW_TOKENS = 6
_PROMPTS = 40
_WRITTEN = 50


def answers(session: EditSession, round: int) -> pd.DataFrame:
    """Ask the first round's first facts, after round 1 also as the unedited model answered them.

    Columns ``round``, ``fact``, ``prompt``, ``target_true``, ``target_new``, ``answer`` (what the model goes on with, the likeliest
    token each time), ``success`` (p_new > p_true) and ``accuracy`` (all tokens of the new target are the likeliest).
    """
    asked_at = {0: (), 1: (0, 1)}.get(round, (round,))
    return pd.concat([_answers(session, t) for t in asked_at], ignore_index=True) if asked_at else pd.DataFrame()


def _answers(session: EditSession, round: int) -> pd.DataFrame:
    asked = session.facts[0][:_EARLY]
    found = round_scores(session, round, session.facts[0], kinds=(REWRITE,)).prompts.set_index("fact").loc[asked.ids]
    with session.at(round) as model:
        said = [_goes_on(model, fact) for fact in asked]
    return pd.DataFrame(
        {
            "round": round,
            "fact": asked.ids,
            "prompt": [fact.text for fact in asked],
            "target_true": [fact.target_true for fact in asked],
            "target_new": [fact.target_new for fact in asked],
            "answer": said,
            "success": found.success.to_numpy(),
            "accuracy": found.accuracy.to_numpy(),
        }
    )


def _goes_on(model: EditableModel, fact: Fact) -> str:
    length = len(model.encode(fact.text).ids) + _NEW_TOKENS
    # one fact at a time: rows of one length need no padding, and the texts do not depend on which facts are asked
    text = generate_texts(model, [replace(fact, generation=(fact.text,))], max_tokens=length, top_k=1).texts.text.iloc[0]
    return " ".join(str(text).removeprefix(fact.text).split())


def drift(session: EditSession, round: int) -> pd.DataFrame:
    """Return how far neutral text and weights have moved (:meth:`Drift.to_frame`)."""
    return session.drift(round=round).to_frame()


def ability(session: EditSession, round: int) -> pd.DataFrame:
    """Return the general ability at our own tasks (:attr:`AbilityScores.table`); the extra ``[ability]`` is needed."""
    return session.ability(rounds=[round]).table


def shift(session: EditSession, round: int) -> pd.DataFrame:
    """Return where neighbours of the first round's facts stand before all edits and now (:meth:`HiddenShift.to_frame`), as of ``as_of``.

    ``edited`` says whether a prompt names an edited subject, as in :func:`neighbors`: only the others were left alone.
    """
    owners = {text: fact.id for fact in reversed(session.facts[0]) for text in reversed(fact.neighborhood)} if round else {}
    asked = list(reversed(owners))[:_PROMPTS]
    if len(asked) < 3:
        return pd.DataFrame()
    found = hidden_shift(session, asked, rounds=(0, round))
    shares = dict(zip(("explained1", "explained2"), found.explained, strict=True))
    table = found.to_frame().rename(columns={"round": "as_of"}).assign(**shares)
    edited = _names_edited(session, round)
    return table.assign(edited=[edited(owners[prompt], prompt) for prompt in table.prompt])


def neighbors(session: EditSession, round: int) -> pd.DataFrame:
    """Return specificity apart for neighbour prompts that name a subject edited by then (``edited``) and those that do not.

    Columns ``round``, ``edited``, ``prompts`` (how many), ``success`` and ``accuracy`` (percent, means over prompts) and the same of the
    unedited model on the same prompts, ``success_before`` and ``accuracy_before``. A prompt counts as edited if it holds, as whole words,
    the subject of an edited fact of the same relation (of any fact, where facts have no relation): an edit of that subject to
    another target cannot leave the true one as likely as it was, so that what a method spoils shows in the others only.
    """
    if not round:
        return pd.DataFrame()
    now, before = (_on_neighbors(session, t, round) for t in (round, 0))
    if now.empty:
        return pd.DataFrame()
    edited = _names_edited(session, round)
    table = now.join(before, rsuffix="_before").reset_index()
    found = table.groupby([edited(fact, prompt) for fact, prompt in zip(table.fact, table.prompt, strict=True)])
    means = 100 * found[["success", "accuracy", "success_before", "accuracy_before"]].mean()
    return means.assign(round=round, prompts=found.size()).rename_axis("edited").reset_index()


def _on_neighbors(session: EditSession, round: int, upto: int) -> pd.DataFrame:
    prompts = round_scores(session, round, _facts_at(session, upto)).prompts
    own = prompts[prompts.kind == NEIGHBORHOOD]
    return own.drop_duplicates(["fact", "prompt"]).set_index(["fact", "prompt"])[["success", "accuracy"]].astype(float)


def _facts_at(session: EditSession, round: int) -> FactList:
    return FactList(fact for batch in session.facts_at(round) for fact in batch)


def _names_edited(session: EditSession, round: int) -> Callable[[str, str], bool]:
    """Return what tells, of a fact's prompt, whether it names the subject of an edited fact of the same relation."""
    subjects: dict[str | None, set[str]] = defaultdict(set)
    relations = {}
    for fact in _facts_at(session, round):
        relations[fact.id] = fact.relation
        subjects[fact.relation].add(fact.subject)
    named = {relation: _any_of(found) for relation, found in subjects.items()}
    return lambda fact, prompt: bool(named[relations[fact]].search(prompt))


def _any_of(words: Iterable[str]) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, sorted(words)))})(?!\w)")


def effects(session: EditSession, round: int) -> pd.DataFrame:
    """Return what later rounds together did to each earlier fact, at its key: means over the edited layers.

    ``disturbed`` is ‖(W_t − W_s) k‖ / ‖(W_s − W_{s−1}) k‖, how much later rounds changed the layer's output for the fact's key
    relative to what its own round s did; ``along`` is the part of that change along the own round's (−1: undone); ``reuse`` is in
    how many later rounds the neurons that the fact uses were written again, their squared activations the weights.
    """
    made = session.rounds[:round]
    if len(made) < 2:
        return pd.DataFrame()
    parts = [_effects_at(made, layer) for layer in session.method.edited_layers]
    return pd.concat(parts).groupby(["fact", "edited_in_round"], sort=False, as_index=False).mean()


def _effects_at(made: Sequence[EditRound], layer: int) -> pd.DataFrame:
    """Return :func:`effects` at one layer, walking back from the last round, so that later changes add up on the way."""
    shape = round_update(made[-1], layer).shape
    later, rewritten = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape[1], dtype=torch.float64)
    tables = []
    for done in reversed(made):
        delta, keys = round_update(done, layer), done.final_keys[layer].matrix.double()
        if done.number < made[-1].number:
            tables.append(_of_round(done, keys, keys @ delta.T, keys @ later.T, rewritten))
        later += delta
        rewritten += (delta != 0).any(dim=0)
    return pd.concat(tables[::-1], ignore_index=True)


def _of_round(done: EditRound, keys: Tensor, own: Tensor, later: Tensor, rewritten: Tensor) -> pd.DataFrame:
    disturbed, along = relative_push(later, own)
    share = keys.square() / keys.square().sum(1, keepdim=True)
    return pd.DataFrame(
        {
            "fact": done.facts.ids,
            "edited_in_round": done.number,
            "disturbed": disturbed.tolist(),
            "along": along.tolist(),
            "reuse": (share @ rewritten).tolist(),
        }
    )


def written(session: EditSession, round: int, references: ReferenceTexts | None = None) -> pd.DataFrame:
    """Return how the model writes about edited facts, now and before all edits: one row per fact.

    Columns ``fact``, ``fluency`` (bits, :func:`nse_tools.metrics.generation`), ``fluency_before`` and, with reference texts,
    ``consistency`` and ``consistency_before`` (cosine). Asked are up to 50 of the facts so far that have a generation prompt,
    evenly spread over them, each by its first one.
    """
    writing = [replace(fact, generation=fact.generation[:1]) for fact in _facts_at(session, round) if fact.generation]
    if not writing:
        return pd.DataFrame()
    asked = writing[:: -(-len(writing) // _WRITTEN)]
    now, before = (_written(session, t, asked, references) for t in (round, 0))
    return now.join(before, rsuffix="_before").reset_index()


def _written(session: EditSession, round: int, facts: Sequence[Fact], references: ReferenceTexts | None) -> pd.DataFrame:
    texts = session_texts(session, round, facts)
    table = fluency(texts).texts.set_index("fact")[["fluency"]]
    return table if references is None else table.join(consistency(texts, facts, references).facts.set_index("fact").consistency)


def times(session: EditSession, round: int) -> pd.DataFrame:
    """Return the seconds of the newest round by step: ``step``, ``seconds``, and how many of its ``facts`` had a ``cached`` value."""
    if not round:
        return pd.DataFrame()
    done = session.rounds[round - 1]
    table = pd.DataFrame(done.seconds.items(), columns=["step", "seconds"])
    return table.assign(facts=len(done.facts), cached=sum(done.values.cached))


def values(session: EditSession, round: int) -> pd.DataFrame:
    """Return the course of a round's value optimisation, one row per fact and step (:attr:`TargetValues.trace`)."""
    return session.rounds[round - 1].values.trace if round else pd.DataFrame()


def residuals(session: EditSession, round: int) -> pd.DataFrame:
    """Return the facts' distances to their targets before every update of a round (:meth:`EditRound.residuals`)."""
    return session.rounds[round - 1].residuals() if round else pd.DataFrame()


def neurons(session: EditSession, round: int) -> pd.DataFrame:
    """Return the neurons' scores at a round's first layer (:meth:`NeuronSelection.to_frame`)."""
    return session.rounds[round - 1].selection(session.method.layers[0]).to_frame() if round else pd.DataFrame()


def updates(session: EditSession, round: int) -> pd.DataFrame:
    """Return a round's updates, one row per pass and layer (:meth:`EditRound.to_frame`)."""
    return session.rounds[round - 1].to_frame() if round else pd.DataFrame()
