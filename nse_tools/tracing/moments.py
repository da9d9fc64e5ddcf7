"""C^l = E[k kᵀ]: second moments of a layer's keys over general text."""

from __future__ import annotations

import gc
import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import nnsight
import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm.auto import tqdm

from nse_tools._repr import table_html
from nse_tools.errors import SettingError
from nse_tools.models.editable_model import EditableModel
from nse_tools.models.embedded import cache_folder
from nse_tools.models.files import save_atomically
from nse_tools.parallel.executor import Executor
from nse_tools.tracing._engine.batching import batches, pad
from nse_tools.tracing.corpus import Corpus, sample_corpus

_log = logging.getLogger(__name__)
_FORMAT = 2
_CHUNKS, _JOBS = 8, 64


@dataclass(frozen=True)
class SecondMoments:
    """Second moments of the keys of some layers.

    Parameters
    ----------
    matrices : dict of int to Tensor
        Layer → C^l, (d_ff, d_ff), float32 (summed in float64), in units of key².
    n_tokens : int
        How many tokens the mean is over.
    source : str
        What text, in words.
    """

    matrices: dict[int, Tensor] = field(repr=False)
    n_tokens: int
    source: str

    def __getitem__(self, layer: int) -> Tensor:
        if layer not in self.matrices:
            raise SettingError(f"No second moments of layer {layer}; computed: {sorted(self.matrices)}.")
        return self.matrices[layer]

    def only(self, layers: Iterable[int]) -> SecondMoments:
        """Return those of some of the layers."""
        return replace(self, matrices={layer: self[layer] for layer in layers})

    @property
    def layers(self) -> list[int]:
        """The layers, ascending."""
        return sorted(self.matrices)

    def to_frame(self) -> pd.DataFrame:
        """Return one row a layer: mean square of a key's coordinate, largest share of one neuron, tokens."""
        rows = []
        for layer in self.layers:
            diagonal = self.matrices[layer].diagonal()
            rows.append((layer, float(diagonal.mean()), float(diagonal.max() / diagonal.sum()), self.n_tokens))
        return pd.DataFrame(rows, columns=["layer", "mean_square", "largest_share", "n_tokens"])

    def __repr__(self) -> str:
        return f"SecondMoments(layers {self.layers}, {self.n_tokens} tokens, {self.source})"

    def _repr_html_(self) -> str:
        return table_html(self.to_frame())


def second_moments(
    model: EditableModel,
    layers: Sequence[int],
    corpus: Corpus | None = None,
    *,
    n_tokens: int | None = None,
    seed: int = 0,
    cache: Path | None = None,
    progress: bool = True,
    executor: Executor | None = None,
) -> SecondMoments:
    """Compute, or take from the cache, the second moments of keys over a corpus, under the original weights.

    The pass is streamed: it runs up to the last of the layers only, sums in float64, and leaves a checkpoint after each
    eighth of the corpus, from which an interrupted pass goes on. Each sequence's first token is left out: it carries the
    attention sink's massive activation.

    Parameters
    ----------
    model : EditableModel
        The model.
    layers : sequence of int
        Which layers.
    corpus : Corpus, optional
        General text; text sampled from the model itself by default.
    n_tokens : int, optional
        Size of the sampled text, where no corpus is given; 10·d_ff by default, which suffices for efficacy (arXiv 2506.04226).
    seed : int
        Seed of the sampled text.
    cache : Path, optional
        Folder of cached results; the user's cache directory by default. An entry's name is a hash of weights, layers and
        tokens (or of how they are sampled), so that a stale one is never used.
    progress : bool
        Show progress bars.
    executor : Executor, optional
        Where the corpus is run, e.g. a cluster (:class:`nse_tools.scale.RayExecutor`), in at most 64 jobs, whose sums are
        added here in their order; here by default. Up to 64 batches of tokens (about 260 000 tokens) the result is the
        same bit for bit; beyond, the float64 sum is taken in another order, the same with every executor.

    Returns
    -------
    SecondMoments
        C^l = (1/T) Σ_t k_t k_tᵀ for each layer.
    """
    model.check_layers(layers)
    layers = sorted(set(layers))
    n_tokens = n_tokens or 10 * model.d_ff
    text = corpus.fingerprint() if corpus else f"sampled {n_tokens} {seed}"
    identity = {"format": _FORMAT, "model": model.fingerprint(), "layers": layers, "text": text}
    name = hashlib.blake2b(json.dumps(identity).encode(), digest_size=16).hexdigest()
    file = (cache or cache_folder() / "moments") / f"{name}.safetensors"
    if (held := _read(file)) is not None:
        return held
    corpus = corpus or sample_corpus(model, n_tokens=n_tokens, seed=seed, progress=progress)
    done = _accumulate(model, layers, corpus, file.with_suffix(".part"), progress, executor)
    _write(file, done)
    with suppress(OSError):  # an unwritable cache has no checkpoint either
        file.with_suffix(".part").unlink()
    return done


def _accumulate(
    model: EditableModel, layers: list[int], corpus: Corpus, checkpoint: Path, progress: bool, executor: Executor | None
) -> SecondMoments:
    plan = list(batches([len(s) for s in corpus.sequences]))
    sums, start = _resume(checkpoint, layers, model.d_ff)
    every, saved = max(1, len(plan) // _CHUNKS), start
    make = _in_turn(model, layers, corpus, plan, start) if executor is None else _on(executor, model, layers, corpus, plan, start)
    with model.original_weights(), tqdm(total=len(plan), initial=start, desc="key statistics", unit="batch", disable=not progress) as bar:
        for done, products in make:
            for layer, product in products:
                sums[layer] += product.double()
            bar.update(done - bar.n)
            if done // every > saved // every and done < len(plan):
                saved = done
                _save({**{str(la): s for la, s in sums.items()}, "done": torch.tensor(done)}, checkpoint, {})
    total = corpus.n_tokens
    # a layer's sum is given back as its C is made, so that both are never there for all layers
    return SecondMoments({layer: sums.pop(layer).div_(total).float() for layer in layers}, total, corpus.source)


Products = Iterable[tuple[int, Tensor]]
"""Layer and Σ k kᵀ, (d_ff, d_ff)."""


def _in_turn(model: EditableModel, layers: list[int], corpus: Corpus, plan: list[list[int]], start: int) -> Iterator[tuple[int, Products]]:
    """Yield, after each batch from ``start`` on, how many are done and the batch's products, one layer's at a time."""
    for number in range(start, len(plan)):
        yield number + 1, _products(model, layers, [corpus.sequences[r] for r in plan[number]])


def _on(
    executor: Executor, model: EditableModel, layers: list[int], corpus: Corpus, plan: list[list[int]], start: int
) -> Iterator[tuple[int, Products]]:
    """Yield, after each group of batches that was run as one job, how many batches are done and the sums of their products."""
    n_jobs = min(_JOBS, len(plan))
    edges = [len(plan) * i // n_jobs for i in range(n_jobs + 1)]
    groups = [range(max(a, start), b) for a, b in pairwise(edges) if b > start]
    shared = executor.share(layers)
    tasks = ((shared, [[corpus.sequences[r] for r in plan[number]] for number in group]) for group in groups)
    done = executor.map(model, _group_job, tasks, label="key statistics", total=len(groups))
    for group, sums in zip(groups, done, strict=True):
        yield group.stop, sums.items()


def _group_job(model: EditableModel, layers: list[int], group: list[list[tuple[int, ...]]]) -> dict[int, Tensor]:
    """Sum the products of a group of batches: in float64, but a single one as it is, which is half the size."""
    sums: dict[int, Tensor] = {}
    with model.original_weights():
        for rows in group:
            for layer, product in _products(model, layers, rows):
                sums[layer] = sums[layer].double() + product.double() if layer in sums else product
    return sums


def _products(model: EditableModel, layers: list[int], rows: list[tuple[int, ...]]) -> Iterator[tuple[int, Tensor]]:
    keys = _keys(model, layers, rows)
    return ((layer, keys[layer].T @ keys[layer]) for layer in layers)


@torch.no_grad()
def _keys(model: EditableModel, layers: list[int], rows: list[tuple[int, ...]]) -> dict[int, Tensor]:
    tokens = pad(rows, model.pad_id, model.device)
    counted = tokens.mask.bool()
    counted[:, 0] = False
    gc.collect()  # a trace leaves cycles behind that hold a whole batch's keys
    base = model.lm.get(model.hf.base_model_prefix)
    with model.running(), base.trace(input_ids=tokens.ids, attention_mask=tokens.mask, use_cache=False) as tracer:
        seen = {}
        for layer in layers:
            seen[layer] = model.down_envoy(layer).input
        record = nnsight.save(seen)
        tracer.stop()
    return {layer: keys.reshape(*counted.shape, -1)[counted.to(keys.device)].float().cpu() for layer, keys in record.items()}


def _resume(checkpoint: Path, layers: list[int], d_ff: int) -> tuple[dict[int, Tensor], int]:
    try:
        with safe_open(checkpoint, framework="pt") as held:
            sums = {layer: held.get_tensor(str(layer)) for layer in layers}
            return sums, int(held.get_tensor("done"))
    except (OSError, SafetensorError):
        return {layer: torch.zeros(d_ff, d_ff, dtype=torch.float64) for layer in layers}, 0


def _read(file: Path) -> SecondMoments | None:
    try:
        with safe_open(file, framework="pt") as held:
            about = held.metadata()
            return SecondMoments({int(k): held.get_tensor(k) for k in held.keys()}, int(about["n_tokens"]), about["source"])  # noqa: SIM118
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as wrong:
        _log.warning("cached moments in %s cannot be read (%s); computing them anew", file, wrong)
        return None


def _write(file: Path, moments: SecondMoments) -> None:
    about = {"n_tokens": str(moments.n_tokens), "source": moments.source}
    _save({str(layer): m for layer, m in moments.matrices.items()}, file, about)


def _save(tensors: dict[str, Tensor], file: Path, about: dict[str, str]) -> None:
    try:
        save_atomically(tensors, file, about, durable=True)
    except OSError as wrong:  # a full or read-only cache costs time, not the result
        _log.warning("key statistics could not be cached in %s: %s", file.parent, wrong)
