"""General text for key statistics: the model's own writing by default, or any text that is given."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm.auto import tqdm

from nse_tools.errors import SettingError
from nse_tools.models.editable_model import EditableModel
from nse_tools.tracing.prompts import LEAD

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Corpus:
    """Sequences of token ids of bounded length, and where they come from.

    Parameters
    ----------
    sequences : tuple of tuple of int
        Token ids; the first token of each is left out of all statistics (attention sink).
    source : str
        What the text is, in words.
    """

    sequences: tuple[tuple[int, ...], ...] = field(repr=False)
    source: str

    @property
    def n_tokens(self) -> int:
        """Tokens that count in statistics (all but each sequence's first)."""
        return sum(len(s) - 1 for s in self.sequences)

    def fingerprint(self) -> str:
        """Return a hash of the token ids."""
        return hashlib.blake2b(repr(self.sequences).encode(), digest_size=16).hexdigest()


def load_corpus(model: EditableModel, text: str | Path | Iterable[str], *, n_tokens: int = 50_000, length: int = 256) -> Corpus:
    """Cut general text into sequences for key statistics.

    Parameters
    ----------
    model : EditableModel
        Whose tokenizer is used.
    text : str, Path or iterable of str
        A text file, an iterable of texts, or the name of a data set for the ``datasets`` library (its ``text`` column,
        training split, streamed), e.g. ``"Salesforce/wikitext:wikitext-103-raw-v1"``.
    n_tokens : int
        How many tokens to take at most.
    length : int
        Longest sequence in tokens.

    Raises
    ------
    SettingError
        If the text has fewer than two tokens, or the source cannot be read.
    """
    if isinstance(text, (str, Path)) and Path(text).is_file():
        source, parts = f"file {Path(text).name}", iter([Path(text).read_text(encoding="utf-8")])
    elif isinstance(text, (str, Path)):
        source, parts = f"data set {text}", _from_datasets(str(text))
    else:
        source, parts = "given texts", iter(text)
    sequences = tuple(_cut(model, parts, n_tokens, length))
    if not sequences:
        raise SettingError(f"The corpus ({source}) has no text to take statistics from.")
    return Corpus(sequences, source)


@torch.no_grad()
def sample_corpus(
    model: EditableModel, *, n_tokens: int = 20_000, length: int = 128, rows: int = 128, seed: int = 0, progress: bool = True
) -> Corpus:
    """Let the model write general text: nothing to download, and it speaks of what the model knows.

    Sampled at temperature 1 from the model under its original weights, each text from a line break (or the tokenizer's
    BOS) on. Each sequence ends where the model ends its text.

    Parameters
    ----------
    model : EditableModel
        The model.
    n_tokens : int
        How many tokens at least.
    length : int
        Longest sequence in tokens.
    rows : int
        Texts written at a time.
    seed : int
        Seed of the sampling; the same seed gives the same text on the same machine.
    progress : bool
        Show a progress bar.
    """
    draw = torch.Generator().manual_seed(seed)
    sequences: list[tuple[int, ...]] = []
    start = list(model.encode(LEAD).ids)
    with model.original_weights(), tqdm(total=n_tokens, desc="sampling text", unit="token", disable=not progress) as bar:
        while sum(len(s) - 1 for s in sequences) < n_tokens:
            missing = n_tokens - sum(len(s) - 1 for s in sequences)
            with model.running():
                written = _write(model, start, min(rows, math.ceil(1.1 * missing / length)), length, draw, bar)
            sequences += [s for s in written if len(s) > len(start) + 1]
    return Corpus(tuple(sequences), f"sampled from the model (seed {seed}, {length} tokens a text)")


def _write(model: EditableModel, start: list[int], rows: int, length: int, draw: torch.Generator, bar: tqdm) -> list[tuple[int, ...]]:
    ids = torch.tensor([start] * rows, device=model.device)
    ends, cache, step = _end_ids(model), None, ids
    alive = torch.ones(rows, dtype=torch.bool)
    texts = [list(start) for _ in range(rows)]
    for _ in range(length - len(start)):
        out = model.hf(input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = out.past_key_values
        probabilities = out.logits[:, -1].float().softmax(-1).cpu()
        token = torch.multinomial(probabilities, 1, generator=draw)[:, 0]
        alive &= ~torch.isin(token, ends)
        for row in torch.nonzero(alive)[:, 0].tolist():
            texts[row].append(int(token[row]))
        bar.update(int(alive.sum()))
        if not alive.any():
            break
        step = token[:, None].to(model.device)
    return [tuple(t) for t in texts]


def _end_ids(model: EditableModel) -> torch.Tensor:
    special = model.tokenizer.all_special_ids
    return torch.tensor(special or [-1])


def _cut(model: EditableModel, parts: Iterator[str], n_tokens: int, length: int) -> Iterator[tuple[int, ...]]:
    taken = 0
    for part in parts:
        # tokenizing by paragraph keeps memory flat for files of any size
        for paragraph in part.split("\n"):
            ids = model.encode(paragraph).ids if paragraph.strip() else ()
            for i in range(0, len(ids), length):
                piece = ids[i : i + length]
                if len(piece) > 1:
                    yield piece
                    taken += len(piece) - 1
                if taken >= n_tokens:
                    return


def _from_datasets(name: str) -> Iterator[str]:
    try:
        from datasets import load_dataset
    except ImportError as missing:
        raise SettingError(f"No file {name!r}; to read it as a data set, install the `datasets` library.") from missing
    path, _, config = name.partition(":")
    try:
        rows = load_dataset(path, config or None, split="train", streaming=True)
    except Exception as wrong:  # the library raises many kinds; the user needs one
        raise SettingError(f"No file {name!r}, and `datasets` cannot load it either: {wrong}") from wrong
    return (row["text"] for row in rows)
