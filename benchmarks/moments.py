"""Key statistics, tokens per second: this engine against a plain pass, on the same text.

    python benchmarks/moments.py --tokens 8000 --repeat 1

Engine: all edited layers in one pass over batches, up to the last of them, with its cache in an empty temporary folder.
Plain: one layer a pass, one sequence at a time through the whole model, summed in float64; measured on ``--plain-layers``
layers and stated for all of them as ``plain_extrapolated_s``. The text is sampled from the model, as by default.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pandas as pd

from _machine import apart, finish, parser, read, timed
from nse_tools import EditableModel, load_model, methods, second_moments
from nse_tools.tracing.corpus import Corpus, sample_corpus
from nse_tools.tracing.moments import SecondMoments
from plain import plain_moments


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """Return medians over the runs: tokens per second for all layers, ratio, difference of C, tokens per second sampled."""
    columns = ["layers", "tokens", "engine_tokens_per_s", "plain_tokens_per_s", "plain_measured_layers", "ratio", "sampled_tokens_per_s"]
    return frame[columns].median().to_frame().T.assign(max_difference=frame.difference.max(), runs=len(frame))


def engine_moments(model: EditableModel, layers: tuple[int, ...], corpus: Corpus) -> SecondMoments:
    """Compute the statistics anew, whatever is cached."""
    with tempfile.TemporaryDirectory() as folder:
        return second_moments(model, layers, corpus, cache=Path(folder), progress=False)


def compare(model: EditableModel, layers: tuple[int, ...], corpus: Corpus, plain_layers: int) -> dict[str, Any]:
    """Compute the statistics either way."""
    found, engine = timed(engine_moments, model, layers, corpus)
    measured = layers[:plain_layers]
    expected, plain = timed(lambda: {layer: plain_moments(model, corpus, layer) for layer in measured})
    extrapolated = plain * len(layers) / len(measured)
    return {
        "layers": len(layers),
        "tokens": corpus.n_tokens,
        "engine_s": engine,
        "plain_s": plain,
        "plain_measured_layers": len(measured),
        "plain_extrapolated_s": extrapolated,
        "engine_tokens_per_s": corpus.n_tokens / engine,
        "plain_tokens_per_s": corpus.n_tokens / extrapolated,
        "ratio": extrapolated / engine,
        "difference": max(apart(found[layer], c) for layer, c in expected.items()),
    }


def main() -> None:
    """Read the arguments, run, show, save."""
    made = parser(__doc__, "moments")
    made.add_argument("--tokens", type=int, default=8_000)
    made.add_argument("--plain-layers", type=int, default=1)
    made.add_argument("--repeat", type=int, default=1)
    chosen = read(made)
    model, layers = load_model(), methods.nse().layers
    corpus, sampling = timed(sample_corpus, model, n_tokens=chosen.tokens, progress=False)
    written = {"sampled_tokens_per_s": corpus.n_tokens / sampling}
    rows = [{"run": number, **compare(model, layers, corpus, chosen.plain_layers), **written} for number in range(chosen.repeat)]
    finish(rows, summary, chosen, "key statistics, tokens per second for all edited layers")


if __name__ == "__main__":
    main()
