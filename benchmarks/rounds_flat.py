"""Does a round take longer the more rounds came before? Rounds of a few facts, one after another, in one session.

    python benchmarks/rounds_flat.py --rounds 20 --of 5

The update (states, keys, solve, apply) is what could grow; the value search does not depend on earlier rounds and is made with few
``--steps`` here. ``rest_s`` is what a round takes beside both: summing the old keys, guards,
digests, the record.
"""

from __future__ import annotations

import math

import pandas as pd

from _machine import finish, parser, read, timed
from nse_tools import EditSession, FactList, known_facts, load_model, methods

EDGE = 3


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """Return seconds of the first and last round, and the ratio of the medians of the last and first three rounds."""
    rows = []
    for part in ("update_s", "rest_s"):
        seconds = frame[part]
        first, last = seconds.head(EDGE).median(), seconds.tail(EDGE).median()
        rows.append(
            {
                "part": part,
                "rounds": len(frame),
                "facts_per_round": frame.facts.iloc[0],
                "round_1": seconds.iloc[0],
                "round_last": seconds.iloc[-1],
                "median_first_3": first,
                "median_last_3": last,
                "last_to_first": last / first,
            }
        )
    return pd.DataFrame(rows)


def main() -> None:
    """Read the arguments, run, show, save."""
    made = parser(__doc__, "rounds_flat")
    made.add_argument("--rounds", type=int, default=20)
    made.add_argument("--of", type=int, default=5, help="facts in a round")
    made.add_argument("--steps", type=int, default=3, help="steps of the value search")
    chosen = read(made)
    # no band, so that every fact takes part in every pass and all rounds do the same work
    method = methods.nse(v_num_grad_steps=chosen.steps, alpha=0.0, upper_bound=math.inf)
    session = EditSession(load_model(), method, value_cache=False, progress=False)
    _ = session.contexts, session.moments  # made once, before the first round
    rows = []
    for number, batch in enumerate(FactList(list(known_facts())[: chosen.rounds * chosen.of]).rounds(of=chosen.of), start=1):
        done, seconds = timed(session.edit, batch)
        update = sum(done.seconds.values()) - done.seconds["values"]
        rest = seconds - sum(done.seconds.values())
        rows.append({"round": number, "facts": len(batch), "values_s": done.seconds["values"], "update_s": update, "rest_s": rest})
    finish(rows, summary, chosen, "seconds of a round, early and late")


if __name__ == "__main__":
    main()
