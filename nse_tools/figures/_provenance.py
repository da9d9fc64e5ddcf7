"""Where results come from: model, settings, inputs, versions and machine of a session, as plain data."""

from __future__ import annotations

from nse_tools._provenance import machine, versions
from nse_tools.editing.session import EditSession


def settings_of(session: EditSession) -> dict[str, object]:
    """Return all that a session's results depend on, as plain data for a JSON file."""
    return {
        "model": session.model.name,
        "model_fingerprint": session.model.fingerprint(),
        "method": session.method.to_dict(),
        "seed": session.seed,
        "contexts": list(session.contexts.prefixes),
        "moments": {"n_tokens": session.moments.n_tokens, "source": session.moments.source},
        "facts": [batch.ids for batch in session.facts],
        "versions": versions(),
        "machine": machine(),
    }
