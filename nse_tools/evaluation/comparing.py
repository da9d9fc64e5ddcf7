"""``nse.compare``: several methods on the same facts, contexts and key statistics, from the same weights, bit for bit."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from tqdm.auto import tqdm

from nse_tools.editing import Method, ValueCache, methods
from nse_tools.errors import FactError, SettingError
from nse_tools.evaluation.comparison import UNEDITED, Comparison
from nse_tools.evaluation.comparison_run import ComparisonRun, Measurement
from nse_tools.evaluation.comparison_store import ComparisonFolder
from nse_tools.evaluation.unfinished import UnfinishedCell
from nse_tools.facts import Fact, FactList
from nse_tools.models import EditableModel
from nse_tools.models.executors import Executor
from nse_tools.tracing.contexts import STARTERS
from nse_tools.tracing.corpus import Corpus

_log = logging.getLogger(__name__)


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
