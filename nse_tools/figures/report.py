"""A session as one HTML page for a paper's appendix: no network, no scripts, every text escaped."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd

from nse_tools._provenance import machine, versions
from nse_tools._repr import table_html
from nse_tools.editing.edit_round import EditRound
from nse_tools.editing.session import EditSession
from nse_tools.errors import StorageError
from nse_tools.figures.save import make_folder
from nse_tools.metrics.forgetting import ForgettingMatrix, forgetting_matrix, session_scores, usual_measure

_STYLE = """
body { font: 14px/1.45 Helvetica, Arial, sans-serif; color: #222; max-width: 75em; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin-top: 2em; border-bottom: 1px solid #ccc; }
table { border-collapse: collapse; margin: .6em 0; font-size: 12px; }
th, td { border: 1px solid #ddd; padding: .2em .5em; text-align: left; }
th { background: #f3f3f3; } .wide { overflow-x: auto; } .bad { color: #b00020; font-weight: bold; } td.n { text-align: right; }
"""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


@dataclass(frozen=True)
class Report:
    """A session's report.

    Parameters
    ----------
    title : str
        What it is of.
    body : str
        The sections, as HTML without scripts.
    path : Path, optional
        Where it was written.
    """

    title: str
    body: str = field(repr=False)
    path: Path | None = None

    @property
    def html(self) -> str:
        """The whole page; it loads nothing and runs nothing, and says so to the browser."""
        title = html.escape(self.title)
        return (
            f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
            f"<title>{title}</title><style>{_STYLE}</style></head>\n<body><h1>{title}</h1>\n{self.body}</body></html>\n"
        )

    def save(self, path: str | Path) -> Path:
        """Write the page to a file.

        Raises
        ------
        StorageError
            If it cannot be written.
        """
        file = Path(path)
        make_folder(file.parent)
        try:
            file.write_text(self.html, encoding="utf-8")
        except OSError as wrong:
            raise StorageError(f"The report could not be written to {file}: {wrong}. Give another path.") from wrong
        return file

    def __repr__(self) -> str:
        return f"Report({self.title!r}, {len(self.html) / 1000:.0f} kB{f', in {self.path}' if self.path else ''})"

    def _repr_html_(self) -> str:
        return f"<h1>{html.escape(self.title)}</h1>{self.body}"


def session_report(session: EditSession, path: str | Path | None = None, *, measure: bool = True) -> Report:
    """Gather everything that an appendix needs about a session into one page.

    Model identity, versions and machine; seed, settings, contexts, source of C; the rounds, their updates and digests, and
    whether the weights can be made again from the record; what changed; scores after each round and the forgetting matrix;
    every fact with what became of it.

    Parameters
    ----------
    session : EditSession
        The session.
    path : str or Path, optional
        Where the page is written to; nowhere by default.
    measure : bool
        Whether scores and forgetting are part of it; they are measured if they have not been yet.

    Raises
    ------
    StorageError
        If the page cannot be written.
    """
    n_facts = sum(len(batch) for batch in session.facts)
    title = f"{session.method.name} on {session.model.name}: {len(session)} rounds, {n_facts} facts"
    sections = {
        "Model": _pairs(_model(session)),
        "Software and machine": _pairs({**versions(), **machine(), "written (UTC)": datetime.now(UTC).isoformat(timespec="seconds")}),
        "Settings": f"<p>Seed of contexts and sampled text: {session.seed}.</p>" + _table(session.method.to_frame()),
        **_inputs(session),
        "Rounds": _rounds(session),
        "Weights": _weights(session),
        **(_measured(session) if measure and len(session) else {}),
        "Facts": _table(_facts(session)),
    }
    body = "".join(f"<h2>{html.escape(name)}</h2>\n<div class='wide'>{content}</div>\n" for name, content in sections.items())
    report = Report(title, body)
    return report if path is None else Report(title, body, report.save(path))


def _model(session: EditSession) -> dict[str, Any]:
    model = session.model
    return {
        "name": model.name,
        "class": type(model.hf).__name__,
        "fingerprint of the unedited model": model.fingerprint(),
        "layers": model.n_layers,
        "d_model": model.d_model,
        "d_ff": model.d_ff,
        "parameters": f"{sum(p.numel() for p in model.hf.parameters()):,}",
        "dtype of edited weights": model.dtype,
        "device": model.device,
        "edited parameters": ", ".join(model.weight_name(layer) for layer in session.method.edited_layers),
    }


def _inputs(session: EditSession) -> dict[str, str]:
    contexts, moments = session.known_inputs()
    said = f"<p>{html.escape(repr(moments))}</p>" + _table(moments.to_frame()) if moments else "<p>None were computed.</p>"
    return {
        "Contexts": f"<p>{html.escape(repr(contexts))}</p>" + _table(contexts.to_frame()) if contexts else "<p>None were sampled.</p>",
        "Key statistics C": said,
    }


def _rounds(session: EditSession) -> str:
    if not len(session):
        return "<p>No rounds.</p>"
    notes = "".join(f"<p class='bad'>Round {r.number} is approximate: {html.escape(r.approximate)}.</p>" for r in session if r.approximate)
    steps = pd.concat([r.to_frame() for r in session], ignore_index=True)
    return notes + _table(session.to_frame()) + "<p>Every update:</p>" + _table(steps)


def _weights(session: EditSession) -> str:
    found = session.verify()
    verdict = f"<p{'' if found.ok else ' class=bad'}>{html.escape(repr(found))}</p>"
    if found.wrong_rounds:  # then there is no state to compare with
        return verdict + _table(found.to_frame())
    return verdict + _table(found.to_frame()) + "<p>Changed since the unedited model:</p>" + _table(session.changed_parameters().to_frame())


def _measured(session: EditSession) -> dict[str, str]:
    matrix = forgetting_matrix(session, usual_measure(session))
    return {
        "Scores": "<p>Percent, on all facts edited so far; round 0 is the unedited model on the first round's facts.</p>"
        + _table(session_scores(session)),
        "Forgetting": f"<p>{html.escape(repr(matrix))}</p>" + _heat(matrix),
    }


def _heat(matrix: ForgettingMatrix) -> str:
    """Return M[t, s] as a table whose cells are the darker the larger."""
    head = "".join(f"<th>{s}</th>" for s in range(1, matrix.n_rounds + 1))
    rows = []
    for t in range(matrix.n_rounds):
        cells = "".join(
            f"<td class='n' style='background: rgba(0,114,178,{0.6 * float(v) / 100:.3f})'>{float(v):.1f}</td>"
            for v in matrix.values[t, : t + 1]
        )
        rows.append(f"<tr><th>{t + 1}</th>{cells}</tr>")
    return f"<table><tr><th>after round \\ facts of round</th>{head}</tr>{''.join(rows)}</table>"


def _facts(session: EditSession) -> pd.DataFrame:
    return pd.concat([_facts_of(r) for r in session], ignore_index=True) if len(session) else pd.DataFrame()


def _facts_of(done: EditRound) -> pd.DataFrame:
    searched = done.values.to_frame()
    table = done.facts.to_frame().drop(columns=["paraphrases", "neighborhood"])
    table.insert(0, "round", done.number)
    return table.assign(
        left_out=[done.skipped.get(fact, "") for fact in done.facts.ids],
        p_before=searched.probability_before.to_numpy(),
        p_searched=searched.probability.to_numpy(),
        stop=searched.stop.to_numpy(),
        residual_after=done.final_residuals,
    )


def _pairs(pairs: Mapping[str, Any]) -> str:
    return _table(pd.DataFrame([(name, str(value)) for name, value in pairs.items()], columns=["", "value"]))


def _table(frame: pd.DataFrame) -> str:
    with pd.option_context("display.max_colwidth", None):  # an appendix cuts nothing off
        return table_html(frame)
