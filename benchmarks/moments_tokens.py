"""How good must C be? Key statistics from fewer and fewer tokens, against those of the most, and the Score they lead to.

    python benchmarks/moments_tokens.py --out docs/moments_tokens.csv

Values are computed once (they do not depend on C); each line edits 60 facts of "world" in rounds of 20 with another C. The
facts are development facts: those that the demo does not use.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
import torch

from nse_tools import EditSession, known_facts, load_model, methods, perplexity, sample_contexts, score_facts, second_moments
from nse_tools.editing.edit_round import EditRound
from nse_tools.errors import EditError
from nse_tools.tracing.corpus import Corpus, sample_corpus
from nse_tools.tracing.moments import SecondMoments


def main() -> None:
    """Read the arguments, run, show, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1_000, 2_000, 5_000, 15_000, 40_000])
    parser.add_argument("--out", type=Path, default=Path("runs/moments_tokens.csv"))
    chosen = parser.parse_args()
    model, method = load_model(), methods.nse()
    facts, contexts = known_facts()[100:160], sample_contexts(model)
    whole = sample_corpus(model, n_tokens=max(chosen.tokens), seed=1)
    best = second_moments(model, method.layers, whole)
    rounds: list[EditRound] = []
    rows = []
    for tokens in sorted(chosen.tokens, reverse=True):
        moments = second_moments(model, method.layers, _part(whole, tokens))
        row = {"tokens": moments.n_tokens, "tokens_per_neuron": moments.n_tokens / model.d_ff, "distance": _distance(moments, best)}
        session = EditSession(model, method, contexts=contexts, moments=moments, progress=False)
        try:
            for number, batch in enumerate(facts.rounds(of=20)):
                done = session.edit(batch, values=rounds[number].values if number < len(rounds) else None)
                rounds += [done] if number == len(rounds) else []
        except EditError as singular:  # fewer tokens than neurons
            print(f"{tokens} tokens: {singular}")
        else:
            summary = score_facts(model, facts).summary()
            row |= {"score": summary["score"], "accuracy": summary["efficacy_accuracy"], "specificity": summary["specificity"]}
            row |= {"perplexity": perplexity(model)}
        rows.append(row)
        session.rewind(to=0)
    table = pd.DataFrame(rows).sort_values("tokens").round(3)
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(chosen.out, index=False)
    print(table.to_string(index=False))


def _part(corpus: Corpus, tokens: int) -> Corpus:
    kept, count = [], 0
    for sequence in corpus.sequences:
        if count >= tokens:
            break
        kept.append(sequence)
        count += len(sequence) - 1
    return Corpus(tuple(kept), corpus.source)


def _distance(moments: SecondMoments, best: SecondMoments) -> float:
    """Mean over layers of ‖C − C_best‖/‖C_best‖ (Frobenius)."""
    apart = [torch.dist(moments[layer], best[layer]) / best[layer].norm() for layer in best.layers]
    return float(torch.stack(apart).mean())


if __name__ == "__main__":
    main()
