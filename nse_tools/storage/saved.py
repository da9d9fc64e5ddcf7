"""A saved session to look at, without its model."""

from __future__ import annotations

from dataclasses import dataclass, field

import pandas as pd

from nse_tools._show import table_html
from nse_tools.editing.round_list import Rounds
from nse_tools.storage.manifest import Manifest


@dataclass(frozen=True)
class SavedSession:
    """A session as it is on disk; looking at it needs no model.

    Parameters
    ----------
    about : Manifest
        What it is.
    rounds : Rounds
        Its rounds, oldest first.
    lost : str, optional
        What had to be left out at the end, and why.
    """

    about: Manifest = field(repr=False)
    rounds: Rounds
    lost: str | None = None

    def to_frame(self) -> pd.DataFrame:
        """Return one row a pass and layer, as the rounds' own tables have."""
        return pd.concat([r.to_frame() for r in self.rounds], ignore_index=True) if len(self.rounds) else pd.DataFrame()

    def __repr__(self) -> str:
        facts = sum(held.n_facts for held in self.rounds.held)
        left_out = f"; lost: {self.lost}" if self.lost else ""
        return (
            f"SavedSession({self.about.model.name}: {len(self.rounds)} rounds, {facts} facts, {self.about.method!r}, "
            f"written {self.about.written}{left_out})"
        )

    def _repr_html_(self) -> str:
        return table_html(self.to_frame(), head=self)
