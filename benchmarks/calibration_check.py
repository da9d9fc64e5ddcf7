"""Are settings proposed by ``nse.calibrate`` as good as the hand-tuned preset's? The same stream of edits with both.

    python benchmarks/calibration_check.py --seed 0 --start 200 --out runs/calibration.csv

Calibrated on facts 100–139 of ``known_facts()``; the stream is 40 other facts in rounds of 20, all tested at the end. The seed is
that of sample, noise, contexts and the text for C.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import pandas as pd

from nse_tools import EditableModel, EditSession, FactList, calibrate, known_facts, load_model, methods, perplexity, score_facts
from nse_tools.methods.base import Method


def main() -> None:
    """Read the arguments, run, show, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=200, help="first fact of the stream; facts 0–99 are the demo's, 100–139 calibrate")
    parser.add_argument("--out", type=Path, default=Path("runs/calibration.csv"))
    chosen = parser.parse_args()
    model, start = load_model(), time.perf_counter()
    found = calibrate(model, known_facts()[100:140], seed=chosen.seed, progress=False)
    print(f"{found!r}\ncalibrated in {time.perf_counter() - start:.0f} s\n{found.to_frame().to_string(index=False)}")
    table = beside_preset(model, found.method, known_facts()[chosen.start : chosen.start + 40], chosen.seed)
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(chosen.out, index=False)
    print(table.to_string(index=False))


def beside_preset(model: EditableModel, method: Method, facts: FactList, seed: int) -> pd.DataFrame:
    """Edit the same facts with the preset and with another method; return one row each, measured at the end."""
    rows = []
    for name, each in {"preset": methods.nse(), "calibrated": method}.items():
        session = EditSession(model, each, seed=seed, progress=False)
        session.edit_all(facts, rounds_of=20)
        rows.append({"settings": name, **score_facts(model, facts).summary().round(1), "perplexity": round(perplexity(model), 1)})
        rows[-1]["not_edited"] = int(session.to_frame().not_edited.sum())
        session.rewind(to=0)
    return pd.DataFrame(rows)


if __name__ == "__main__":
    main()
