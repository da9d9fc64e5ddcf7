"""A panel to run methods against each other and watch the curves grow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ipywidgets as ui

from nse_tools import methods, plots
from nse_tools.data.fact import Fact
from nse_tools.methods.base import Method
from nse_tools.models.editable_model import EditableModel
from nse_tools.widgets import markup
from nse_tools.widgets.bench_control import BenchControl
from nse_tools.widgets.live_figure import LiveFigure
from nse_tools.widgets.panel import FILL, WIDE, Panel, button, field, marked


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
        Names that are ticked to begin with.
    n_facts, rounds_of : int
        How many facts, and how many in a round, to begin with.
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
        self.known = _by_name(methods)
        n = len(self.control.facts)
        ticked = [name for name in chosen if name in self.known]
        self.methods = ui.SelectMultiple(options=list(self.known), value=ticked, rows=min(9, len(self.known)), layout=FILL)
        self.n_facts = ui.BoundedIntText(value=min(n_facts, n), min=1, max=n, layout=FILL)
        self.rounds_of = ui.BoundedIntText(value=min(rounds_of, n), min=1, max=n, layout=FILL)
        self.run_button = button("Run", "nse-do-run", self._run, icon="play", button_style="primary")
        self.stop_button = button(
            "Stop", "nse-do-stop", self._stop, icon="stop", disabled=True, tooltip="after the round that is being made"
        )
        self.curves, self.table_view = LiveFigure("nse-curves", height=360), marked(ui.HTML(layout=WIDE), "nse-summary")
        super().__init__(
            "Methods side by side",
            "The same facts, contexts and key statistics for all; the model is left as it was.",
            self._body(),
            [self.methods, self.n_facts, self.rounds_of, self.run_button],
        )

    def refresh(self) -> None:
        """Draw what has been measured so far."""
        tables = self.control.tables()
        self.stop_button.disabled = not self.run_button.disabled
        if tables:
            fig = plots.scores(tables, [m for m in ("score", "specificity") if all(m in t for t in tables.values())])
            self.curves.show(fig.update_xaxes(range=[0, self.n_facts.value + 0.5]))
        self.table_view.value = self._table_html()

    def static_html(self) -> str:
        """Return the table of methods as plain HTML."""
        return self.table_view.value or markup.note("Nothing has been run yet.")

    def _table_html(self) -> str:
        table = self.control.summary()
        halts = "".join(markup.note(f"{name} could not go on: {why}") for name, why in self.control.stopped.items())
        return (markup.section("So far", markup.frame(table.round(1)), "percent, on all facts edited so far") if len(table) else "") + halts

    def _body(self) -> list[Any]:
        buttons = ui.HBox([self.run_button, self.stop_button])
        numbers = ui.VBox([field("Facts", "nse-n-facts", self.n_facts), field("In a round", "nse-rounds-of", self.rounds_of), buttons])
        choice = ui.VBox([field("Methods (ctrl-click for several)", "nse-methods", self.methods)], layout=ui.Layout(width="240px"))
        row = ui.HBox([choice, numbers], layout=ui.Layout(grid_gap="16px"))
        return [row, self.curves.box, self.table_view]

    def _run(self) -> None:
        chosen, n_facts, rounds_of = list(self.methods.value), self.n_facts.value, self.rounds_of.value
        self.say_code(self.control.code(chosen, n_facts, rounds_of))
        self.run_live(self.control.steps([self.known[name] for name in chosen], n_facts, rounds_of), self.refresh)

    def _stop(self) -> None:
        self.stopping = True


def _by_name(given: Sequence[Method | str] | None) -> dict[str, Method | str]:
    return {m if isinstance(m, str) else m.name: m for m in (methods.names() if given is None else given)}
