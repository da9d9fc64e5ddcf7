"""A long sequence on the embedded model, and what later rounds did to earlier facts: the stored run of notebook 04.

    python benchmarks/forgetting.py edit --method memit --rounds 10 --of 20 --sessions runs/forgetting
    python benchmarks/forgetting.py measure --method memit --sessions runs/forgetting --out docs/results/forgetting

``edit`` keeps every round on disk and, called again, goes on where it stopped. ``measure`` reads the rounds kept and writes small
tidy files, from which ``make figures`` and the notebook draw without a model.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import torch

from nse_tools import EditSession, known_facts, load_model, methods
from nse_tools.figures.long_sequence import LongSequence
from nse_tools.io.saved_session import holds_session

_log = logging.getLogger("forgetting")


def name_of(chosen: argparse.Namespace) -> str:
    """Return what the run is called: its method, and ``_w0`` where that takes values under other weights than by default."""
    return chosen.method + ("_w0" if chosen.values_under == "original" and chosen.method != "nse" else "")


def edit(chosen: argparse.Namespace) -> None:
    """Edit until there are ``--rounds`` rounds in the session's folder."""
    folder = chosen.sessions / name_of(chosen)
    model = load_model()
    if holds_session(folder):
        session = EditSession.load(folder, model, autosave=True, progress=False)
    else:
        settings = {"values_under": chosen.values_under} if chosen.values_under else {}
        method = getattr(methods, chosen.method)(v_stop_at_argmax=chosen.stop_at, **settings)
        session = EditSession(model, method, seed=chosen.seed, autosave=folder, progress=False)
    for batch in known_facts().rounds(of=chosen.of)[len(session) : chosen.rounds]:
        done = session.edit(batch)
        _log.info("round %d: %s, %.1f steps a fact", done.number, done.seconds, done.values.to_frame().steps.mean())


def measure(chosen: argparse.Namespace) -> None:
    """Measure the first ``--rounds`` rounds that the session's folder holds, and write the tables."""
    name = name_of(chosen)
    session = EditSession.load(chosen.sessions / name, load_model(), upto=chosen.rounds, progress=False)
    told = f"--method {chosen.method} --rounds {len(session)}" + (f" --values-under {chosen.values_under}" if chosen.values_under else "")
    made = f"python benchmarks/forgetting.py edit {told} --of {chosen.of} --stop-at {chosen.stop_at} --seed {session.seed}"
    file = LongSequence.of(session, name, [made, f"python benchmarks/forgetting.py measure {told}"]).save(chosen.out)
    _log.info("%s, %d bytes", file, file.stat().st_size)


def main() -> None:
    """Read the arguments and do what they ask."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("do", choices=["edit", "measure"])
    made.add_argument("--method", choices=["nse", "memit", "memit_seq"], default="memit")
    made.add_argument("--values-under", choices=["original", "current"], help="weights of the value search; the method's own by default")
    made.add_argument("--rounds", type=int, help="edit until there are so many, measure so many; all by default")
    made.add_argument("--of", type=int, default=20, help="facts in a round")
    made.add_argument("--stop-at", type=int, default=3, help="v_stop_at_argmax of the value search")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--sessions", type=Path, default=Path("runs/forgetting"), help="where sessions are kept")
    made.add_argument("--out", type=Path, default=Path("docs/results/forgetting"), help="where the tables go")
    made.add_argument("--threads", type=int, default=torch.get_num_threads())
    chosen = made.parse_args()
    torch.set_num_threads(chosen.threads)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    {"edit": edit, "measure": measure}[chosen.do](chosen)


if __name__ == "__main__":
    main()
