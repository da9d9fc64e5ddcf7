"""Seconds per fact of the value search: this engine against the plain full-sequence search, side by side in one run.

    python benchmarks/value_search.py --facts 1 4 16 --repeat 3

The plain search does what the released code does, in float32: one fact at a time, whole prompts through all layers, logits of
every token, δ added by a hook; it uses PyTorch's ordinary products. Engine and plain search take turns; medians are shown,
with the largest relative difference between their δ.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median

import pandas as pd
import torch
from torch import Tensor

from nse_tools import Contexts, EditableModel, Fact, Method, compute_values, known_facts, load_model, methods, sample_contexts
from nse_tools.editing.value_search import search_rows
from nse_tools.models.editable import hidden_of
from nse_tools.tracing.batches import pad


def plain_search(model: EditableModel, fact: Fact, contexts: Contexts, method: Method) -> Tensor:
    """Return δ of one fact, found on whole prompts."""
    rows = search_rows(model, [fact], contexts)
    tokens = pad([r.prompt.ids for r in rows], model.pad_id, model.device)
    at = torch.tensor([r.prompt.position for r in rows])
    each = torch.arange(len(rows))
    delta = torch.zeros(model.d_model, requires_grad=True)
    adam = torch.optim.Adam([delta], lr=method.v_lr)
    seen: dict[str, Tensor] = {}

    def add(_: object, __: object, output: object) -> object:
        hidden = hidden_of(output)
        seen.setdefault("h0", hidden[0, at[0]].detach().clone())
        hidden = hidden.clone()
        hidden[each, at] += delta
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handle = model.layer(method.last_layer).register_forward_hook(add)
    try:
        for step in range(method.v_num_grad_steps):
            logp = model.hf(input_ids=tokens.ids, attention_mask=tokens.mask, use_cache=False).logits.log_softmax(-1)
            nll = torch.stack([_nll(logp[i], r.prompt.target_start, r.targets) for i, r in enumerate(rows[:-1])]).mean()
            essence = logp[-1, at[-1]]
            reference = seen.setdefault("p0", essence.detach().clone())
            kl = (essence.exp() * (essence - reference)).sum()
            loss = nll + method.kl_factor * kl + method.v_weight_decay * delta.norm() / seen["h0"].norm() ** 2
            if loss < method.v_loss_threshold or step == method.v_num_grad_steps - 1:
                break
            adam.zero_grad()
            loss.backward()
            adam.step()
            with torch.no_grad():
                limit = method.clamp_norm_factor * seen["h0"].norm()
                if delta.norm() > limit:
                    delta.mul_(limit / delta.norm())
    finally:
        handle.remove()
    return delta.detach()


def _nll(logp: Tensor, start: int, targets: tuple[int, ...]) -> Tensor:
    return -torch.stack([logp[start - 1 + i, token] for i, token in enumerate(targets)]).mean()


def main() -> None:
    """Read the arguments, run, show, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--facts", type=int, nargs="+", default=[1, 4, 16], help="batch sizes of the engine")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("runs/bench/value_search.csv"))
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    model, method = load_model(), methods.nse()
    contexts, facts = sample_contexts(model), known_facts()[100 : 100 + max(chosen.facts)]
    rows = []
    for number in range(chosen.repeat):
        fact = facts[number % len(facts)]
        start = time.perf_counter()
        expected = plain_search(model, fact, contexts, method)
        plain = time.perf_counter() - start
        for n in chosen.facts:
            batch = [fact, *(f for f in facts if f is not fact)][:n]
            start = time.perf_counter()
            values = compute_values(model, batch, contexts, method)
            engine = (time.perf_counter() - start) / n
            apart = float((values.delta[0] - expected).norm() / expected.norm())
            rows.append({"run": number, "facts": n, "plain": plain, "engine": engine, "ratio": plain / engine, "difference": apart})
    frame = pd.DataFrame(rows)
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    frame.to_csv(chosen.out, index=False)
    table = frame.groupby("facts").agg({"plain": median, "engine": median, "ratio": median, "difference": "max"})
    print(f"seconds per fact, {chosen.threads} threads, medians of {chosen.repeat} runs; difference: ‖δ − δ_plain‖/‖δ_plain‖, largest")
    print(table.to_string(float_format="{:.3g}".format))


if __name__ == "__main__":
    main()
