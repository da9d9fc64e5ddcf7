"""Write the table of plans into docs/scaling.md, and the tables of versions and architectures into docs/models.md.

    python benchmarks/plans.py

No weights, no measurement: plans come from the configurations in the package, versions from constraints.txt.
"""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
import torch

from nse_tools.models.architecture import ARCHITECTURES
from nse_tools.planning.memory import needed
from nse_tools.planning.plans import plan
from report import fill, markdown

ROOT = Path(__file__).parents[1]
MODELS = ("gpt2-xl", "gpt-j-6b", "llama3-8b", "qwen2.5-7b", "llama3-70b")
FACTS, ROUNDS = 100, 20
RATE, RATE64 = 100.0, 1.0
"""Assumed rates, 10¹² operations a second: the model's products on one GPU, float64 on a server's processor."""
PACKAGES = ("torch", "transformers", "nnsight", "accelerate", "safetensors", "peft", "gguf")


def plans_table() -> pd.DataFrame:
    """Return one row a model and dtype: GB by step and place, and hours of all rounds at the assumed rates."""
    rows = []
    for name in MODELS:
        for dtype in (torch.float32, torch.bfloat16):
            made = plan(name, FACTS, ROUNDS, dtype=dtype)
            steps = made.steps().set_index("step")
            seconds = made.seconds(RATE, RATE64)
            a_round = sum(seconds[part] for part in ("values", "states", "keys", "solve", "apply"))
            layers = made.method.edited_layers
            rows.append(
                {
                    "model": name,
                    "dtype": str(dtype).removeprefix("torch."),
                    "layers": f"{layers[0]}–{layers[-1]}",
                    "weights GB": needed(made.parts, "load", "device") / 1e9,
                    **{f"{step}, device GB": steps.device_gb[step] for step in ("statistics", "values", "update")},
                    **{f"{step}, host GB": steps.host_gb[step] for step in ("statistics", "update")},
                    "10¹² operations a round": sum(made.operations[p] for p in ("values", "states", "keys", "solve", "apply")) / 1e12,
                    "seconds a round": a_round,
                }
            )
    return pd.DataFrame(rows)


def versions_table(constraints: Path = ROOT / "constraints.txt") -> pd.DataFrame:
    """Return the pinned versions of what models depend on."""
    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)$", constraints.read_text(encoding="utf-8"), re.MULTILINE))
    return pd.DataFrame([(name, pinned[name]) for name in PACKAGES], columns=["package", "tested with"])


def trees_table() -> pd.DataFrame:
    """Return the table of module trees that are recognised."""
    rows = [(name, f"`{a.layers}.N.{a.down}`", f"`{a.norm}`", f"`{a.unembedding}`") for name, a in ARCHITECTURES.items()]
    return pd.DataFrame(rows, columns=["models", "down projection", "final norm", "unembedding"])


PAGES = {"docs/scaling.md": {"plans": plans_table}, "docs/models.md": {"versions": versions_table, "trees": trees_table}}


def filled(page: str) -> str:
    """Return a page with its tables made anew."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for name, table in PAGES[page].items():
        text = fill(text, name, markdown(table()))
    return text


def main() -> None:
    """Fill the pages."""
    for page in PAGES:
        (ROOT / page).write_text(filled(page), encoding="utf-8")
        print(f"{page}: filled")


if __name__ == "__main__":
    main()
