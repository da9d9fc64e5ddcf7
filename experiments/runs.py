"""Make the runs behind the paper's figures: what is compared, how large, and what is measured besides the scores.

A run is one comparison or several (:func:`nse_tools.compare`), each in a folder of its own, and goes on where it was; figures are drawn
from the folders, without a model (:func:`nse_tools.draw_figure`).
"""

from __future__ import annotations

import logging
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from experiments import measurements
from nse_tools import methods
from nse_tools.comparison.result import Comparison
from nse_tools.comparison.runner import Measurement, compare
from nse_tools.data.fact import Fact
from nse_tools.data.fact_list import FactList
from nse_tools.editing.ordering import order_facts
from nse_tools.errors import SettingError, nearest
from nse_tools.figures.tables import RECIPE
from nse_tools.methods.base import Method
from nse_tools.metrics.generation import ReferenceTexts
from nse_tools.models.editable_model import EditableModel
from nse_tools.tracing.contexts import STARTERS
from nse_tools.tracing.corpus import Corpus, sample_corpus

_SAMPLED = 5
"""Rounds of a long stream whose facts are asked again and again."""
_log = logging.getLogger(__name__)
RECIPES = Path(__file__).with_name("recipe_search.toml")
"""The variants of the search for a better recipe."""


@dataclass(frozen=True)
class Maker:
    """Makes a run's methods, all from one preset.

    Parameters
    ----------
    preset : str, optional
        The preset.
    settings : mapping
        Settings of all methods to change.
    """

    preset: str | None = methods.DEFAULT_PRESET
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, method: str, **changed: Any) -> Method:
        """Return a method by its name; what is changed for it comes last."""
        given = {name: value for name, value in self.settings.items() if name == "layers"} | changed  # without a preset these come first
        common = {name: value for name, value in self.settings.items() if name not in given}
        return methods.get(method, common=common, preset=self.preset, **given)

    def each(self, names: Iterable[str]) -> tuple[Method, ...]:
        """Return methods by their names; :data:`RECIPE` is among them only if the preset has one."""
        made = (self._recipe() if name == RECIPE else self(name) for name in names)
        return tuple(method for method in made if method is not None)

    def _recipe(self) -> Method | None:
        preset = f"{self.preset}-{RECIPE}"
        if preset not in methods.presets():
            _log.info("there is no preset %r: the method %r is left out", preset, RECIPE)
            return None
        return methods.nse(preset, **self.settings).with_(name=RECIPE)


@dataclass(frozen=True)
class RunSize:
    """How large a run is.

    Parameters
    ----------
    n : int
        Facts edited.
    rounds_of : int
        Facts in a round.
    seeds : tuple of int
        Seeds of order, contexts and the text for C.
    tests : int
        After how many rounds, evenly spread, all facts so far are tested: the first and the last always, so two at least.
    contexts : int
        How many of the usual contexts are used with the bare prompt.
    stop_at_argmax : int
        Value searches stop once the target was the first choice so many times (the setting ``v_stop_at_argmax``); 0: never.

    Raises
    ------
    SettingError
        If a number is too small, or there is no seed.
    """

    n: int
    rounds_of: int
    seeds: tuple[int, ...] = (0,)
    tests: int = 5
    contexts: int = len(STARTERS)
    stop_at_argmax: int = 0

    def __post_init__(self) -> None:
        for name, least in (("n", 1), ("rounds_of", 1), ("tests", 1), ("contexts", 0), ("stop_at_argmax", 0)):
            if (value := getattr(self, name)) < least:
                raise SettingError(f"{name}={value!r}: expected a whole number of at least {least}.")
        if not self.seeds:
            raise SettingError("seeds: expected one at least.")

    def test_at(self, rounds_of: int) -> list[int]:
        """Return the rounds that are tested, the first and the last among them."""
        n_rounds = -(-self.n // rounds_of)
        between = max(min(self.tests, n_rounds) - 1, 1)
        return sorted({1 + round(i * (n_rounds - 1) / between) for i in range(between + 1)})


@dataclass(frozen=True)
class Part:
    """One comparison of a run.

    Parameters
    ----------
    methods : tuple of Method
        The methods.
    rounds_of : int, optional
        Facts in a round, where not the run's.
    starters : tuple of str, optional
        First words of the contexts, where not the run's.
    facts_of : tuple of int, optional
        Rounds whose facts are asked in every test, with the newest's; all by default.
    order : str
        Order of the facts (:func:`nse_tools.order_facts`); shuffled with each seed by default.
    tokens_per_neuron : float, optional
        Tokens of the text for C over d_ff, where not the usual ten.
    also : mapping
        Further tables (:func:`nse_tools.compare`).
    """

    methods: tuple[Method, ...]
    rounds_of: int | None = None
    starters: tuple[str, ...] | None = None
    facts_of: tuple[int, ...] | None = None
    order: str = "shuffled"
    tokens_per_neuron: float | None = None
    also: Mapping[str, Measurement] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Run:
    """What has to be run for some of the paper's figures.

    Parameters
    ----------
    name : str
        Its name and its folder's.
    asks : str
        The question, in one sentence.
    parts : callable
        Takes a :class:`Maker`, the :class:`RunSize` and the model's number of layers; returns name → :class:`Part`.
    size : RunSize
        For the embedded model: what the stored results are of.
    paper : RunSize
        As in the paper, for a model of several billion parameters on a GPU.
    facts : str
        The shipped facts that the stored results are of, as ``--facts`` takes them.
    """

    name: str
    asks: str
    parts: Callable[[Maker, RunSize, int], Mapping[str, Part]] = field(repr=False)
    size: RunSize
    paper: RunSize
    facts: str = "world-test"


COMPARED = (RECIPE, "nse", "memit_seq", "memit", "alphaedit", "prune", "rect", "rome", "ft", "ft_l")
"""The methods of the main table, in its order."""


def _sequence(make: Maker, size: RunSize, n_layers: int) -> dict[str, Part]:
    also = {name: getattr(measurements, name) for name in ("answers", "drift", "ability", "shift", "neighbors", "effects", "times")}
    return {"sequence": Part(make.each(COMPARED), also=also)}


def _round_size(make: Maker, size: RunSize, n_layers: int) -> dict[str, Part]:
    chosen = make.each((RECIPE, "nse", "memit_seq", "memit", "alphaedit"))
    return {f"of_{k}": Part(chosen, rounds_of=k) for k in (1, 5, 10, 20, 50, 100) if k <= size.n}


def _ablation(make: Maker, size: RunSize, n_layers: int) -> dict[str, Part]:
    grid = product(("original", "current"), (True, False), (1.0, 0.8), (1, 2))
    variants = [
        make("nse", values_under=values, use_previous_keys=old, neuron_threshold=p, passes=passes).with_(
            name=variant_name(values, old, p, passes)
        )
        for values, old, p, passes in grid
    ]
    return {"ablation": Part(tuple(variants))}


def variant_name(values_under: str, old_keys: bool, p: float, passes: int) -> str:
    """Return the name of a combination of NSE's four parts, as ``"W0, old keys, p 1, 2 passes"``."""
    values = {"original": "W0", "current": "Wt"}[values_under]
    return f"{values}, {'old keys' if old_keys else 'no old keys'}, p {p:g}, {passes} pass{'es' if passes > 1 else ''}"


def _sensitivity(make: Maker, size: RunSize, n_layers: int) -> dict[str, Part]:
    base = make("nse")
    values: dict[str, Sequence[Any]] = {
        "neuron_threshold": (0.5, 0.8, 0.9, 1.0),
        "alpha": tuple(base.setting("alpha") * f for f in (0.2, 1, 4)),
        "mom2_update_weight": tuple(base.setting("mom2_update_weight") * f for f in (0.02, 0.2, 1, 5, 20)),
        "layers": tuple(
            tuple(layer + by for layer in base.layers)
            for by in (-2, 0, 2, 4)
            if by >= -min(base.layers) and by < n_layers - max(base.layers)
        ),
    }
    own = {name: tuple(base.with_(name=f"{name}={_short(v)}", **{name: v}) for v in dict.fromkeys(found)) for name, found in values.items()}
    contexts = {f"contexts_{k + 1}": Part((base,), starters=STARTERS[:k]) for k in (0, 2, len(STARTERS))}
    tokens = {f"tokens_{k}": Part((base,), tokens_per_neuron=k) for k in (2, 5, 10, 30)}
    return {name: Part(found) for name, found in own.items()} | contexts | tokens


def _short(value: Any) -> str:
    return f"{value[0]}-{value[-1]}" if isinstance(value, tuple) else f"{value:g}"


STRESSED = (RECIPE, "nse", "memit_seq")
"""The methods of long streams and of orders that make it hard."""


def _orders(make: Maker, size: RunSize, n_layers: int) -> dict[str, Part]:
    return {order: Part(make.each(STRESSED), order=order) for order in ("shuffled", "packed", "spread")}


def _long(make: Maker, size: RunSize, n_layers: int) -> dict[str, Part]:
    n_rounds = -(-size.n // size.rounds_of)
    sampled = tuple(sorted({1, *(1 + round(i * (n_rounds - 1) / _SAMPLED) for i in range(1, _SAMPLED))}))
    return {"long": Part(make.each(STRESSED), facts_of=sampled)}


def _reuse(make: Maker, size: RunSize, n_layers: int) -> dict[str, Part]:
    selecting = tuple(make("nse", neuron_threshold=p).with_(name=f"nse, p {p:g}") for p in (0.5, 0.8))
    return {"reuse": Part(selecting, also={"effects": measurements.effects})}


def _anatomy(make: Maker, size: RunSize, n_layers: int) -> dict[str, Part]:
    also = {name: getattr(measurements, name) for name in ("answers", "values", "residuals", "neurons", "updates")}
    return {"anatomy": Part((make("nse", neuron_threshold=0.9).with_(name="nse, p 0.9"),), also=also)}


def _recipes(make: Maker, size: RunSize, n_layers: int) -> dict[str, Part]:
    stages = tomllib.loads(RECIPES.read_text(encoding="utf-8"))
    return {stage: Part(tuple(_variant(make, name, **changes) for name, changes in found.items())) for stage, found in stages.items()}


def _variant(make: Maker, name: str, of: str, times: Mapping[str, float] | None = None, **changes: Any) -> Method:
    base = make(of, **changes)
    return base.with_(name=name, **{setting: base.setting(setting) * by for setting, by in (times or {}).items()})


_PAPER = RunSize(2000, 100, seeds=(0, 1, 2), tests=20)
_STOPPED = RunSize(100, 20, tests=1, contexts=2, stop_at_argmax=3)
"""What is cheap enough for two cores: few contexts, and value searches that stop early."""
_MIDDLING = replace(_STOPPED, n=400, rounds_of=50, tests=2)
RUNS: dict[str, Run] = {
    run.name: run
    for run in (
        Run(
            "sequence",
            "What does each method learn, keep and spoil as edits go on?",
            _sequence,
            replace(_STOPPED, n=1000, rounds_of=100, seeds=(0, 1, 2), tests=3),
            _PAPER,
        ),
        Run("round_size", "Does it matter how many facts a round holds?", _round_size, _STOPPED, replace(_PAPER, n=1000)),
        Run("ablation", "What does each of NSE's four parts contribute?", _ablation, replace(_STOPPED, tests=2), _PAPER, "world"),
        Run("sensitivity", "How much do the settings matter?", _sensitivity, _STOPPED, replace(_PAPER, n=1000)),
        Run(
            "recipes",
            "Which changes to NSE and its relatives help? On facts and seeds for development.",
            _recipes,
            replace(_STOPPED, n=360, rounds_of=90, seeds=(10,), tests=2),
            replace(_PAPER, seeds=(10,), tests=2),
            "world-development",
        ),
        Run("orders", "Does it matter whether similar keys are packed together or spread apart?", _orders, _MIDDLING, _PAPER),
        Run(
            "long",
            "What is left after thousands of edits?",
            _long,
            replace(_STOPPED, n=3000, rounds_of=100, tests=4),
            replace(_PAPER, n=10_000),
            "world-all",
        ),
        Run("reuse", "Which neurons are written again, and is what they held lost?", _reuse, _MIDDLING, _PAPER),
        Run("anatomy", "What happens in one round?", _anatomy, RunSize(20, 20), RunSize(100, 100), "world"),
    )
}
"""Name → run."""


def find_run(name: str) -> Run:
    """Return a run by its name.

    Raises
    ------
    SettingError
        If there is none, with the nearest.
    """
    if name not in RUNS:
        raise SettingError(f"There is no run {name!r}.{nearest(name, RUNS)} Known: {', '.join(RUNS)}.")
    return RUNS[name]


def make_run(
    name: str,
    model: EditableModel,
    facts: Sequence[Fact],
    folder: str | Path,
    *,
    size: RunSize | None = None,
    preset: str | None = methods.DEFAULT_PRESET,
    settings: Mapping[str, Any] | None = None,
    only: Iterable[str] | None = None,
    written: bool = False,
    references: ReferenceTexts | None = None,
    corpus: Corpus | None = None,
    texts: bool = True,
    progress: bool = True,
) -> dict[str, Comparison]:
    """Run what a figure needs, or go on with it; every finished cell (a method under a seed) is in the folder at once.

    Parameters
    ----------
    name : str
        One of :data:`RUNS`.
    model : EditableModel
        The model, unedited.
    facts : sequence of Fact
        The first ``size.n`` are edited.
    folder : str or Path
        Where results go: ``<folder>/<name>/<part>``.
    size : RunSize, optional
        The size for the embedded model by default.
    preset : str, optional
        The preset that all methods start from.
    settings : mapping, optional
        Settings of all methods to change.
    only : iterable of str, optional
        Only methods of these names; the others can be added later.
    written : bool
        Also measure what the model writes about edited facts: the run ``sequence`` gets a table ``written``, with fluency.
    references : ReferenceTexts, optional
        Texts about things the new targets are true of (:func:`nse_tools.load_reference_texts`): ``written`` gets consistency too.
    corpus : Corpus, optional
        The text for C of all parts that do not ask how much is needed; each seed gets its own, sampled from the model, by default.
    texts : bool
        Keep the tables that quote facts (:data:`experiments.measurements.WITH_TEXTS`). Without them the results name facts by
        their ids only, so that they can be passed on where the facts cannot.
    progress : bool
        Show progress bars.

    Returns
    -------
    dict of str to Comparison
        What was asked for now, by part.

    Raises
    ------
    SettingError
        For an unknown run or method, too few facts, or a folder that holds another run.
    """
    run = find_run(name)
    size = size or run.size
    if len(facts) < size.n:
        raise SettingError(f"The run {name!r} edits {size.n} facts; there are {len(facts)}. Give more facts, or a smaller size (n).")
    early = {"v_stop_at_argmax": size.stop_at_argmax} if size.stop_at_argmax else {}
    parts = run.parts(Maker(preset, early | dict(settings or {})), size, model.n_layers)
    chosen = _chosen(parts, only)
    if (written or references) and name != "sequence":
        raise SettingError(f"written, references: what the model writes is measured in the run 'sequence', not in {name!r}.")
    further = {"written": partial(measurements.written, references=references)} if written or references else {}
    made = {}
    for part, own in parts.items():
        if not chosen[part]:
            continue
        _log.info("%s: part %s, %d methods", name, part, len(chosen[part]))
        rounds_of = own.rounds_of or size.rounds_of
        given = FactList(facts[: size.n])
        made[part] = compare(
            model,
            given if own.order == "shuffled" else order_facts(given, own.order, model=model, layer=own.methods[0].layers[0]),
            chosen[part],
            rounds_of=rounds_of,
            seeds=size.seeds,
            folder=Path(folder) / name / part,
            test_at=size.test_at(rounds_of),
            facts_of=own.facts_of,
            shuffle=own.order == "shuffled",
            corpus=_text(model, own, size.seeds[0], progress) or corpus,
            starters=STARTERS[: size.contexts] if own.starters is None else own.starters,
            also={table: measure for table, measure in own.also.items() if texts or table not in measurements.WITH_TEXTS} | further,
            progress=progress,
        )
    return made


def _text(model: EditableModel, part: Part, seed: int, progress: bool) -> Corpus | None:
    """Return a part's own text for C; without one, each seed gets its own of the usual length."""
    if part.tokens_per_neuron is None:
        return None
    return sample_corpus(model, n_tokens=round(part.tokens_per_neuron * model.d_ff), seed=seed, progress=progress)


def _chosen(parts: Mapping[str, Part], only: str | Iterable[str] | None) -> dict[str, list[Method]]:
    """Return the methods that are asked for, by part.

    Raises
    ------
    SettingError
        If a name is none of the run's methods.
    """
    known = dict.fromkeys(method.name for own in parts.values() for method in own.methods)
    wanted = list(known) if only is None else [only] if isinstance(only, str) else list(only)
    if unknown := [name for name in wanted if name not in known]:
        raise SettingError(f"only={unknown}: none of the run's methods.{nearest(unknown[0], known)} Known: {', '.join(known)}.")
    return {part: [method for method in own.methods if method.name in wanted] for part, own in parts.items()}
