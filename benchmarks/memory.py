"""Peak resident memory of a round, and whether memory stays flat over many value searches.

    python benchmarks/memory.py --facts 20 100 --searches 200

Each round runs in a process of its own, with the key statistics taken from the cache. The searches run one after another, one fact
each, in one process; resident memory is noted every ``--every`` of them. Resident memory is read from /proc; on other
systems only the peak is known.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from _machine import finish, parser, read

MB = 2**20


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """Return one row a round size; of the searches the first and last memory and the growth per search."""
    rounds = frame[frame.work == "round"][["work", "n", "loaded_mb", "resident_mb", "peak_mb"]]
    searches = frame[frame.work == "searches"]
    if len(searches) < 2:
        return rounds
    # the first note is left out: allocators still grow then
    steady = searches.iloc[1:] if len(searches) > 2 else searches
    growth = (steady.resident_mb.iloc[-1] - steady.resident_mb.iloc[0]) / (steady.n.iloc[-1] - steady.n.iloc[0])
    last = searches.iloc[[-1]][["work", "n", "loaded_mb", "resident_mb", "peak_mb"]].assign(growth_mb_per_search=growth)
    return pd.concat([rounds, last], ignore_index=True)


def _status(name: str) -> float | None:
    """Return an entry of /proc/self/status in megabytes; None where there is none."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith(f"{name}:")]
    return int(found[0]) * 1024 / MB if found else None


def peak() -> float:
    """Return this process's peak resident memory in megabytes."""
    if (known := _status("VmHWM")) is not None:  # of this program alone; ru_maxrss may begin with the parent's
        return known
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MB


def resident() -> float:
    """Return this process's resident memory in megabytes; NaN where it cannot be read."""
    known = _status("VmRSS")
    return float("nan") if known is None else known


def one_round(n: int) -> list[dict[str, Any]]:
    """Make a round of n facts in this process."""
    from nse_tools import EditSession, FactList, known_facts, load_model, methods

    model = load_model()
    loaded = resident()
    session = EditSession(model, methods.nse(), value_cache=False, progress=False)
    session.edit(FactList(list(known_facts())[:n]))
    return [{"work": "round", "n": n, "loaded_mb": loaded, "resident_mb": resident(), "peak_mb": peak()}]


def prepare() -> list[dict[str, Any]]:
    """Have the key statistics in the cache, so that no round's peak is that of computing them."""
    from nse_tools import load_model, methods, second_moments

    second_moments(load_model(), methods.nse().layers, progress=False)
    return []


def many_searches(times: int, every: int, steps: int) -> list[dict[str, Any]]:
    """Search values of one fact after another in this process."""
    from nse_tools import compute_values, known_facts, load_model, methods, sample_contexts

    model, method = load_model(), methods.nse(v_num_grad_steps=steps)
    loaded, contexts, facts = resident(), sample_contexts(model), known_facts()
    rows = []
    for number in range(1, times + 1):
        compute_values(model, [facts[number % len(facts)]], contexts, method)
        if number % every == 0:
            rows.append({"work": "searches", "n": number, "loaded_mb": loaded, "resident_mb": resident(), "peak_mb": peak()})
    return rows


CHILDREN: dict[str, Callable[..., list[dict[str, Any]]]] = {"prepare": prepare, "round": one_round, "searches": many_searches}


def in_child(chosen: argparse.Namespace, *what: str) -> list[dict[str, Any]]:
    """Run this file in a new process; return the rows it prints as its last line."""
    command = [sys.executable, __file__, "--threads", str(chosen.threads), "--child", *what]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return list(json.loads(done.stdout.strip().splitlines()[-1]))


def main() -> None:
    """Read the arguments, run, show, save."""
    made = parser(__doc__, "memory")
    made.add_argument("--facts", type=int, nargs="+", default=[20, 100], help="sizes of the rounds")
    made.add_argument("--searches", type=int, default=200)
    made.add_argument("--every", type=int, default=20, help="searches between two notes")
    made.add_argument("--steps", type=int, default=5, help="steps of each of the many searches")
    made.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    chosen = read(made)
    if chosen.child:
        kind, *numbers = chosen.child
        print(json.dumps(CHILDREN[kind](*map(int, numbers))))
        return
    in_child(chosen, "prepare")
    rows = [row for n in chosen.facts for row in in_child(chosen, "round", str(n))]
    rows += in_child(chosen, "searches", str(chosen.searches), str(chosen.every), str(chosen.steps))
    if any(row["resident_mb"] != row["resident_mb"] for row in rows):
        print("this system has no /proc: only peaks are known")
    finish(rows, summary, chosen, "resident memory, megabytes (2²⁰ bytes)")


if __name__ == "__main__":
    main()
