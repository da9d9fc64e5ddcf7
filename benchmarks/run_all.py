"""Run every benchmark, one after another, each in a process of its own.

    python benchmarks/run_all.py --out runs/bench
    python benchmarks/run_all.py --quick            # does everything still run? numbers mean nothing

A benchmark that fails is reported and the next one runs; the exit code is then 1.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent

RUNS: dict[str, tuple[str, str]] = {
    "value_search": ("--facts 1 4 16 64 --repeat 2", "--facts 1 2 --repeat 1"),
    "round": ("--facts 20 100 --plain-facts 4", "--facts 2 --plain-facts 1"),
    "scoring": ("--facts 20 --repeat 2", "--facts 2 --repeat 1"),
    "moments": ("--tokens 8000", "--tokens 300"),
    "wide": ("--d-ff 8192 --old 0 100 1000", "--d-model 128 --d-ff 512 --facts 3 --old 0 20"),
    "memory": ("--facts 20 100 --searches 200 --every 20", "--facts 2 --searches 4 --every 1 --steps 2"),
    "rounds_flat": ("--rounds 20 --of 5", "--rounds 3 --of 1"),
}
"""Benchmark → its arguments, and those of a quick run."""


def main() -> int:
    """Run what was chosen; return the exit code."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--quick", action="store_true", help="smallest settings, to see that everything runs")
    made.add_argument("--only", nargs="+", choices=list(RUNS), default=list(RUNS))
    made.add_argument("--threads", type=int, help="PyTorch's threads; its own choice by default")
    made.add_argument("--out", type=Path, help="folder of the csv files; runs/bench, or runs/bench-quick with --quick, by default")
    chosen = made.parse_args()
    folder = chosen.out or Path("runs/bench-quick" if chosen.quick else "runs/bench")
    failed = [name for name in chosen.only if not run(name, chosen.quick, folder, chosen.threads)]
    print(f"\n{len(chosen.only) - len(failed)} of {len(chosen.only)} benchmarks ran; csv files in {folder}")
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


def run(name: str, quick: bool, folder: Path, threads: int | None) -> bool:
    """Run one benchmark; say whether it ended well."""
    command = [sys.executable, str(HERE / f"{name}.py"), *RUNS[name][quick].split(), "--out", str(folder / f"{name}.csv")]
    if threads:
        command += ["--threads", str(threads)]
    print(f"\n== {name} {RUNS[name][quick]}", flush=True)
    start = time.perf_counter()
    code = subprocess.run(command).returncode
    print(f"-- {name}: {'done' if code == 0 else f'FAILED (exit code {code})'} after {time.perf_counter() - start:.0f} s", flush=True)
    return code == 0


if __name__ == "__main__":
    sys.exit(main())
