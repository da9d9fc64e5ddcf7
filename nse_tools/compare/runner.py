"""One call of :func:`nse_tools.compare`: its seeds' inputs, and its cells, made here or on an executor."""

from __future__ import annotations

import json
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

from nse_tools import methods
from nse_tools._provenance import command, machine, versions
from nse_tools.compare.result import UNEDITED, Comparison
from nse_tools.compare.store import SCORES, Cell, ComparisonFolder, check_names, plain, sketch
from nse_tools.compare.unfinished import UnfinishedCell
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
_PAUSE = 1.0
"""Seconds between two looks at cells that other processes are making."""
Measurement = Callable[[EditSession, int], pd.DataFrame]
"""Takes a session and a number of rounds; returns a tidy table of the model as it was after those."""


@dataclass(frozen=True)
class _Inputs:
    """What all methods of a seed share."""

    seed: int
    facts: FactList
    contexts: Contexts
    moments: SecondMoments


@dataclass
class ComparisonRun:
    """One call of :func:`compare`."""

    model: EditableModel
    methods: Sequence[Method]
    facts: FactList
    rounds_of: int
    tested: Sequence[int]
    facts_of: Sequence[int] | None
    shuffle: bool
    corpus: Corpus | None
    starters: Sequence[str]
    also: Mapping[str, Measurement]
    value_cache: ValueCache | bool
    progress: bool
    executor: Executor | None = None
    state: str = field(init=False)
    unedited: MetricCache = field(default_factory=MetricCache, init=False)
    """Scores of the unedited model, and prompts as they enter the first edited layer: found once, for all methods."""
    _inputs: _Inputs | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        check_names(self.also)
        if edited := changed_layers(self.model):
            raise StateError(f"The model carries edits in layers {edited}. Take them back first (session.rewind(to=0)), or load it anew.")
        for method in self.methods:  # what a session refuses is refused before anything is run; originals are kept
            EditSession(self.model, method, value_cache=False)
        self.state = _state(self.model)

    @property
    def layers(self) -> list[int]:
        """The layers that any of the methods needs C of."""
        return sorted({layer for method in self.methods for layer in method.layers})

    def about(self) -> dict[str, Any]:
        """Return what a folder says of the comparison: its manifest."""
        content = json.dumps([fact.to_dict() for fact in self.facts], sort_keys=True)
        return plain(
            {
                "format": _FORMAT,
                "model": self.model.name,
                "model_fingerprint": self.model.fingerprint(),
                "facts": {"n": len(self.facts), "digest": digest_of_bytes(content.encode()), "ids": self.facts.ids},
                "rounds_of": self.rounds_of,
                "test_at": list(self.tested),
                "shuffle": self.shuffle,
                "corpus": self.corpus.fingerprint() if self.corpus else "sampled from the model with each seed",
                "versions": versions(),
                "machine": machine(),
                "commands": [own] if (own := command()) else [],
                "methods": [method.name for method in self.methods],
                **({"facts_of": list(self.facts_of)} if self.facts_of is not None else {}),
                **({"starters": list(self.starters)} if self.starters != STARTERS else {}),
                **({"also": sorted(self.also)} if self.also else {}),
            }
        )

    def inputs(self, seed: int, store: ComparisonFolder | None) -> _Inputs:
        """Return what the methods of a seed share, found once."""
        if self._inputs is None or self._inputs.seed != seed:
            self._inputs = None  # C is large: one seed's at a time
            with store.beginning(seed) if store else nullcontext():
                self._inputs = self._found_inputs(seed, store)
            if self.shuffle:  # other batches round in other ways: the same numbers whether or not cells were left out
                self.unedited = MetricCache()
        return self._inputs

    def _found_inputs(self, seed: int, store: ComparisonFolder | None) -> _Inputs:
        """Sample or read a seed's contexts, compute its C, and note both in the folder."""
        facts = self.facts.shuffled(seed) if self.shuffle else self.facts
        noted = store.inputs(seed) if store else None
        # contexts that finished cells were made with, even where sampling again would give others
        contexts = Contexts(tuple(noted["contexts"]), seed) if noted else sample_contexts(self.model, seed, self.starters)
        corpus = self._text(seed, noted) if store else self.corpus
        moments = second_moments(self.model, self.layers, corpus, seed=seed, progress=self.progress, executor=self.executor)
        if store:
            store.note_inputs(seed, {"contexts": list(contexts.prefixes), "facts": facts.ids, **self._noted(moments, corpus)})
        return _Inputs(seed, facts, contexts, moments)

    def _text(self, seed: int, noted: Mapping[str, Any] | None) -> Corpus | None:
        """Return the text for C: what was given, or what the folder's seed was begun with; sampled if it is begun now."""
        if self.corpus is not None:
            return self.corpus
        if noted is None:
            return sample_corpus(self.model, n_tokens=10 * self.model.d_ff, seed=seed, progress=self.progress)
        if "text" not in noted:
            return None
        return Corpus(tuple(tuple(map(int, ids.split())) for ids in noted["text"]), noted["source"])

    def _noted(self, moments: SecondMoments, text: Corpus | None) -> dict[str, Any]:
        own = {} if self.corpus is not None or text is None else {"text": [" ".join(map(str, ids)) for ids in text.sequences]}
        return {
            "n_tokens": moments.n_tokens,
            "source": moments.source,
            **own,
            "moments": {str(layer): digest_of_bytes(bytes_of(moments[layer])) for layer in self.layers},
            "sketches": {str(layer): sketch(moments[layer]) for layer in self.layers},
        }

    def cells_here(self, asked: Sequence[tuple[int, Method]], store: ComparisonFolder | None, bar: tqdm) -> Iterator[Cell]:
        """Make the cells one after the other; those that other processes are at come last, and are read once they are finished."""
        queue, passed_over = deque(asked), 0
        while queue:
            seed, method = queue.popleft()
            bar.set_description(f"{method.name}, seed {seed}")
            if cell := self._made_or_found(seed, method, store, bar):
                passed_over = 0
                yield cell
                continue
            queue.append((seed, method))
            passed_over += 1
            if passed_over == len(queue):
                _log.info("other processes are making the last %d cells: waiting for them", len(queue))
            if passed_over >= len(queue):
                bar.set_description(f"waiting for other processes: {len(queue)} cells")
                time.sleep(_PAUSE)

    def _made_or_found(self, seed: int, method: Method, store: ComparisonFolder | None, bar: tqdm) -> Cell | None:
        """Make a cell, or read it if another process has finished it by now; None while another is at it."""
        if store is None:
            return self.cell(method, self.inputs(seed, store), bar)
        with UnfinishedCell(store.unfinished(method.name, seed)) as begun:
            if not begun.held:
                return None
            if cell := store.find(method.to_dict(), seed):
                bar.update(len(self.facts.rounds(self.rounds_of)))
            else:
                cell = self.cell(method, self.inputs(seed, store), bar, begun)
                store.write(cell)
            begun.remove()
            return cell

    def cells_on(
        self, executor: Executor, asked: Sequence[tuple[int, Method]], store: ComparisonFolder | None, bar: tqdm
    ) -> Iterator[Cell]:
        """Make the cells on an executor, seed by seed; a seed's inputs are shared by its cells."""
        tasks = self._tasks(executor, asked, store)
        for cell in executor.map(self.model, _cell_job, tasks, label="compare", total=len(asked), writes=self.layers):
            bar.update(len(self.facts.rounds(self.rounds_of)))
            if store:
                store.write(cell)
                UnfinishedCell(store.unfinished(cell.name, cell.seed)).sweep()
            yield cell

    def _tasks(
        self, executor: Executor, asked: Sequence[tuple[int, Method]], store: ComparisonFolder | None
    ) -> Iterator[tuple[Any, Method]]:
        taken = ("facts", "rounds_of", "tested", "facts_of", "shuffle", "starters", "also")
        settings = {name: getattr(self, name) for name in taken}
        for seed, own in groupby(asked, key=lambda entry: entry[0]):
            inputs = self.inputs(seed, store)
            shared = executor.share(({**settings, "value_cache": self.value_cache}, inputs))
            yield from ((shared, method) for _, method in own)

    def cell(self, method: Method, inputs: _Inputs, bar: tqdm, begun: UnfinishedCell | None = None) -> Cell:
        """Run one method under one seed; the weights are put back, and that is checked."""
        with self.model.original_weights():
            cell = self._edit(method, inputs, bar, begun)
        if _state(self.model) != self.state:
            if begun:  # whatever it kept cannot be trusted
                begun.remove()
            raise StateError(
                f"{method.name!r} left the model other than it was: something besides the down projections of layers {method.layers} was "
                "changed. The other methods would not start from the same weights; load the model anew."
            )
        return cell

    def _edit(self, method: Method, inputs: _Inputs, bar: tqdm, begun: UnfinishedCell | None) -> Cell:
        begin = begun.begin if begun else EditSession
        session = begin(
            self.model,
            method,
            contexts=inputs.contexts,
            moments=inputs.moments.only(method.layers),
            seed=inputs.seed,
            progress=self.progress,
            value_cache=self.value_cache,
        )
        session.metric_cache.update(self.unedited)
        tested, stopped = self._rounds(session, dict(enumerate(inputs.facts.rounds(self.rounds_of), start=1)), bar, begun)
        rounds = _rounds_table(session, {number: round_perplexity(session, number) for number in tested})
        self._remember(session)
        tables = {name: _stacked([found[name] for found in tested.values()]) for name in tested[0]}
        return Cell(plain(method.to_dict()), inputs.seed, tables.pop(SCORES), rounds, stopped, tables)

    def _rounds(
        self, session: EditSession, plan: Mapping[int, FactList], bar: tqdm, begun: UnfinishedCell | None
    ) -> tuple[dict[int, dict[str, pd.DataFrame]], str | None]:
        """Make the rounds that are missing; return the tables of those that are tested, and why the method stopped, if it did."""
        asked = {s: plan[s] for s in self._asked(0)}
        for batch in asked.values():  # a round at a time, so that later scorings find their prompts in the same batches
            round_scores(session, 0, batch)
        tested = begun.tested([0, *self.tested]) if begun else {}
        edit = begun.edit if begun else EditSession.edit

        def test(number: int) -> None:
            if number not in tested:
                tested[number] = self._measure(session, number, {s: plan[s] for s in self._asked(number)})
                if begun:
                    begun.note(number, tested[number])

        test(0)
        stopped = None
        bar.update(len(session))
        for number in range(1, len(plan) + 1):
            if number > len(session):
                try:
                    edit(session, plan[number])
                except EditError as wrong:
                    _log.warning("%s, seed %d, could not make round %d: %s", session.method.name, session.seed, number, wrong)
                    test(len(session))  # also where it stopped between two tests
                    stopped = str(wrong)
                    break
                bar.update()
            if number in self.tested:
                test(number)
        return tested, stopped

    def _asked(self, number: int) -> list[int]:
        """Return the rounds whose facts are asked after a round; after none, all that will be asked at some time."""
        if not number:
            return sorted({s for t in self.tested for s in self._asked(t)})
        return [s for s in range(1, number + 1) if self.facts_of is None or s in self.facts_of or s == number]

    def _measure(self, session: EditSession, number: int, batches: Mapping[int, FactList]) -> dict[str, pd.DataFrame]:
        """Return the scores of some rounds' facts as of a round, and the further tables."""
        further = {name: measure(session, number) for name, measure in self.also.items()}
        return {
            SCORES: _tested(session, number, batches),
            **{name: table if "round" in table else table.assign(round=number) for name, table in further.items()},
        }

    def _remember(self, session: EditSession) -> None:
        """Keep what is true of the unedited model for the next method; prompts up to another layer would only take memory."""
        self.unedited = session.metric_cache.upto(0)
        self.unedited.discard(PROMPT_STATES, keep=min(session.method.layers))


def _cell_job(model: EditableModel, shared: tuple[dict[str, Any], _Inputs], method: Method) -> Cell:
    """Make one cell, on whatever machine; the model is put back."""
    settings, inputs = shared
    run = ComparisonRun(model, [method], corpus=None, progress=False, **settings)
    return run.cell(method, inputs, tqdm(disable=True))


def _tested(session: EditSession, round: int, batches: Mapping[int, FactList]) -> pd.DataFrame:
    """Score the facts of some rounds as of a round, in percent, one row a fact."""
    own = {fact.id: number for number, batch in batches.items() for fact in batch}
    first, *others = batches.values()
    table = round_scores(session, round, sum(others, start=first)).per_fact()
    # a ten-thousandth of a percent: what is beyond differs with the machine
    measured = (table.drop(columns="fact") * 100).round(4)
    measured.insert(0, "round", round)
    measured.insert(1, "edited_in_round", table.fact.map(own))
    measured.insert(2, "fact", table.fact)
    return measured


def _stacked(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Put tables one below the other; a measurement may have nothing to say of the unedited model."""
    return pd.concat([table for table in tables if len(table)] or tables[:1], ignore_index=True)


def _rounds_table(session: EditSession, perplexities: dict[int, float]) -> pd.DataFrame:
    """Return what the session notes of each round, behind one row for the unedited model."""
    made = session.to_frame().drop(columns="approximate", errors="ignore")  # every round is made in its place here
    table = pd.concat([pd.DataFrame({"round": [0], "facts": [0]}), made], ignore_index=True)
    table.insert(1, "edits", table.facts.cumsum())
    table.insert(2, "perplexity", table["round"].map(perplexities))
    return table


def _state(model: EditableModel) -> str:
    """Return a hash of all down projections, bit for bit, and a checksum of everything else."""
    return f"{digest_of(model, range(model.n_layers))} {checksum_of(model)}"


def compare(
    model: EditableModel,
    facts: Sequence[Fact],
    methods: Iterable[Method | str],
    *,
    rounds_of: int = 20,
    seeds: Iterable[int] = (0,),
    folder: str | Path | None = None,
    test_at: int | Iterable[int] | None = None,
    facts_of: Iterable[int] | None = None,
    shuffle: bool = False,
    corpus: Corpus | None = None,
    starters: Sequence[str] = STARTERS,
    also: Mapping[str, Measurement] | None = None,
    value_cache: ValueCache | bool = True,
    progress: bool = True,
    executor: Executor | None = None,
) -> Comparison:
    """Let several methods edit the same facts into the same model, and measure what each learned, kept and forgot.

    Under one seed all methods get the same facts in the same order, the same contexts and the same key statistics C. Before
    each method the weights are, bit for bit, what they were at the start; that is checked, and they are put back at the end
    and when anything goes wrong. A method that cannot go on (an :class:`EditError`) ends there, is marked as stopped, and
    the others go on.

    With a ``folder``, every finished cell (one method under one seed) is written at once, and the same call made again goes
    on where it was: finished cells are read, not made again, and a cell that was killed half-way goes on after the last of its
    rounds. Several processes that make the same call share its cells out; if one of them dies, another goes on with its cell. More
    methods and seeds may be asked for later.

    Parameters
    ----------
    model : EditableModel
        The model, unedited; it is left unedited.
    facts : sequence of Fact
        The facts.
    methods : iterable of Method or str
        The methods, or their names in ``nse.methods``; no two of one name.
    rounds_of : int
        Facts in a round.
    seeds : iterable of int
        Seeds of contexts and of the text for C (and of the order, with ``shuffle``).
    folder : str or Path, optional
        Where finished cells are kept.
    test_at : int or iterable of int, optional
        Rounds after which all facts so far are tested: each k-th, or those listed; every round by default. The last always
        is. Testing after every round takes a time that grows with the square of the number of rounds.
    facts_of : iterable of int, optional
        The rounds whose facts are asked in every test, beside those of the newest; the facts of all rounds so far by default. With
        some only, the time of a test does not grow with the number of edits.
    shuffle : bool
        Shuffle the facts with each seed.
    corpus : Corpus, optional
        General text for C; sampled from the model with each seed by default.
    starters : sequence of str
        First words of the contexts that the model writes with each seed, one context each beside the bare prompt.
    also : mapping of str to callable, optional
        Further tables, taken of every method after every tested round and before the first (0): name → a function of the
        session and the number of rounds, as ``{"drift": lambda session, t: session.drift(round=t).to_frame()}``. Where a table has
        no column ``round``, it gets one. They are kept with the cells and come back as :attr:`Comparison.also`. A folder holds
        the same ones for all its cells.
    value_cache : ValueCache or bool
        As in :class:`EditSession`. Values that several methods share are searched for once; ``seconds_per_edit`` leaves such
        rounds out. With False every value is searched for, and times can be compared.
    progress : bool
        Show progress bars.
    executor : Executor, optional
        Where the cells are made, e.g. a cluster (:class:`nse_tools.scale.RayExecutor`), one job a cell; each seed's key
        statistics are computed there too. A cell's facts stay together: its numbers, but for the seconds, are those of a run
        here. Every worker has a cache of values of its own, unless its folder is on a disk that all share. A cell that is killed on a
        worker begins anew, and other processes do not share in the work.

    Returns
    -------
    Comparison
        The tables.

    Raises
    ------
    SettingError
        For doubled or unknown names, seeds or rounds that make no sense, or a folder that holds another comparison.
    StateError
        If the model carries edits at the start, or a method leaves weights behind that cannot be put back.
    """
    chosen, seeds = _chosen(methods), _whole_numbers("seeds", seeds)
    stream = facts if isinstance(facts, FactList) else FactList(facts)
    if not len(stream):
        raise FactError("There are no facts to edit.")
    run = ComparisonRun(
        model,
        chosen,
        stream,
        rounds_of,
        tested=rounds_to_test(len(stream.rounds(rounds_of)), test_at),
        facts_of=None if facts_of is None else rounds_to_ask(len(stream.rounds(rounds_of)), facts_of),
        shuffle=shuffle,
        corpus=corpus,
        starters=tuple(starters),
        also=dict(also or {}),
        value_cache=value_cache,
        progress=progress,
        executor=executor,
    )
    about = run.about()
    store = ComparisonFolder.open(folder, about) if folder is not None else None
    cells = {(s, m.name): cell for s in seeds for m in chosen if store and (cell := store.find(m.to_dict(), s))}
    missing = [(s, m) for s in seeds for m in chosen if (s, m.name) not in cells]
    if store:
        for seed, name in cells:
            UnfinishedCell(store.unfinished(name, seed)).sweep()
    if cells:
        _log.info("%d of %d cells are in %s already", len(cells), len(cells) + len(missing), folder)
    with tqdm(total=len(missing) * len(stream.rounds(rounds_of)), desc="compare", unit="round", disable=not progress) as bar:
        for cell in run.cells_here(missing, store, bar) if executor is None else run.cells_on(executor, missing, store, bar):
            cells[cell.seed, cell.name] = cell
    return Comparison.of([cells[s, m.name] for m in chosen for s in seeds], about)


def rounds_to_test(n_rounds: int, test_at: int | Iterable[int] | None) -> list[int]:
    """Return the rounds after which a stream of ``n_rounds`` is tested: each k-th or those listed, and the last.

    Raises
    ------
    SettingError
        If a number is not a round of the stream.
    """
    every = 1 if test_at is None else test_at
    if isinstance(every, int):
        wanted = {*range(every, n_rounds, every), n_rounds} if every > 0 else set()
    else:
        wanted = set(every)
    if not wanted or not all(isinstance(t, int) and 1 <= t <= n_rounds for t in wanted):
        raise SettingError(f"test_at={test_at!r}: expected a number k (each k-th round) or rounds from 1 to {n_rounds}.")
    return sorted({*wanted, n_rounds})


def rounds_to_ask(n_rounds: int, facts_of: Iterable[int]) -> list[int]:
    """Return the rounds whose facts are asked in every test.

    Raises
    ------
    SettingError
        If a number is not a round of the stream.
    """
    wanted = sorted(set(facts_of))
    if not all(isinstance(s, int) and 1 <= s <= n_rounds for s in wanted):
        raise SettingError(f"facts_of={wanted!r}: expected rounds from 1 to {n_rounds}.")
    return wanted


def _chosen(asked: Iterable[Method | str]) -> list[Method]:
    if isinstance(asked, (str, Method)):
        asked = [asked]
    chosen = [method if isinstance(method, Method) else methods.get(method) for method in asked]
    if not chosen:
        raise SettingError("methods: give at least one.")
    twice = [name for name, n in Counter(method.name for method in chosen).items() if n > 1]
    if twice or UNEDITED in {method.name for method in chosen}:
        raise SettingError(
            f"methods: every method needs a name of its own, other than {UNEDITED!r}; doubled: {twice}. Rename one: method.with_(name='…')."
        )
    return chosen


def _whole_numbers(name: str, asked: int | Iterable[int]) -> list[int]:
    numbers = [asked] if isinstance(asked, int) else list(asked)
    if not numbers or len(set(numbers)) < len(numbers) or not all(isinstance(n, int) and not isinstance(n, bool) for n in numbers):
        raise SettingError(f"{name}={asked!r}: expected whole numbers, at least one, none twice.")
    return numbers
