"""Score given continuations of prompts exactly; every distinct prompt runs once, and later only from the first edited layer on."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import nnsight
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import DynamicCache

from nse_tools.models.editable_model import EditableModel, hidden_of
from nse_tools.models.weights import tolerance
from nse_tools.tracing._engine.batching import TokenBatch, batches, pad
from nse_tools.tracing._engine.replay import LayerCall, run_layer, watch_calls
from nse_tools.tracing.prompts import LocatedPrompt, continued

_log = logging.getLogger(__name__)
MAX_SCORED_TOKENS = 1024
_CACHE = object()  # in a recorded call: the cache of keys and values, which every replay makes again
Ids = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Continuation:
    """The score of one continuation of a prompt."""

    nll: float  # mean negative log-likelihood (nats) over the target's tokens
    hits: float  # share of the target's tokens that are the argmax, teacher-forced
    argmax: int  # the most likely first token, whatever the target

    @property
    def correct(self) -> bool:
        """Whether every token of the target is the argmax."""
        return self.hits == 1.0


@torch.no_grad()
def score_continuations(
    model: EditableModel,
    pairs: Sequence[tuple[str, str]],
    *,
    max_tokens: int = MAX_SCORED_TOKENS,
    states: PromptStates | None = None,
    progress: bool = False,
) -> list[Continuation]:
    """Score (prompt, target) pairs under the current weights; a target follows its prompt after one space."""
    located = {pair: continued(model, *pair) for pair in dict.fromkeys(pairs)}
    by_prompt: dict[Ids, list[tuple[str, str]]] = defaultdict(list)
    for pair, prompt in located.items():
        by_prompt[prompt.ids[: prompt.target_start]].append(pair)
    prompts = list(by_prompt)
    scores: dict[tuple[str, str], Continuation] = {}
    with model.running(), tqdm(total=len(prompts), desc="scoring", unit="prompt", disable=not progress, leave=False) as bar:
        for numbers in batches([len(p) for p in prompts], max_tokens):
            scores |= _score_batch(model, {prompts[i]: by_prompt[prompts[i]] for i in numbers}, located, states)
            bar.update(len(numbers))
    return [scores[pair] for pair in pairs]


def _score_batch(
    model: EditableModel,
    by_prompt: dict[Ids, list[tuple[str, str]]],
    located: dict[tuple[str, str], LocatedPrompt],
    states: PromptStates | None,
) -> dict[tuple[str, str], Continuation]:
    """Score the targets of one batch of prompts."""
    targets = [(row, pair, located[pair].target_ids) for row, pairs in enumerate(by_prompt.values()) for pair in pairs]
    longer = [(row, pair, target) for row, pair, target in targets if len(target) > 1]
    batch = PromptBatch(tuple(by_prompt), tuple((row, target[:-1]) for row, _, target in longer))
    ends = states.ends(batch) if states else _record(model, batch, None)[0]
    first = _log_probabilities(model, ends.prompts)
    rest = {pair: _score_rest(model, end, target[1:]) for end, (_, pair, target) in zip(ends.continuations, longer, strict=True)}
    argmax = first.argmax(-1).tolist()
    scores = {}
    for row, pair, target in targets:
        more_logp, more_hits = rest.get(pair, (0.0, 0))
        logp = float(first[row, target[0]]) + more_logp
        hits = int(argmax[row] == target[0]) + more_hits
        scores[pair] = Continuation(-logp / len(target), hits / len(target), argmax[row])
    return scores


def _score_rest(model: EditableModel, end: Tensor, wanted: Ids) -> tuple[float, int]:
    """Score the second and later tokens of a target from the states before them."""
    logp = _log_probabilities(model, end)
    tokens = torch.tensor(wanted, device=logp.device)
    return float(logp.gather(1, tokens[:, None]).sum()), int((logp.argmax(-1) == tokens).sum())


def _log_probabilities(model: EditableModel, states: Tensor) -> Tensor:
    """Return the log-probabilities of the next token from states leaving the last layer."""
    return model.unembed(states).float().log_softmax(-1)


# ---- states of prompts -----------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class PromptBatch:
    """Token ids of prompts, and of continuations with the number of their prompt."""

    prompts: tuple[Ids, ...]
    continuations: tuple[tuple[int, Ids], ...]

    def cut(self, states: Tensor) -> tuple[Tensor, ...]:
        """Return the states of each continuation without those of its padding."""
        return tuple(states[number, : len(ids)] for number, (_, ids) in enumerate(self.continuations))


@dataclass(frozen=True, slots=True)
class Ends:
    """States leaving the last layer: of each prompt's last token (prompts, d_model), and of each continuation's tokens."""

    prompts: Tensor
    continuations: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class _Segment:
    """Tokens as they enter a layer, and how the layers from there on are called."""

    hidden: Tensor
    calls: dict[int, LayerCall]

    def run(self, model: EditableModel, cache: DynamicCache) -> Tensor:
        hidden = self.hidden
        for layer, call in self.calls.items():
            hidden = run_layer(model, layer, call.map(lambda value: cache if value is _CACHE else value), hidden)
        return hidden

    def tensors(self) -> list[Tensor]:
        tensors = [self.hidden]

        def collect(value: object) -> object:
            if isinstance(value, Tensor):
                tensors.append(value)
            return value

        for call in self.calls.values():
            call.map(collect)
        return tensors


@dataclass(frozen=True, slots=True)
class _Recorded:
    prompts: _Segment
    continuations: _Segment | None

    @property
    def n_bytes(self) -> int:
        segments = [self.prompts, *([self.continuations] if self.continuations else [])]
        # masks and rotary angles are shared by the layers
        storages = (t.untyped_storage() for segment in segments for t in segment.tensors())
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


class PromptStates:
    """Batches of prompts as they enter the first edited layer, kept within a memory budget."""

    def __init__(self, model: EditableModel, layer: int, max_bytes: int = 1 << 29) -> None:
        model.check_layers([layer])
        self.model, self.layer, self.max_bytes, self.n_bytes = model, layer, max_bytes, 0
        self.hits = 0
        self._recorded: dict[PromptBatch, _Recorded] = {}
        self._checked = False

    @torch.no_grad()
    def ends(self, batch: PromptBatch) -> Ends:
        """Run a batch under the current weights."""
        with self.model.running():
            if batch in self._recorded:
                self.hits += 1
                return self._replay(batch, self._recorded[batch])
            ends, recorded = _record(self.model, batch, self.layer)
            if self.n_bytes + recorded.n_bytes <= self.max_bytes and self._replays(batch, ends, recorded):
                self._recorded[batch] = recorded
                self.n_bytes += recorded.n_bytes
            return ends

    def _replay(self, batch: PromptBatch, recorded: _Recorded) -> Ends:
        cache = DynamicCache(config=self.model.hf.config)
        last = recorded.prompts.run(self.model, cache)[:, -1]
        if recorded.continuations is None:
            return Ends(last, ())
        rows = torch.tensor([row for row, _ in batch.continuations])  # on the CPU: the layers' caches may be on several devices
        for layer_cache in cache.layers[self.layer :]:
            layer_cache.batch_select_indices(rows)
        return Ends(last, batch.cut(recorded.continuations.run(self.model, cache)))

    def _replays(self, batch: PromptBatch, ends: Ends, recorded: _Recorded) -> bool:
        """Check once that a replay gives what the model itself gave."""
        if not self._checked:
            again = self._replay(batch, recorded)
            pairs = zip((ends.prompts, *ends.continuations), (again.prompts, *again.continuations), strict=True)
            if not all(bool((a - b).float().norm() <= tolerance(a.dtype) * a.float().norm()) for a, b in pairs):
                _log.warning("%s does not give its own states when replayed from layer %d", self.model.name, self.layer)
                self.max_bytes = 0
                return False
            self._checked = True
        return True

    def __repr__(self) -> str:
        return f"PromptStates(from layer {self.layer}: {len(self._recorded)} batches, {self.n_bytes / 2**20:.0f} MiB)"


def _record(model: EditableModel, batch: PromptBatch, layer: int | None) -> tuple[Ends, _Recorded]:
    """Run prompts once and continuations on their prompts' cached keys and values; keep what a replay from ``layer`` on needs."""
    cache = DynamicCache(config=model.hf.config) if batch.continuations else None
    tokens = pad(batch.prompts, model.pad_id, model.device, left=True)
    end, prompts = _run_segment(model, layer, tokens, cache)
    if cache is None:
        return Ends(end[:, -1], ()), _Recorded(prompts, None)
    rows = torch.tensor([row for row, _ in batch.continuations])
    cache.batch_select_indices(rows)
    more = pad([ids for _, ids in batch.continuations], model.pad_id, model.device)
    mask, positions = torch.cat([tokens.mask[rows], more.mask], dim=1), more.positions + tokens.lengths[rows][:, None]
    rest, continuations = _run_segment(model, layer, replace(more, mask=mask, positions=positions), cache)
    return Ends(end[:, -1], batch.cut(rest)), _Recorded(prompts, continuations)


def _run_segment(model: EditableModel, layer: int | None, tokens: TokenBatch, cache: DynamicCache | None) -> tuple[Tensor, _Segment]:
    """Run tokens through the model; return what leaves the last layer, and what a replay from ``layer`` on needs."""
    last = model.n_layers - 1
    base = model.lm.get(model.hf.base_model_prefix)
    arguments = {"past_key_values": cache, "use_cache": cache is not None}
    with base.trace(input_ids=tokens.ids, attention_mask=tokens.mask, position_ids=tokens.positions, **arguments):
        entering, calls = watch_calls(model, range(last if layer is None else layer, model.n_layers))
        end = hidden_of(model.layer_envoy(last).output)
        record = nnsight.save((entering, calls, end))
    entering, calls, end = record
    calls = {index: call.map(lambda value: _CACHE if value is cache and cache is not None else value) for index, call in calls.items()}
    return end.clone(), _Segment(entering.clone(), calls)
