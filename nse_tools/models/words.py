"""Text to tokens, with the characters each token covers."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from nse_tools.errors import ModelError


@dataclass(frozen=True, slots=True)
class Encoding:
    """Token ids of one text and the half-open span of characters that each covers; special tokens cover none."""

    ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]

    def last_token_before(self, end: int) -> int:
        """Return the index of the token that holds character ``end - 1``; of several (bytes of one letter) the last.

        Raises
        ------
        ModelError
            If no token covers it.
        """
        holding = [i for i, (start, stop) in enumerate(self.spans) if start <= end - 1 < stop]
        if not holding:
            raise ModelError(f"The tokenizer has no token for character {end - 1} of the text.")
        return holding[-1]


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> Encoding:
    """Tokenize a text with the tokenizer's default special tokens."""
    out = tokenizer(text, return_offsets_mapping=True, return_attention_mask=False)
    return Encoding(tuple(out["input_ids"]), tuple((a, b) for a, b in out["offset_mapping"]))
