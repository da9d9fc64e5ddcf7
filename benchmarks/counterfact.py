"""Sequential edits of CounterFact records on the embedded model: the run of the closing table, from any CounterFact file.

    python benchmarks/counterfact.py counterfact.json --n 100 --rounds-of 20 --method nse --out runs/counterfact

Prints the scores per round and writes the same files as ``nse-tools demo``.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from rich.console import Console

from nse_tools import load_facts, load_model, methods
from nse_tools.cli import score_table
from nse_tools.figures.save import run_stream, save_stream


def main() -> None:
    """Read the arguments, run, show, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="CounterFact JSON")
    parser.add_argument("--n", type=int, default=100)
    parser.add_argument("--skip", type=int, default=0, help="leave out the first records")
    parser.add_argument("--rounds-of", type=int, default=20)
    parser.add_argument("--method", choices=["nse", "memit", "memit_seq"], default="nse")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("runs/counterfact"))
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    facts = load_facts(chosen.file)[chosen.skip : chosen.skip + chosen.n]
    start = time.perf_counter()
    result = run_stream(load_model(), facts, getattr(methods, chosen.method)(), rounds_of=chosen.rounds_of, seed=chosen.seed)
    save_stream(result, chosen.out)
    seconds = time.perf_counter() - start
    title = f"{chosen.method}, {len(facts)} records of {chosen.file.name}, seed {chosen.seed}, {chosen.threads} threads, {seconds:.0f} s"
    Console(width=140).print(score_table(result.scores, title))


if __name__ == "__main__":
    main()
