"""Floating-point rate of the value search against that of one large matrix product, measured in the same run.

    python benchmarks/rate.py --facts 1 16 --repeat 3

Operations of the search are those of the cost model (``nse_tools.planning``) for the rows and steps of the run. The product is a square
float32 one, once by ``torch.nn.functional.linear`` and once as the engine makes it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pandas as pd
import torch

from _machine import finish, parser, read, timed
from nse_tools import compute_values, known_facts, load_model, methods, sample_contexts
from nse_tools.models.kernels import fast_products
from nse_tools.planning.operations import search
from nse_tools.planning.shape import Shape
from nse_tools.planning.workload import load_of_rows
from nse_tools.steps._value_optimizer import search_rows
from value_search import warm_up

PRODUCTS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "product, PyTorch's": nullcontext,
    "product, the engine's": fast_products,
}


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the median rate of each work, and its share of the best product's."""
    rates = frame.groupby("work", sort=False).gflops_per_s.median()
    best = max(rate for work, rate in rates.items() if work in PRODUCTS)
    return pd.DataFrame({"work": rates.index, "gflops_per_s": rates.to_numpy(), "share_of_product": rates.to_numpy() / best})


@torch.no_grad()
def product(size: int, times: int) -> list[dict[str, Any]]:
    """Measure a square product either way, once each to warm up."""
    x, w = torch.randn(size, size), torch.randn(size, size)
    rows = []
    for name, how in PRODUCTS.items():
        with how():
            torch.nn.functional.linear(x, w)
            _, seconds = timed(lambda: [torch.nn.functional.linear(x, w) for _ in range(times)])
        operations = 2.0 * size**3 * times
        rows.append({"work": name, "operations": operations, "seconds": seconds, "gflops_per_s": operations / seconds / 1e9})
    return rows


def main() -> None:
    """Read the arguments, run, show, save."""
    made = parser(__doc__, "rate")
    made.add_argument("--facts", type=int, nargs="+", default=[1, 16], help="batch sizes of the search")
    made.add_argument("--size", type=int, default=3072, help="of the square product")
    made.add_argument("--times", type=int, default=4, help="products timed together")
    made.add_argument("--repeat", type=int, default=3)
    chosen = read(made)
    model, method = load_model(), methods.nse()
    shape, contexts, facts = Shape.of(model.hf.config), sample_contexts(model), known_facts()[100 : 100 + max(chosen.facts)]
    warm_up(model, facts[0], contexts, method)
    rows = []
    for number in range(chosen.repeat):
        rows += [{"run": number, **row} for row in product(chosen.size, chosen.times)]
        for n in chosen.facts:
            values, seconds = timed(compute_values, model, facts[:n], contexts, method)
            loads = [load_of_rows(search_rows(model, [fact], contexts)) for fact in facts[:n]]
            steps = values.to_frame().steps.tolist()
            done = sum(search(shape, method.last_layer, load, int(used)) for load, used in zip(loads, steps, strict=True))
            work = f"value search, {n} facts"
            rows.append({"run": number, "work": work, "operations": done, "seconds": seconds, "gflops_per_s": done / seconds / 1e9})
    finish(rows, summary, chosen, "rate, 10⁹ float32 operations per second")


if __name__ == "__main__":
    main()
