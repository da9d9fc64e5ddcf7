"""The causal trace against one prompt at a time in float64 with plain hooks; its table; its errors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.known import known_to
from helpers.models import FACTS, build
from nse_tools.data.fact import Fact
from nse_tools.errors import FactError, SettingError
from nse_tools.steps.keys import SubjectStates
from nse_tools.tracing.causal_trace import causal_trace, first_token_ratio
from nse_tools.tracing.contexts import BARE
from reference import Reference, apart

TRUE = [replace(f, target_true=t) for f, t in zip(FACTS, ("English", "São Paulo", "Rome, Italy", "piano", "Japan"), strict=True)]


def hidden_of(value: Any) -> Tensor:
    return value[0] if isinstance(value, tuple) else value


class Naive(Reference):
    """Corrupts and restores with torch hooks, one prompt, draw and layer at a time."""

    def prompt(self, fact: Fact) -> tuple[list[int], int, int, int]:
        """Ids, subject's first and last token, target's first token."""
        ids, last, start = self.locate(fact.prompt, fact.subject, target=fact.target_true)
        head = fact.prompt.split("{}")[0]
        prepended = self.tokenizer.decode(ids).lstrip(" <s>").startswith("\n")
        goal, count = len((("\n" if prepended else "") + head).encode()) + 1 + self.metaspace(), 0
        for first, token in enumerate(ids):
            count += self.token_bytes(token)
            if count >= goal:
                return ids, first, last, start
        raise AssertionError

    @torch.no_grad()
    def states(self, ids: list[int], noise: Tensor | None, places: slice, mend: tuple[int, int, Tensor] | None = None) -> dict[str, Any]:
        seen: dict[str, Any] = {"h": []}
        n_layers = len(self.hf.get_submodule(self.layers_path))

        def enter(_: Any, args: Any, kwargs: Any) -> Any:
            hidden = (args[0] if args else kwargs["hidden_states"]).clone()
            seen["entering"] = hidden[0].clone()
            if noise is not None:
                hidden[0, places] += noise
            return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

        def leave(layer: int) -> Any:
            def hook(_: Any, __: Any, output: Any) -> Any:
                if mend is not None and mend[0] == layer:
                    hidden_of(output)[0, mend[1]] = mend[2]
                seen["h"].append(hidden_of(output)[0].clone())

            return hook

        handles = [self.layer(0).register_forward_pre_hook(enter, with_kwargs=True)]
        handles += [self.layer(i).register_forward_hook(leave(i)) for i in range(n_layers)]
        try:
            seen["logp"] = self.hf(input_ids=torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
        finally:
            for handle in handles:
                handle.remove()
        return seen

    def probability(self, ids: list[int], start: int, logp: Tensor) -> float:
        return float(torch.stack([logp[i - 1, ids[i]] for i in range(start, len(ids))]).mean().exp())

    def trace(self, facts: list[Fact], noise: float, draws: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        prompts = [self.prompt(f) for f in facts]
        runs = [self.states(ids, None, slice(0, 0)) for ids, *_ in prompts]
        entering = torch.cat([r["entering"][a : b + 1] for r, (_, a, b, _) in zip(runs, prompts, strict=True)])
        generator = torch.Generator().manual_seed(seed)
        clean, low, high = [], [], []
        for run, (ids, a, b, start) in zip(runs, prompts, strict=True):
            shocks = torch.randn(draws, b + 1 - a, entering.shape[1], generator=generator).double() * noise * entering.std()
            places = slice(a, b + 1)
            clean.append(self.probability(ids, start, run["logp"]))
            low.append(sum(self.probability(ids, start, self.states(ids, s, places)["logp"]) for s in shocks) / draws)
            high.append(
                [
                    sum(self.probability(ids, start, self.states(ids, s, places, (layer, b, h[b]))["logp"]) for s in shocks) / draws
                    for layer, h in enumerate(run["h"])
                ]
            )
        return torch.tensor(clean), torch.tensor(low), torch.tensor(high)


@pytest.mark.parametrize(("name", "kind"), [("llama", "plain"), ("gpt2", "bos"), ("gptj", "plain"), ("gemma3", "metaspace")])
def test_trace_agrees_with_hooks_in_float64(name: str, kind: str) -> None:
    model = build(name, kind)
    found = causal_trace(model, TRUE, noise=2.0, draws=2, seed=3, max_tokens=40)
    clean, corrupted, restored = Naive(model.hf, model.tokenizer).trace(TRUE, 2.0, 2, 3)
    assert apart(found.clean, clean) < 1e-4
    assert apart(found.corrupted, corrupted) < 1e-4
    assert apart(found.restored, restored) < 1e-4
    assert apart(corrupted, clean) > 0.05  # the noise shows
    recovered = (restored - corrupted[:, None]).sum(0) / (clean - corrupted).sum()
    assert apart(found.recovered(), recovered) < 1e-2
    assert found.total_effect == pytest.approx(float((clean - corrupted).mean()), rel=1e-2)


def test_the_last_state_that_counts_brings_everything_back_where_the_subject_is_read_last() -> None:
    model = build("llama", "bos")
    fact = replace(FACTS[2], target_true="Berlin")  # its prompt ends with the subject: the prediction is made there
    found = causal_trace(model, [fact], draws=1)
    assert float(found.restored[0, -1]) == pytest.approx(float(found.clean[0]), rel=1e-4)
    assert float(found.corrupted[0]) != pytest.approx(float(found.clean[0]), rel=1e-2)


def test_batches_do_not_matter_and_the_seed_does() -> None:
    model = build()
    first, again, other = (causal_trace(model, TRUE, seed=s, max_tokens=m) for s, m in ((0, 4096), (0, 1), (1, 4096)))
    assert apart(again.restored, first.restored) < 1e-4
    assert torch.equal(causal_trace(model, TRUE, seed=0).restored, first.restored)
    assert not torch.allclose(other.corrupted, first.corrupted)
    assert torch.equal(other.clean, first.clean)


def test_known_is_what_the_model_says_and_the_table_has_every_number() -> None:
    model = build()
    known = known_to(model, 3)
    found = causal_trace(model, [*TRUE, *known], draws=1)
    assert found.known == (False,) * len(TRUE) + (True,) * 3
    assert found.of_known().fact_ids == tuple(known.ids)
    assert torch.equal(found.of_known().restored, found.restored[len(TRUE) :])
    table = found.to_frame()
    assert len(table) == len(found) * model.n_layers
    row = table[(table.fact == "end") & (table.layer == 2)].iloc[0]
    assert row.restored == float(found.restored[2, 2])
    assert row.clean == float(found.clean[2])
    assert "8 facts, 3 known" in repr(found)
    assert "<table" in found._repr_html_()


def test_what_cannot_be_traced_is_refused() -> None:
    model = build()
    with pytest.raises(FactError, match="'middle' has no true target"):
        causal_trace(model, FACTS)
    with pytest.raises(FactError, match="no facts"):
        causal_trace(model, [])
    with pytest.raises(SettingError, match="noise=0"):
        causal_trace(model, TRUE, noise=0)
    with pytest.raises(SettingError, match="draws=0"):
        causal_trace(model, TRUE, draws=0)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_first_token_ratio_agrees_with_hooks(name: str) -> None:
    model = build(name)
    naive = Reference(model.hf, model.tokenizer)
    rows = [naive.locate(f.prompt, f.subject)[0] for f in TRUE]
    found = first_token_ratio(model, rows)
    with torch.no_grad():
        for layer in range(model.n_layers):
            keys = [naive.run(ids, keys=(layer,))[2][layer].square().sum(1) for ids in rows]
            expected = torch.stack([k[0] for k in keys]).mean() / torch.cat([k[1:] for k in keys]).mean()
            assert float(found[layer]) == pytest.approx(float(expected), rel=1e-4)


def test_tracing_leaves_the_model_as_it_was() -> None:
    model = build()
    before = SubjectStates.record(model, FACTS, BARE, 1, 2).keys([2])[2].matrix
    causal_trace(model, TRUE)
    assert torch.equal(SubjectStates.record(model, FACTS, BARE, 1, 2).keys([2])[2].matrix, before)
