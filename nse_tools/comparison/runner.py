"""Compare methods on the same facts: make every cell (one method under one seed), in this process or on an executor."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, TypedDict, Unpack

import pandas as pd
from tqdm.auto import tqdm

from nse_tools import methods as known_methods
from nse_tools._provenance import command, machine, versions
from nse_tools.comparison.result import UNEDITED, Comparison
from nse_tools.comparison.store import SCORES, Cell, ComparisonFolder, check_names, plain, sketch
from nse_tools.data.fact import Fact
from nse_tools.data.fact_list import FactList
from nse_tools.editing.session import EditSession
from nse_tools.errors import EditError, FactError, SettingError, StateError
from nse_tools.methods.base import Method
from nse_tools.metrics._cache import MetricCache
from nse_tools.metrics.forgetting import PROMPT_STATES, round_perplexity, round_scores
from nse_tools.models.editable_model import EditableModel
from nse_tools.models.files import digest_of_bytes
from nse_tools.models.weights import bytes_of, changed_layers, checksum_of, digest_of
from nse_tools.parallel.executor import Executor
from nse_tools.steps._value_cache import ValueCache
from nse_tools.tracing.contexts import STARTERS, Contexts, sample_contexts
from nse_tools.tracing.corpus import Corpus, sample_corpus
from nse_tools.tracing.moments import SecondMoments, second_moments

_log = logging.getLogger(__name__)
_FORMAT = 1
Measurement = Callable[[EditSession, int], pd.DataFrame]
"""Takes a session and a round; returns a tidy table of the model after that round."""


class CompareOptions(TypedDict, total=False):
    """Further keyword arguments of :func:`compare`, which describes them."""

    test_at: int | Collection[int] | None
    facts_of: Collection[int] | None
    shuffle: bool
    corpus: Corpus | None
    starters: Sequence[str]
    also: Mapping[str, Measurement] | None
    value_cache: ValueCache | bool
    progress: bool
    executor: Executor | None


def compare(
    model: EditableModel,
    facts: Sequence[Fact],
    methods: Iterable[Method | str],
    *,
    rounds_of: int = 20,
    seeds: Iterable[int] = (0,),
    folder: str | Path | None = None,
    **options: Unpack[CompareOptions],
) -> Comparison:
    """Let several methods edit the same facts into the same model, and measure what each learned, kept and forgot.

    Under one seed all methods get the same facts in the same order, the same contexts and the same key statistics C. Before
    each method the weights are, bit for bit, what they were at the start; that is checked, and they are restored at the end
    and on any error. A method that cannot go on (an :class:`EditError`) ends there and is marked as stopped; the others go on.

    With a ``folder``, every finished cell (one method under one seed) is written at once. The same call made again reads the
    finished cells and makes the others; several processes that make it share the cells out. Methods and seeds can be added later.

    Parameters
    ----------
    model : EditableModel
        The model, unedited; it is left unedited.
    facts : sequence of Fact
        The facts.
    methods : iterable of Method or str
        The methods, or their names in ``nse.methods``; no two of one name.
    rounds_of : int
        Facts per round.
    seeds : iterable of int
        Seeds of contexts and of the text for C (and of the order, with ``shuffle``).
    folder : str or Path, optional
        Where finished cells are kept.
    test_at : int or collection of int, optional
        Rounds after which all facts so far are tested: each k-th, or those listed; every round by default. The last is always
        tested. The time of testing after every round grows with the square of the number of rounds.
    facts_of : collection of int, optional
        The rounds whose facts are tested, in addition to those of the newest round; all rounds so far by default.
    shuffle : bool
        Shuffle the facts with each seed; False by default.
    corpus : Corpus, optional
        General text for C; sampled from the model with each seed by default.
    starters : sequence of str
        First words of the contexts that the model writes with each seed, one context each in addition to the bare prompt.
    also : mapping of str to callable, optional
        Further tables of every method after every tested round and before the first (0), as :attr:`Comparison.also`: name →
        function of session and round, e.g. ``{"drift": lambda session, t: session.drift(round=t).to_frame()}``. A table without
        a column ``round`` gets one. All cells of a folder have the same ones.
    value_cache : ValueCache or bool
        As in :class:`EditSession`. Values that several methods share are optimised once; ``seconds_per_edit`` leaves such
        rounds out. With False every value is optimised, and times can be compared.
    progress : bool
        Show progress bars; True by default.
    executor : Executor, optional
        Where the cells are made, e.g. a cluster (:class:`nse_tools.parallel.RayExecutor`), one job per cell; each seed's C is
        computed there too. Numbers, but for seconds, are those of a run in this process.

    Returns
    -------
    Comparison
        The tables.

    Raises
    ------
    SettingError
        For doubled or unknown names, seeds or rounds that make no sense, or a folder that holds another comparison.
    StateError
        If the model carries edits at the start, or a method leaves weights behind that cannot be restored.
    """
    plan, numbers = _Plan(facts if isinstance(facts, FactList) else FactList(facts), rounds_of, **options), _checked_seeds(seeds)
    run = _Run(model, _checked_methods(methods), plan)
    manifest = run.manifest()
    run.store = ComparisonFolder.open(folder, manifest) if folder is not None else None
    wanted = [(seed, method) for seed in numbers for method in run.methods]
    cells = {(seed, method.name): cell for seed, method in wanted if run.store and (cell := run.store.find(method, seed))}
    missing = [(seed, method) for seed, method in wanted if (seed, method.name) not in cells]
    if cells:
        _log.info("%d of %d cells are in %s already", len(cells), len(wanted), folder)
    with tqdm(total=len(missing) * plan.n_rounds, desc="compare", unit="round", disable=not plan.progress) as bar:
        for cell in run.cells_here(missing, bar) if plan.executor is None else run.cells_on(plan.executor, missing, bar):
            cells[cell.seed, cell.name] = cell
    return Comparison.of([cells[seed, method.name] for method in run.methods for seed in numbers], manifest)


@dataclass(frozen=True)
class _Plan:
    """What every cell of a comparison does: the arguments of :func:`compare`."""

    facts: FactList
    rounds_of: int
    test_at: int | Collection[int] | None = None
    facts_of: Collection[int] | None = None
    shuffle: bool = False
    corpus: Corpus | None = None
    starters: Sequence[str] = STARTERS
    also: Mapping[str, Measurement] | None = None
    value_cache: ValueCache | bool = True
    progress: bool = True
    executor: Executor | None = None

    def __post_init__(self) -> None:
        if not len(self.facts):
            raise FactError("facts: expected at least one fact to edit, got none.")
        check_names(self.also or {})
        if self.facts_of is not None and not all(isinstance(s, int) and 1 <= s <= self.n_rounds for s in self.facts_of):
            raise SettingError(f"facts_of={sorted(self.facts_of)!r}: expected rounds from 1 to {self.n_rounds}.")

    @property
    def n_rounds(self) -> int:
        return len(self.facts.rounds(self.rounds_of))

    @cached_property
    def tested(self) -> list[int]:
        """The rounds after which the facts are tested."""
        return rounds_to_test(self.n_rounds, self.test_at)

    def rounds_asked(self, number: int) -> list[int]:
        """Return the rounds whose facts are tested after a round; for round 0, all that are tested at some time."""
        if not number:
            return sorted({s for t in self.tested for s in self.rounds_asked(t)})
        return [s for s in range(1, number + 1) if self.facts_of is None or s in self.facts_of or s == number]

    def for_worker(self) -> _Plan:
        """Return the plan without what a worker does not need."""
        return replace(self, corpus=None, executor=None, progress=False)


@dataclass(frozen=True)
class _Inputs:
    """What all methods of a seed share."""

    seed: int
    facts: FactList
    contexts: Contexts
    moments: SecondMoments


class _CellMaker:
    """Makes cells on one model; what is measured on the unedited model is shared by them."""

    def __init__(self, model: EditableModel, plan: _Plan) -> None:
        if edited := changed_layers(model):
            raise StateError(f"The model carries edits in layers {edited}. Undo them first (session.rewind(to=0)), or load it again.")
        self.model, self.plan, self.unedited, self._state = model, plan, MetricCache(), _state(model)

    def make(self, method: Method, inputs: _Inputs, bar: tqdm) -> Cell:
        """Run one method under one seed; restore the weights, and check that."""
        with self.model.original_weights():
            cell = self._edit(method, inputs, bar)
        if _state(self.model) != self._state:
            raise StateError(
                f"{method.name!r} left the model changed: something other than the down projections of layers {method.layers} differs. "
                "The other methods would not start from the same weights; load the model again."
            )
        return cell

    def _edit(self, method: Method, inputs: _Inputs, bar: tqdm) -> Cell:
        plan = self.plan
        session = EditSession(
            self.model,
            method,
            contexts=inputs.contexts,
            moments=inputs.moments.only(method.layers),
            seed=inputs.seed,
            progress=plan.progress,
            value_cache=plan.value_cache,
        )
        session.metric_cache.update(self.unedited)
        batches = dict(enumerate(inputs.facts.rounds(plan.rounds_of), start=1))
        for number in plan.rounds_asked(0):  # one round at a time, so that later scorings have their prompts in the same batches
            round_scores(session, 0, batches[number])
        tests, stopped = {0: self._test(session, batches)}, None
        for number, batch in batches.items():
            try:
                session.edit(batch)
            except EditError as error:
                _log.warning("%s, seed %d, could not make round %d: %s", method.name, inputs.seed, number, error)
                stopped = str(error)
                break
            bar.update()
            if number in plan.tested:
                tests[number] = self._test(session, batches)
        if len(session) not in tests:  # it stopped between two tests
            tests[len(session)] = self._test(session, batches)
        rounds = _rounds_table(session, {number: round_perplexity(session, number) for number in tests})
        self._keep_unedited(session)
        tables = {name: _stacked([test[name] for test in tests.values()]) for name in tests[0]}
        return Cell(plain(method.to_dict()), inputs.seed, tables.pop(SCORES), rounds, stopped, tables)

    def _test(self, session: EditSession, batches: Mapping[int, FactList]) -> dict[str, pd.DataFrame]:
        """Return the scores after the session's last round, and the further tables."""
        number = len(session)
        further = {name: measure(session, number) for name, measure in (self.plan.also or {}).items()}
        return {
            SCORES: _scores_table(session, number, {s: batches[s] for s in self.plan.rounds_asked(number)}),
            **{name: table if "round" in table else table.assign(round=number) for name, table in further.items()},
        }

    def _keep_unedited(self, session: EditSession) -> None:
        """Keep what is true of the unedited model for the next method; prompts up to another layer would only take memory."""
        self.unedited = session.metric_cache.upto(0)
        self.unedited.discard(PROMPT_STATES, keep=min(session.method.layers))


@dataclass
class _Run:
    """One call of :func:`compare`."""

    model: EditableModel
    methods: Sequence[Method]
    plan: _Plan
    store: ComparisonFolder | None = None
    maker: _CellMaker = field(init=False)
    _inputs: _Inputs | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.maker = _CellMaker(self.model, self.plan)
        for method in self.methods:  # what a session refuses is refused before anything runs; original weights are kept
            EditSession(self.model, method, value_cache=False)

    @property
    def layers(self) -> list[int]:
        """The layers that any of the methods needs C of."""
        return sorted({layer for method in self.methods for layer in method.layers})

    def manifest(self) -> dict[str, Any]:
        """Return what all cells share, as the folder keeps it."""
        plan, facts = self.plan, self.plan.facts
        content = json.dumps([fact.to_dict() for fact in facts], sort_keys=True)
        return plain(
            {
                "format": _FORMAT,
                "model": self.model.name,
                "model_fingerprint": self.model.fingerprint(),
                "facts": {"n": len(facts), "digest": digest_of_bytes(content.encode()), "ids": facts.ids},
                "rounds_of": plan.rounds_of,
                "test_at": plan.tested,
                "shuffle": plan.shuffle,
                "corpus": plan.corpus.fingerprint() if plan.corpus else "sampled from the model with each seed",
                "versions": versions(),
                "machine": machine(),
                "commands": [line] if (line := command()) else [],
                "methods": [method.name for method in self.methods],
                **({"facts_of": sorted(set(plan.facts_of))} if plan.facts_of is not None else {}),
                **({"starters": list(plan.starters)} if tuple(plan.starters) != STARTERS else {}),
                **({"also": sorted(plan.also)} if plan.also else {}),
            }
        )

    # ---- cells -------------------------------------------------------------------------------------------------------
    def cells_here(self, missing: Sequence[tuple[int, Method]], bar: tqdm) -> Iterator[Cell]:
        """Make the cells one after the other; those that other processes are making come last."""
        busy = []
        for seed, method in missing:
            if cell := self._make_or_read(seed, method, bar, wait=False):
                yield cell
            else:
                busy.append((seed, method))
        for seed, method in busy:
            cell = self._make_or_read(seed, method, bar, wait=True)
            assert cell is not None  # after waiting it is locked, or finished
            yield cell

    def _make_or_read(self, seed: int, method: Method, bar: tqdm, *, wait: bool) -> Cell | None:
        """Make a cell, or read it if another process has finished it; return None while another process makes it."""
        bar.set_description(f"{method.name}, seed {seed}")
        if self.store is None:
            return self.maker.make(method, self._inputs_of(seed), bar)
        with self.store.lock_cell(method, seed, wait=wait) as locked:
            if not locked:
                return None
            if cell := self.store.find(method, seed):
                bar.update(self.plan.n_rounds)
            else:
                cell = self.maker.make(method, self._inputs_of(seed), bar)
                self.store.write(cell)
            return cell

    def cells_on(self, executor: Executor, missing: Sequence[tuple[int, Method]], bar: tqdm) -> Iterator[Cell]:
        """Make the cells on an executor, seed by seed."""
        tasks = self._tasks(executor, missing)
        for cell in executor.map(self.model, _cell_job, tasks, label="compare", total=len(missing), writes=self.layers):
            bar.update(self.plan.n_rounds)
            if self.store:
                self.store.write(cell)
            yield cell

    def _tasks(self, executor: Executor, missing: Sequence[tuple[int, Method]]) -> Iterator[tuple[Any, Method]]:
        for seed, cells in groupby(missing, key=lambda entry: entry[0]):
            shared = executor.share((self.plan.for_worker(), self._inputs_of(seed)))
            yield from ((shared, method) for _, method in cells)

    # ---- inputs of a seed --------------------------------------------------------------------------------------------
    def _inputs_of(self, seed: int) -> _Inputs:
        """Return what the methods of a seed share, made once."""
        if self._inputs is None or self._inputs.seed != seed:
            self._inputs = None  # C is large: one seed's at a time
            with self.store.lock_seed(seed) if self.store else nullcontext():
                self._inputs = self._make_inputs(seed)
            if self.plan.shuffle:  # batches of other facts round in other ways: the same numbers whichever cells were there
                self.maker.unedited = MetricCache()
        return self._inputs

    def _make_inputs(self, seed: int) -> _Inputs:
        """Sample or read a seed's contexts, compute its C, and note both in the folder."""
        facts = self.plan.facts.shuffled(seed) if self.plan.shuffle else self.plan.facts
        noted = self.store.inputs(seed) if self.store else None
        # contexts that finished cells were made with, even where sampling again would give others
        contexts = Contexts(tuple(noted["contexts"]), seed) if noted else sample_contexts(self.model, seed, tuple(self.plan.starters))
        corpus = self._text(seed, noted) if self.store else self.plan.corpus
        moments = second_moments(self.model, self.layers, corpus, seed=seed, progress=self.plan.progress, executor=self.plan.executor)
        if self.store:
            self.store.note_inputs(seed, {"contexts": list(contexts.prefixes), "facts": facts.ids, **self._noted(moments, corpus)})
        return _Inputs(seed, facts, contexts, moments)

    def _text(self, seed: int, noted: Mapping[str, Any] | None) -> Corpus | None:
        """Return the text for C: the given one, the one noted in the folder, or a new sample."""
        if self.plan.corpus is not None:
            return self.plan.corpus
        if noted is None:
            return sample_corpus(self.model, n_tokens=10 * self.model.d_ff, seed=seed, progress=self.plan.progress)
        if "text" not in noted:
            return None
        return Corpus(tuple(tuple(map(int, ids.split())) for ids in noted["text"]), noted["source"])

    def _noted(self, moments: SecondMoments, text: Corpus | None) -> dict[str, Any]:
        sampled = {} if self.plan.corpus is not None or text is None else {"text": [" ".join(map(str, ids)) for ids in text.sequences]}
        return {
            "n_tokens": moments.n_tokens,
            "source": moments.source,
            **sampled,
            "moments": {str(layer): digest_of_bytes(bytes_of(moments[layer])) for layer in self.layers},
            "sketches": {str(layer): sketch(moments[layer]) for layer in self.layers},
        }


def _cell_job(model: EditableModel, shared: tuple[_Plan, _Inputs], method: Method) -> Cell:
    """Make one cell on a worker; the model is restored."""
    plan, inputs = shared
    return _CellMaker(model, plan).make(method, inputs, tqdm(disable=True))


def _scores_table(session: EditSession, round: int, batches: Mapping[int, FactList]) -> pd.DataFrame:
    """Score the facts of some rounds after a round, in percent, one row per fact."""
    round_of = {fact.id: number for number, batch in batches.items() for fact in batch}
    first, *others = batches.values()
    table = round_scores(session, round, sum(others, start=first)).per_fact()
    # a ten-thousandth of a percent: further digits differ between machines
    scores = (table.drop(columns="fact") * 100).round(4)
    scores.insert(0, "round", round)
    scores.insert(1, "edited_in_round", table.fact.map(round_of))
    scores.insert(2, "fact", table.fact)
    return scores


def _stacked(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Put tables one below the other; a measurement may have no row for the unedited model."""
    return pd.concat([table for table in tables if len(table)] or tables[:1], ignore_index=True)


def _rounds_table(session: EditSession, perplexities: dict[int, float]) -> pd.DataFrame:
    """Return the session's table of rounds, after one row for the unedited model."""
    made = session.to_frame().drop(columns="approximate", errors="ignore")  # every round is made in its place here
    table = pd.concat([pd.DataFrame({"round": [0], "facts": [0]}), made], ignore_index=True)
    table.insert(1, "edits", table.facts.cumsum())
    table.insert(2, "perplexity", table["round"].map(perplexities))
    return table


def _state(model: EditableModel) -> str:
    """Return a hash of all down projections, bit for bit, and a checksum of everything else."""
    return f"{digest_of(model, range(model.n_layers))} {checksum_of(model)}"


def rounds_to_test(n_rounds: int, test_at: int | Collection[int] | None) -> list[int]:
    """Return the rounds after which facts are tested: each k-th or those listed, and the last."""
    every = 1 if test_at is None else test_at
    if isinstance(every, int):
        wanted = {*range(every, n_rounds, every), n_rounds} if every > 0 else set()
    else:
        wanted = set(every)
    if not wanted or not all(isinstance(t, int) and 1 <= t <= n_rounds for t in wanted):
        raise SettingError(f"test_at={test_at!r}: expected a number k (each k-th round) or rounds from 1 to {n_rounds}.")
    return sorted({*wanted, n_rounds})


def _checked_methods(methods: Iterable[Method | str]) -> list[Method]:
    """Return the methods, those given by name included; refuse doubled names."""
    given = [methods] if isinstance(methods, (str, Method)) else methods
    checked = [method if isinstance(method, Method) else known_methods.get(method) for method in given]
    if not checked:
        raise SettingError("methods: expected at least one, got none.")
    doubled = [name for name, n in Counter(method.name for method in checked).items() if n > 1]
    if doubled or UNEDITED in {method.name for method in checked}:
        raise SettingError(
            f"methods: expected one name per method, none of them {UNEDITED!r}; doubled: {doubled}. Rename one: method.with_(name='…')."
        )
    return checked


def _checked_seeds(seeds: int | Iterable[int]) -> list[int]:
    numbers = [seeds] if isinstance(seeds, int) else list(seeds)
    if not numbers or len(set(numbers)) < len(numbers) or not all(isinstance(n, int) and not isinstance(n, bool) for n in numbers):
        raise SettingError(f"seeds={seeds!r}: expected whole numbers, at least one, none twice.")
    return numbers
