"""Run several methods on the same facts, a round at a time, and watch their curves grow: :class:`MethodBench`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import ipywidgets as ui
import pandas as pd

from nse_tools import methods, plots
from nse_tools.data.fact import Fact
from nse_tools.data.fact_list import FactList
from nse_tools.editing.session import EditSession
from nse_tools.errors import EditError, FactError, SettingError
from nse_tools.methods.base import Method
from nse_tools.models.editable_model import EditableModel
from nse_tools.models.weights import weights_in_place
from nse_tools.tracing.contexts import Contexts, sample_contexts
from nse_tools.tracing.moments import second_moments
from nse_tools.widgets import _markup as markup
from nse_tools.widgets._panel import FILL, LiveFigure, Panel, Step, Steps, button, html_view, labelled, quiet

_MEASURES = ["round", "facts", "efficacy", "efficacy_accuracy", "generalization", "specificity", "score"]


@dataclass
class _Lane:
    """One method on the bench."""

    method: Method
    session: EditSession
    rows: list[pd.DataFrame] = field(default_factory=list)
    stopped: str | None = None


class BenchControl:
    """Let methods edit the same facts side by side: each step is one round of one method.

    Between two steps the model has, bit for bit, the weights it had before: whatever is run meanwhile finds it as it was,
    and stopping needs no cleaning up. Contexts, key statistics and results are those of :func:`nse_tools.compare`.

    Parameters
    ----------
    model : EditableModel
        The model; edits of other sessions may be in it, the bench works from its original weights.
    facts : sequence of Fact
        The facts to choose from.
    seed : int
        Seed of contexts and of the text for the key statistics.
    """

    def __init__(self, model: EditableModel, facts: Sequence[Fact], seed: int = 0) -> None:
        self.model, self.seed = model, seed
        self.facts = facts if isinstance(facts, FactList) else FactList(facts)
        if not len(self.facts):
            raise FactError("The bench needs facts to edit.")
        self._lanes: list[_Lane] = []
        self._contexts: Contexts | None = None

    def steps(self, chosen: Sequence[Method | str], n_facts: int, rounds_of: int) -> Steps:
        """Work round by round, in each one method after another; after every step :meth:`tables` has grown.

        Raises
        ------
        SettingError
            If there are no methods, two of one name, or not that many facts.
        """
        if not 1 <= n_facts <= len(self.facts):
            raise SettingError(f"n_facts={n_facts!r}: there are 1 to {len(self.facts)} facts to choose from.")
        batches = self.facts[:n_facts].rounds(of=rounds_of)
        compared = [m if isinstance(m, Method) else methods.get(m) for m in chosen]
        if not compared or len({m.name for m in compared}) < len(compared):
            raise SettingError(f"Choose at least one method, none twice (chosen: {[m.name for m in compared]}).")
        total = 1 + len(compared) * len(batches)
        self._lanes = []
        yield Step("contexts and key statistics", 0, total)
        self._lanes = self._open(compared)
        for number, batch in enumerate(batches):
            for place, lane in enumerate(self._lanes, start=1):
                if lane.stopped is None:
                    yield Step(f"{lane.method.name}, round {number + 1} of {len(batches)}", number * len(compared) + place, total)
                    self._edit(lane, batch)

    def tables(self) -> dict[str, pd.DataFrame]:
        """Return per method what ``session.scores()`` says of the rounds made so far."""
        return {lane.method.name: pd.concat(lane.rows, ignore_index=True) for lane in self._lanes if lane.rows}

    @property
    def stopped(self) -> dict[str, str]:
        """Methods that could not continue, and why."""
        return {lane.method.name: lane.stopped for lane in self._lanes if lane.stopped is not None}

    def summary(self) -> pd.DataFrame:
        """Return one row per method: the measures on all facts edited so far."""
        ends = [{"method": name, **table.iloc[-1].reindex(_MEASURES)} for name, table in self.tables().items()]
        return pd.DataFrame(ends).dropna(axis="columns", how="all") if ends else pd.DataFrame()

    def code(self, chosen: Sequence[str], n_facts: int, rounds_of: int) -> str:
        """Return the line that does the same in one go."""
        return f"nse.compare(model, facts[:{n_facts}], {list(chosen)!r}, rounds_of={rounds_of}, seeds=[{self.seed}])"

    def _open(self, compared: Sequence[Method]) -> list[_Lane]:
        with self._as_loaded():
            for method in compared:  # what a session refuses is refused before anything is run; originals are kept
                EditSession(self.model, method, value_cache=False)
            contexts = self._contexts = self._contexts or sample_contexts(self.model, self.seed)
            layers = sorted({layer for method in compared for layer in method.layers})
            moments = second_moments(self.model, layers, seed=self.seed, progress=False)
            return [
                _Lane(method, EditSession(self.model, method, contexts=contexts, moments=moments, seed=self.seed, progress=False))
                for method in compared
            ]

    def _edit(self, lane: _Lane, batch: FactList) -> None:
        session = lane.session
        with self._as_loaded(), weights_in_place(self.model, session.weights_at(len(session))), quiet(session):
            try:
                session.edit(batch)
            except EditError as error:
                lane.stopped = str(error)
                return
            lane.rows.append(session.scores(round=len(session), with_perplexity=False))

    @contextmanager
    def _as_loaded(self) -> Iterator[None]:
        """Lock the model and work from its original weights; then put the current weights back."""
        with self.model.lock, self.model.original_weights():
            yield


class MethodBench(Panel):
    """Choose methods, facts and round size; the curves grow round by round. The model is left as it was, bit for bit.

    Parameters
    ----------
    model : EditableModel
        The model.
    facts : sequence of Fact
        The facts to choose from.
    methods : sequence of Method or str, optional
        The methods to choose from, or their names; all registered ones by default.
    chosen : sequence of str
        Names of the methods that are selected to begin with.
    n_facts, rounds_of : int
        How many facts, and how many per round, to begin with.
    seed : int
        Seed of contexts and key statistics.

    Notes
    -----
    ``control`` (:class:`BenchControl`) does all of it without a front end.
    """

    def __init__(
        self,
        model: EditableModel,
        facts: Sequence[Fact],
        methods: Sequence[Method | str] | None = None,
        *,
        chosen: Sequence[str] = ("nse", "memit_seq"),
        n_facts: int = 10,
        rounds_of: int = 5,
        seed: int = 0,
    ) -> None:
        self.control = BenchControl(model, facts, seed)
        self.by_name = _by_name(methods)
        n = len(self.control.facts)
        selected = [name for name in chosen if name in self.by_name]
        self.methods = ui.SelectMultiple(options=list(self.by_name), value=selected, rows=min(9, len(self.by_name)), layout=FILL)
        self.n_facts = ui.BoundedIntText(value=min(n_facts, n), min=1, max=n, layout=FILL)
        self.rounds_of = ui.BoundedIntText(value=min(rounds_of, n), min=1, max=n, layout=FILL)
        self.run_button = button("Run", "nse-do-run", self._run, icon="play", button_style="primary")
        self.stop_button = button("Stop", "nse-do-stop", self._stop, icon="stop", disabled=True, tooltip="after the current round")
        self.curves, self.table_view = LiveFigure("nse-curves", height=360), html_view("nse-summary")
        about = "The same facts, contexts and key statistics for all; the model is left as it was."
        super().__init__("Methods side by side", about, self._body(), [self.methods, self.n_facts, self.rounds_of, self.run_button])

    def refresh(self) -> None:
        """Draw what has been measured so far."""
        tables, summary = self.control.tables(), self.control.summary()
        self.stop_button.disabled = not self.run_button.disabled
        if tables:
            fig = plots.scores(tables, [m for m in ("score", "specificity") if all(m in t for t in tables.values())])
            self.curves.show(fig.update_xaxes(range=[0, self.n_facts.value + 0.5]))
        table = markup.section("So far", markup.frame(summary.round(1)), "percent, on all facts edited so far") if len(summary) else ""
        halts = (markup.note(f"{name} could not continue: {why}") for name, why in self.control.stopped.items())
        self.table_view.value = "".join([table, *halts])

    def static_html(self) -> str:
        """Return the table of methods as plain HTML."""
        return self.table_view.value or markup.note("Nothing has been run yet.")

    def _body(self) -> list[ui.Widget]:
        buttons = ui.HBox([self.run_button, self.stop_button])
        facts = labelled("Facts", "nse-n-facts", self.n_facts)
        numbers = ui.VBox([facts, labelled("Per round", "nse-rounds-of", self.rounds_of), buttons])
        choice = ui.VBox([labelled("Methods (ctrl-click for several)", "nse-methods", self.methods)], layout=ui.Layout(width="240px"))
        return [ui.HBox([choice, numbers], layout=ui.Layout(grid_gap="16px")), self.curves.box, self.table_view]

    def _run(self) -> None:
        chosen, n_facts, rounds_of = list(self.methods.value), self.n_facts.value, self.rounds_of.value
        self.show_code(self.control.code(chosen, n_facts, rounds_of))
        self.run_live(self.control.steps([self.by_name[name] for name in chosen], n_facts, rounds_of), self.refresh)

    def _stop(self) -> None:
        self.stopping = True


def _by_name(given: Sequence[Method | str] | None) -> dict[str, Method | str]:
    return {m if isinstance(m, str) else m.name: m for m in (methods.names() if given is None else given)}
