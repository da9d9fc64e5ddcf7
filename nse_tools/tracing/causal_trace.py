"""Where a fact is looked up: corrupt the subject, restore one clean state, and see how much of the answer comes back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import nnsight
import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from nse_tools._repr import table_html
from nse_tools.data.fact import SLOT, Fact
from nse_tools.errors import FactError, SettingError
from nse_tools.models.editable_model import EditableModel
from nse_tools.tracing._engine.batching import MAX_TOKENS, TokenBatch, batches, pad
from nse_tools.tracing._engine.replay import LayerCall, record_calls, run_layer
from nse_tools.tracing.hidden_states import run_changed
from nse_tools.tracing.prompts import LEAD, LocatedPrompt, locate


@dataclass(frozen=True)
class CausalTrace:
    """How much of p(true target) a clean state at the subject's last token brings back, layer by layer.

    Parameters
    ----------
    fact_ids : tuple of str
        The facts, in the order of the rows below.
    clean, corrupted : Tensor
        p(true target) of the clean prompt, and with the subject's tokens corrupted (mean over draws), (n_facts,); of
        several target tokens the geometric mean.
    restored : Tensor
        The same with h^l at the subject's last token put back to its clean value, (n_facts, n_layers), mean over draws.
    known : tuple of bool
        Whether the true target is the argmax of the clean prompt.
    noise : float
        Standard deviation of the noise, in units of the states that enter the first layer.
    draws, seed : int
        How many draws of noise a fact, and their seed.
    """

    fact_ids: tuple[str, ...]
    clean: Tensor = field(repr=False)
    corrupted: Tensor = field(repr=False)
    restored: Tensor = field(repr=False)
    known: tuple[bool, ...] = field(repr=False)
    noise: float
    draws: int
    seed: int

    @property
    def total_effect(self) -> float:
        """Mean over facts of p(clean) − p(corrupted)."""
        return float((self.clean - self.corrupted).mean())

    def recovered(self) -> Tensor:
        """Return Σ (p(restored) − p(corrupted)) / Σ (p(clean) − p(corrupted)) over the facts for each layer, (n_layers,)."""
        return (self.restored - self.corrupted[:, None]).sum(0) / (self.clean - self.corrupted).sum()

    def of_known(self) -> CausalTrace:
        """Return the trace of the facts that the model knows: of the others there is no answer to bring back."""
        rows = [i for i, known in enumerate(self.known) if known]
        return CausalTrace(
            tuple(self.fact_ids[i] for i in rows),
            self.clean[rows],
            self.corrupted[rows],
            self.restored[rows],
            (True,) * len(rows),
            self.noise,
            self.draws,
            self.seed,
        )

    def to_frame(self) -> pd.DataFrame:
        """Return one row a fact and layer: probabilities of the true target, clean, corrupted and restored, and whether it is known."""
        n_facts, n_layers = self.restored.shape

        def repeated(values: Sequence[object]) -> list[object]:
            return [v for v in values for _ in range(n_layers)]

        return pd.DataFrame(
            {
                "fact": repeated(self.fact_ids),
                "layer": list(range(n_layers)) * n_facts,
                "clean": repeated(self.clean.tolist()),
                "corrupted": repeated(self.corrupted.tolist()),
                "restored": self.restored.flatten().tolist(),
                "known": repeated(self.known),
            }
        )

    def __len__(self) -> int:
        return len(self.fact_ids)

    def __repr__(self) -> str:
        return (
            f"CausalTrace({len(self)} facts, {sum(self.known)} known: mean p(true) {float(self.clean.mean()):.3f}, "
            f"subject corrupted {float(self.corrupted.mean()):.3f}, most restored at layer {int(self.recovered().argmax())})"
        )

    def _repr_html_(self) -> str:
        means = self.to_frame().groupby("layer", as_index=False)[["clean", "corrupted", "restored"]].mean()
        return table_html(means, head=self)


@torch.no_grad()
def causal_trace(
    model: EditableModel,
    facts: Sequence[Fact],
    *,
    noise: float = 3.0,
    draws: int = 3,
    seed: int = 0,
    max_tokens: int = MAX_TOKENS,
    progress: bool = False,
    remote: bool | str = False,
) -> CausalTrace:
    """Trace where a model looks facts up, under the weights of the moment.

    Gaussian noise of ``noise`` times the standard deviation of the states entering the first layer is added there to every token of
    the subject. Then, one layer at a time, the output h^l at the subject's last token is put back to what it is without noise,
    and the layers above run on (ROME, arXiv 2202.05262, causal tracing with the state of one layer).

    Parameters
    ----------
    model : EditableModel
        The model.
    facts : sequence of Fact
        The facts, each with its true target.
    noise : float
        Size of the noise; the standard deviation is taken over all subject tokens of the facts.
    draws : int
        Draws of noise for each fact.
    seed : int
        Seed of the noise.
    max_tokens : int
        Padded tokens in one batch.
    progress : bool
        Show a progress bar.
    remote : bool or str
        Where the model runs, as nnsight understands it: here by default, on NDIF with True, ``"local"`` to try it here. Each batch
        then takes a run for each layer and draw; the unembedding is this model's own, here.

    Returns
    -------
    CausalTrace
        p(true target), clean, corrupted and restored at each layer.

    Raises
    ------
    FactError
        If there are no facts, one has no true target, or its target tokenizes to nothing.
    SettingError
        If ``noise`` or ``draws`` is not above 0.
    StateError
        If the model is edited and shall run on a server.
    """
    if noise <= 0 or draws < 1:
        raise SettingError(f"noise={noise!r}, draws={draws!r}: expected a size above 0 and at least 1 draw.")
    traced = [_located(model, fact) for fact in facts]
    if not traced:
        raise FactError("causal_trace: there are no facts.")
    recorded = [_Batch.record(model, traced, rows, remote) for rows in batches([len(t.prompt.ids) for t in traced], max_tokens)]
    size = noise * float(torch.cat([b.hidden[b.subject].float().cpu() for b in recorded]).std())
    generator = torch.Generator().manual_seed(seed)
    # drawn fact by fact, so that the batches do not matter
    shocks = [size * torch.randn(draws, t.n_subject, model.d_model, generator=generator) for t in traced]
    clean, corrupted, known = torch.zeros(len(traced)), torch.zeros(len(traced)), [False] * len(traced)
    restored = torch.zeros(len(traced), model.n_layers)
    with model.running(), tqdm(total=len(recorded) * draws, desc="causal trace", disable=not progress) as bar:
        for batch in recorded:
            states, (p, hit) = batch.clean()
            clean[batch.rows] = p
            for row, is_hit in zip(batch.rows.tolist(), hit.tolist(), strict=True):
                known[row] = is_hit
            for draw in range(draws):
                low, high = batch.corrupt([shocks[r][draw] for r in batch.rows.tolist()], states)
                corrupted[batch.rows] += low / draws
                restored[batch.rows] += high / draws
                bar.update()
    return CausalTrace(tuple(f.id for f in facts), clean, corrupted, restored, tuple(known), noise, draws, seed)


@torch.no_grad()
def first_token_ratio(model: EditableModel, rows: Sequence[Sequence[int]]) -> Tensor:
    """Compare the keys at the first token of some rows with those at all others.

    The first token is the attention sink. Some layer's MLP writes its massive activation, by keys that are as large: an
    update of that layer, held in place on other tokens only, changes the sink.

    Parameters
    ----------
    model : EditableModel
        The model.
    rows : sequence of sequences of int
        Token ids, two at least in each.

    Returns
    -------
    Tensor
        Mean ‖k‖² at the first token over mean ‖k‖² at the others, for each layer, (n_layers,).
    """
    first, others, n_others = torch.zeros(model.n_layers), torch.zeros(model.n_layers), 0
    base = model.lm.get(model.hf.base_model_prefix)
    for chosen in batches([len(r) for r in rows]):
        tokens = pad([rows[r] for r in chosen], model.pad_id, model.device)
        rest = tokens.mask.bool()
        rest[:, 0] = False
        with model.running(), base.trace(input_ids=tokens.ids, attention_mask=tokens.mask, use_cache=False) as tracer:
            seen = {}
            for layer in range(model.n_layers):
                seen[layer] = model.down_envoy(layer).input
            record = nnsight.save(seen)
            tracer.stop()
        for layer, keys in record.items():
            squares = keys.reshape(*rest.shape, -1).float().square().sum(-1)
            first[layer] += float(squares[:, 0].sum())
            others[layer] += float(squares[rest.to(squares.device)].sum())
        n_others += int(rest.sum())
    return (first / len(rows)) / (others / n_others)


@dataclass(frozen=True, slots=True)
class _Traced:
    """A fact's prompt with its true target, and the subject's first token."""

    prompt: LocatedPrompt
    start: int

    @property
    def n_subject(self) -> int:
        return self.prompt.position + 1 - self.start


def _located(model: EditableModel, fact: Fact) -> _Traced:
    if fact.target_true is None:
        raise FactError(f"Fact {fact.id!r} has no true target; a causal trace brings back the true one.")
    prompt = locate(model, fact.prompt, fact.subject, target=fact.target_true)
    before = (LEAD if prompt.prepended else "") + fact.prompt.split(SLOT)[0]
    spans = model.encode(before + fact.subject).spans
    return _Traced(prompt, next(i for i, (a, b) in enumerate(spans) if a <= len(before) < b))


@dataclass(frozen=True, slots=True)
class _Batch:
    """Prompts with their states entering the first layer, and how every layer is called."""

    model: EditableModel
    rows: Tensor
    hidden: Tensor
    calls: dict[int, LayerCall]
    subject: Tensor
    last: Tensor
    places: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    tokens: TokenBatch
    remote: bool | str

    @classmethod
    def record(cls, model: EditableModel, traced: Sequence[_Traced], rows: list[int], remote: bool | str) -> _Batch:
        chosen = [traced[r] for r in rows]
        # the last target token is predicted but never read
        tokens: TokenBatch = pad([t.prompt.ids[:-1] for t in chosen], model.pad_id, model.device)
        subject = torch.zeros_like(tokens.mask, dtype=torch.bool)
        for row, t in enumerate(chosen):
            subject[row, t.start : t.prompt.position + 1] = True
        last = torch.tensor([t.prompt.position for t in chosen])  # on the CPU: layers may be on several devices
        places = tuple((tuple(range(t.prompt.target_start - 1, len(t.prompt.ids) - 1)), t.prompt.target_ids) for t in chosen)
        calls: dict[int, LayerCall] = {}
        if remote:
            hidden = run_changed(model, tokens, last, remote=remote).entering.to(model.device)
        else:
            hidden, calls = record_calls(model, tokens.ids, tokens.mask, range(model.n_layers))
        return cls(model, torch.tensor(rows), hidden, calls, subject, last, places, tokens, remote)

    def clean(self) -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
        """Return h^l at the subject's last token of every layer, and p(true target) with whether it is the argmax."""
        if self.remote:
            passage = run_changed(self.model, self.tokens, self.last, remote=self.remote)
            return list(passage.states), self._read(passage.final)
        states, hidden = [], self.hidden
        for layer, call in self.calls.items():
            hidden = run_layer(self.model, layer, call, hidden)
            states.append(hidden[self._each, self.last])
        return states, self._read(hidden)

    def corrupt(self, shocks: Sequence[Tensor], states: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return p(true target) of the corrupted prompts, (rows,), and with one state restored, (rows, n_layers)."""
        if self.remote:
            return self._corrupt_from_afar(shocks, states)
        hidden, restored = self.hidden.clone(), []
        hidden[self.subject.to(hidden.device)] += torch.cat(list(shocks)).to(hidden)
        for layer, call in self.calls.items():
            hidden = run_layer(self.model, layer, call, hidden)
            mended = hidden.clone()
            mended[self._each, self.last] = states[layer].to(mended.device)
            restored.append(self._read(self._end(mended, layer + 1))[0])
        return self._read(hidden)[0], torch.stack(restored, dim=1)

    def _corrupt_from_afar(self, shocks: Sequence[Tensor], states: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Do what :meth:`corrupt` does by whole runs: one without, and one for each layer with its state restored."""
        added = torch.zeros_like(self.hidden)
        added[self.subject] = torch.cat(list(shocks)).to(added)

        def says(put_back: tuple[int, Tensor] | None) -> Tensor:
            passage = run_changed(self.model, self.tokens, self.last, added=added, put_back=put_back, remote=self.remote)
            return self._read(passage.final)[0]

        return says(None), torch.stack([says((layer, state)) for layer, state in enumerate(states)], dim=1)

    @property
    def _each(self) -> Tensor:
        return torch.arange(len(self.last))

    def _end(self, hidden: Tensor, start: int) -> Tensor:
        for layer in range(start, self.model.n_layers):
            hidden = run_layer(self.model, layer, self.calls[layer], hidden)
        return hidden

    def _read(self, final: Tensor) -> tuple[Tensor, Tensor]:
        """Return p(true target), (rows,), and whether every token of it is the argmax."""
        at = [(row, place) for row, (places, _) in enumerate(self.places) for place in places]
        logp = self.model.unembed(torch.stack([final[row, place] for row, place in at]).to(self.model.device)).float().log_softmax(-1)
        wanted = torch.tensor([t for _, targets in self.places for t in targets], device=logp.device)
        sizes = [len(targets) for _, targets in self.places]
        picked = logp.gather(1, wanted[:, None])[:, 0].split(sizes)
        hits = (logp.argmax(-1) == wanted).split(sizes)
        return torch.stack([p.mean().exp() for p in picked]).cpu(), torch.stack([h.all() for h in hits]).cpu()
