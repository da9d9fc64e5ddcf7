"""How many tokens a round runs, and how long its rows are: typical ones, or counted from given facts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from nse_tools.data.fact import Fact
from nse_tools.methods.base import Method
from nse_tools.models.editable_model import EditableModel
from nse_tools.steps._value_optimizer import SearchRow, search_rows
from nse_tools.tracing._engine.prefix_cache import common_heads, lay_out
from nse_tools.tracing.contexts import Contexts
from nse_tools.tracing.prompts import continued, lead_of, locate_fact


@dataclass(frozen=True)
class Tokens:
    """Tokens that are run, and the pairs (query, key) that attention looks at: with tokens run along, and with cached ones.

    Attention over n tokens is counted as n² pairs, as it is computed, although half of them are masked.
    """

    tokens: float
    own: float
    cached: float = 0.0

    @classmethod
    def of(cls, lengths: Iterable[int], before: Iterable[int] | None = None) -> Tokens:
        """Sum over rows of given lengths, each behind so many cached tokens."""
        lengths = list(lengths)
        behind = [0] * len(lengths) if before is None else list(before)
        return cls(sum(lengths), sum(n * n for n in lengths), sum(n * b for n, b in zip(lengths, behind, strict=True)))

    def __mul__(self, factor: float) -> Tokens:
        return Tokens(self.tokens * factor, self.own * factor, self.cached * factor)

    def __add__(self, other: Tokens) -> Tokens:
        return Tokens(self.tokens + other.tokens, self.own + other.own, self.cached + other.cached)


@dataclass(frozen=True)
class Load:
    """The rows of a value search: what is recorded once, and what every step runs.

    Parameters
    ----------
    prefix, suffix : Tokens
        Tokens before the subject's last one, and from it on.
    predictions : float
        Places where logits are taken: target tokens in every context, and one for the KL term.
    once : Tokens
        Tokens that are run for the prefixes: beginnings that rows share count once.
    rows : float
        Number of rows.
    longest : int
        Tokens of the longest prefix, to which the cached keys and values of all rows are padded.
    """

    prefix: Tokens
    suffix: Tokens
    predictions: float
    once: Tokens
    rows: float = 0
    longest: int = 0

    def __mul__(self, factor: float) -> Load:
        return replace(
            self,
            prefix=self.prefix * factor,
            suffix=self.suffix * factor,
            predictions=self.predictions * factor,
            once=self.once * factor,
            rows=self.rows * factor,
        )

    @property
    def whole(self) -> Tokens:
        """All tokens of all rows as whole prompts."""
        own = self.prefix.own + self.suffix.own + 2 * self.suffix.cached
        return Tokens(self.prefix.tokens + self.suffix.tokens, own)


def load(facts: int, contexts: int, prefix: int, suffix: int, targets: int, essence_prefix: int = 3, head: int = 0) -> Load:
    """Return the load of facts whose rows all have the same lengths.

    Parameters
    ----------
    facts, contexts : int
        Facts, and prompts of each (the KL term's prompt comes on top).
    prefix, suffix : int
        Tokens before the subject's last one, and from it on (the target's last token is not run).
    targets : int
        Tokens of the target.
    essence_prefix : int
        Tokens before the subject's last one in the KL term's prompt.
    head : int
        Tokens that all facts' prefixes in a context begin with.
    """
    before = [prefix] * contexts + [essence_prefix]
    rests = Tokens.of([prefix - head] * contexts + [essence_prefix], [head] * contexts + [0])
    prefixes, suffixes = Tokens.of(before), Tokens.of([suffix] * contexts + [1], before)
    once = Tokens.of([head] * contexts) + rests * facts
    rows = (contexts + 1) * facts
    return Load(prefixes * facts, suffixes * facts, (contexts * targets + 1) * facts, once, rows, max(before))


def load_of_rows(rows: Sequence[SearchRow]) -> Load:
    """Return the load of rows of :func:`nse_tools.steps._value_optimizer.search_rows`."""
    before = [row.prompt.position for row in rows]
    heads, which = common_heads([row.prompt.ids[: row.prompt.position] for row in rows])
    shared = [len(heads[w]) for w in which]
    once = Tokens.of(map(len, heads)) + Tokens.of([n - h for n, h in zip(before, shared, strict=True)], shared)
    predictions = sum(len(row.targets) or 1 for row in rows)
    return Load(Tokens.of(before), Tokens.of([row.suffix for row in rows], before), predictions, once, len(rows), max(before))


@dataclass(frozen=True)
class Workload:
    """All that a round's cost depends on, beside the model's shape.

    Parameters
    ----------
    facts, steps, passes : int
        Facts; steps of the search; passes of the update.
    edited : tuple of int
        Edited layers.
    rows : Load
        Rows of the search.
    contexts, bare : Tokens
        Rows of the keys, and of the residuals.
    prompts, rest : Tokens
        Scored prompts, and further target tokens behind them.
    predictions : float
        Places where scoring takes logits.
    """

    facts: int
    steps: float
    passes: int
    edited: tuple[int, ...]
    rows: Load
    contexts: Tokens
    bare: Tokens
    prompts: Tokens
    rest: Tokens
    predictions: float

    def scaled(self, facts: int, edited: tuple[int, ...], steps: int, passes: int) -> Workload:
        """Return the same rows for another number of facts, other layers and settings."""
        factor = facts / self.facts
        parts = {name: getattr(self, name) * factor for name in ("rows", "contexts", "bare", "prompts", "rest", "predictions")}
        return Workload(facts, steps, passes, edited, **parts)


def count_tokens(model: EditableModel, method: Method, facts: Sequence[Fact], contexts: Contexts) -> Workload:
    """Count the tokens of a round of given facts; steps and passes are the most that the method allows."""

    def laid(prefixes: Sequence[str]) -> Tokens:
        rows = [locate_fact(model, f, p, with_target=False).upto_subject for f in facts for p in prefixes]
        return Tokens.of(layout.ids.shape[1] for layout in lay_out(model, rows) for _ in layout.ids) if rows else Tokens.of([])

    bare = laid([""])
    scored: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
    for fact in facts:
        for text, target in _scored(model, fact):
            found = continued(model, text, target)
            scored.setdefault(found.ids[: found.target_start], set()).add(found.target_ids)
    more = [(len(target) - 1, len(prompt)) for prompt, targets in scored.items() for target in targets if len(target) > 1]
    return Workload(
        facts=len(facts),
        steps=method.setting("v_num_grad_steps"),
        passes=method.setting("passes"),
        edited=method.edited_layers,
        rows=load_of_rows(search_rows(model, facts, contexts)),
        contexts=laid(contexts.prefixes[1:]) + bare,
        bare=bare,
        prompts=Tokens.of(map(len, scored)),
        rest=Tokens.of([n for n, _ in more], [b for _, b in more]),
        predictions=len(scored) + sum(n for n, _ in more),
    )


def _scored(model: EditableModel, fact: Fact) -> list[tuple[str, str]]:
    """Return every prompt a fact is tested on, with each of its targets."""
    own = [lead_of(model, text, fact.subject) + text for text in (fact.text, *fact.paraphrases)]
    around = fact.neighborhood if fact.target_true is not None else ()
    targets = [fact.target_new] + ([fact.target_true] if fact.target_true is not None else [])
    return [(text, target) for text in (*own, *around) for target in targets]


def typical_tokens(method: Method, facts: int, contexts: int = 6) -> Workload:
    """Return the workload of facts as long as CounterFact's and "world"'s are, mostly, behind prefixes of ten tokens.

    Six tokens before the subject's last one, six from it on, targets of one or two tokens, thirteen scored prompts of a dozen tokens.
    """
    prefixed = contexts - 1
    before, ahead, rest, longest = 6, 10, 6, 18
    rows = load(facts, contexts, before + (ahead * prefixed) // contexts, rest, 1, head=(ahead * prefixed) // contexts)
    bare = Tokens.of([before + 1]) * facts
    behind = Tokens.of([before + 1], [ahead]) * (facts * prefixed) + Tokens.of([ahead]) * prefixed
    return Workload(
        facts=facts,
        steps=method.setting("v_num_grad_steps"),
        passes=method.setting("passes"),
        edited=method.edited_layers,
        rows=replace(rows, longest=longest),
        contexts=behind + bare,
        bare=bare,
        prompts=Tokens.of([12] * 13) * facts,
        rest=Tokens.of([1] * 7, [12] * 7) * facts,
        predictions=20 * facts,
    )
