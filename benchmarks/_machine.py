"""What all benchmarks share: the arguments, the clock, what machine it is, and how a table is printed and saved."""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
import torch

Result = TypeVar("Result")

MACHINE = ("cpu", "cores", "threads", "torch")
"""Columns that every csv file ends with."""


def parser(doc: str | None, name: str) -> argparse.ArgumentParser:
    """Return a parser with the arguments that every benchmark has: ``--threads`` and ``--out``."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--threads", type=int, default=torch.get_num_threads(), help="PyTorch's threads")
    made.add_argument("--out", type=Path, default=Path(f"runs/bench/{name}.csv"), help="csv file to write")
    return made


def read(made: argparse.ArgumentParser) -> argparse.Namespace:
    """Read the command line and set the thread count."""
    chosen = made.parse_args()
    torch.set_num_threads(chosen.threads)
    return chosen


def cpu_name() -> str:
    """Return the processor's model name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    named = [line.partition(":")[2].strip() for line in lines if line.lower().startswith("model name")]
    return named[0] if named else platform.machine()


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine() -> dict[str, Any]:
    """Return the machine's columns: processor, cores, threads in use, PyTorch's version."""
    return {"cpu": cpu_name(), "cores": cores(), "threads": torch.get_num_threads(), "torch": torch.__version__}


def timed(work: Callable[..., Result], *args: Any, **options: Any) -> tuple[Result, float]:
    """Call a function; return its result and the seconds it took."""
    start = time.perf_counter()
    result = work(*args, **options)
    return result, time.perf_counter() - start


def finish(rows: list[dict[str, Any]], summary: Callable[[pd.DataFrame], pd.DataFrame], chosen: argparse.Namespace, title: str) -> None:
    """Write all rows with the machine's columns to ``--out``; print the summary below a title and the machine."""
    frame = pd.DataFrame(rows).assign(**machine())
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    frame.to_csv(chosen.out, index=False)
    print(title)
    print(", ".join(f"{name} {value}" for name, value in machine().items()))
    print(summary(frame).to_string(index=False, float_format="{:.4g}".format), flush=True)


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return ‖found − expected‖/‖expected‖."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())
