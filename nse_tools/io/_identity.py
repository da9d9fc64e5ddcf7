"""What a saved session belongs to: the model, its key statistics, the versions; and what does not fit when it is loaded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from nse_tools.models.editable_model import EditableModel
from nse_tools.models.files import digest_of_bytes
from nse_tools.models.weights import bytes_of, config_text
from nse_tools.tracing.moments import SecondMoments


@dataclass(frozen=True)
class ModelIdentity:
    """What tells a model from others: shape, and hashes of its unedited weights, configuration and vocabulary.

    Parameters
    ----------
    name, kind : str
        The model's name and the class of the transformers model.
    n_layers, d_model, d_ff : int
        Its shape.
    dtype : str
        Dtype of the edited weights.
    layers : mapping of int to str
        Edited layer → hash of its down projection before all edits.
    parameters : str
        Hash of all parameters before all edits.
    config, vocabulary : str
        Hashes of the configuration and of the tokenizer's vocabulary.
    """

    name: str
    kind: str
    n_layers: int
    d_model: int
    d_ff: int
    dtype: str
    layers: Mapping[int, str] = field(repr=False)
    parameters: str = field(repr=False)
    config: str = field(repr=False)
    vocabulary: str = field(repr=False)

    @classmethod
    def of(cls, model: EditableModel, layers: Sequence[int]) -> ModelIdentity:
        """Return a model's identity, as some of its layers are edited; their originals must be kept."""
        vocabulary = json.dumps(sorted(model.tokenizer.get_vocab().items()))
        return cls(
            name=model.name,
            kind=type(model.hf).__name__,
            n_layers=model.n_layers,
            d_model=model.d_model,
            d_ff=model.d_ff,
            dtype=str(model.dtype),
            layers={layer: digest_of_bytes(bytes_of(model.originals[layer])) for layer in layers},
            parameters=model.originals.parameters_digest(),
            config=_hash(config_text(model)),
            vocabulary=_hash(vocabulary),
        )

    def shape(self) -> str:
        """Say what kind of model it is."""
        return f"{self.kind} of {self.n_layers} layers, d_model {self.d_model}, d_ff {self.d_ff}, {self.dtype}"


def wrong_weights(saved: ModelIdentity, found: ModelIdentity) -> str | None:
    """Say why a session's weights would be wrong in a model, and what to do; None where they are right."""
    if saved.shape() != found.shape():
        dtype = f" Load it with dtype={saved.dtype}." if saved.shape().replace(saved.dtype, found.dtype) == found.shape() else ""
        return f"it was made with {saved.name!r}, a {saved.shape()}; {found.name!r} is a {found.shape()}.{dtype}"
    if differing := [layer for layer, digest in saved.layers.items() if found.layers.get(layer) != digest]:
        return (
            f"{found.name!r} has other weights in layers {differing} than {saved.name!r} had before its first edit: another revision, "
            "or edits or fine-tuning are in them. Load the revision the session was made with, unedited."
        )
    if saved.parameters != found.parameters:
        return (
            f"{found.name!r} has the edited layers of {saved.name!r}, but other parameters elsewhere: another revision, an adapter, or "
            "somebody wrote into them. Load the model the session was made with."
        )
    return None


def doubts(saved: ModelIdentity, found: ModelIdentity) -> list[str]:
    """Say what differs between two models of the same weights; what is measured, and rounds made from here on, may differ too."""
    found_doubts = []
    if saved.config != found.config:
        found_doubts.append("the model's configuration is another one (or is written down otherwise by another version of transformers)")
    if saved.vocabulary != found.vocabulary:
        found_doubts.append("the tokenizer's vocabulary is another one")
    return found_doubts


@dataclass(frozen=True)
class MomentsIdentity:
    """Which key statistics C a session was made with.

    Parameters
    ----------
    layers : mapping of int to str
        Layer → hash of C.
    n_tokens : int
        How many tokens the means are over.
    source : str
        What text, in words.
    file : str, optional
        The file they are kept in, where they are kept with the session.
    """

    layers: Mapping[int, str] = field(repr=False)
    n_tokens: int
    source: str
    file: str | None = None

    @classmethod
    def of(cls, moments: SecondMoments) -> MomentsIdentity:
        """Return the identity of key statistics."""
        layers = {layer: digest_of_bytes(bytes_of(moments[layer])) for layer in moments.layers}
        return cls(layers, moments.n_tokens, moments.source)

    def differing(self, other: MomentsIdentity) -> list[int]:
        """Return the layers whose C is not the same there, or missing."""
        return [layer for layer, digest in self.layers.items() if other.layers.get(layer) != digest]


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
