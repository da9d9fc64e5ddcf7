"""A sequence of rounds on one model: edit, look back in time, take back."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from nse_tools import _late
from nse_tools._show import table_html
from nse_tools.editing import methods
from nse_tools.editing.finetune import fine_tune
from nse_tools.editing.history import KeyHistory
from nse_tools.editing.method import Method
from nse_tools.editing.rome import write_one_by_one
from nse_tools.editing.rounds import EditRound
from nse_tools.editing.solvers import PreservedMoments
from nse_tools.editing.updating import Stopwatch, Written, preserved_moments, write_values
from nse_tools.editing.value_cache import ValueCache
from nse_tools.editing.values import TargetValues, compute_values
from nse_tools.errors import FactError, SettingError, StateError
from nse_tools.facts import Fact, FactList
from nse_tools.models import EditableModel
from nse_tools.models.weights import copy_of, digest_of, weights_in_place, write_weights
from nse_tools.tracing.contexts import Contexts, sample_contexts
from nse_tools.tracing.moments import SecondMoments, second_moments

_log = logging.getLogger(__name__)


class EditSession:
    """Rounds of edits on one model, every step kept for inspection.

    Parameters
    ----------
    model : EditableModel
        The model; its weights change with every :meth:`edit`.
    method : Method, optional
        How rounds are made; NSE with the embedded model's preset by default.
    contexts : Contexts, optional
        The contexts of values and keys; sampled from the model with ``seed`` by default, at the first edit.
    moments : SecondMoments, optional
        Key statistics C; by default computed (or taken from the cache) at the first edit.
    seed : int
        Seed of contexts and of the sampled text for C.
    progress : bool
        Show progress bars.
    value_cache : ValueCache or bool
        Target values found before, by this or any other session, are taken from here when the same facts are edited into
        the same weights with the same contexts and settings; ``round.values.cached`` says which were. By default it is the
        user's cache; False searches for every value.

    Raises
    ------
    SettingError
        If the method names layers the model does not have, or its preset was made for a model of another shape.
    StateError
        If the model already carries edits of another session.
    """

    def __init__(
        self,
        model: EditableModel,
        method: Method | None = None,
        *,
        contexts: Contexts | None = None,
        moments: SecondMoments | None = None,
        seed: int = 0,
        progress: bool = True,
        value_cache: ValueCache | bool = True,
    ) -> None:
        self.model = model
        self.method = method or methods.nse()
        self.seed = seed
        self.progress = progress
        self.value_cache: ValueCache | None = ValueCache() if value_cache is True else value_cache or None
        self.memo: dict[Any, Any] = {}
        """Results that other rooms keep with the session (scores); entries are keyed by the round they belong to."""
        self._contexts, self._moments = contexts, moments
        self._rounds: list[EditRound] = []
        self._history = KeyHistory()
        self._bases: tuple[Method, dict[int, PreservedMoments]] | None = None
        _check_preset(self.method, model)
        model.check_layers(self.method.layers)
        model.originals.keep(self.method.layers)
        self._original_digest = digest_of_originals(model, self.method.layers)
        if digest_of(model, self.method.layers) != self._original_digest:
            raise StateError(
                "The model already carries edits of another session, or a patch. Take them back first (session.rewind(to=0), "
                "nse.remove_patch), or load the model anew."
            )

    # ---- recorded inputs ---------------------------------------------------------------------------------------------
    @property
    def contexts(self) -> Contexts:
        """The contexts of this session, sampled at first use."""
        if self._contexts is None:
            self._contexts = sample_contexts(self.model, self.seed)
        return self._contexts

    @property
    def moments(self) -> SecondMoments:
        """The key statistics C of the edited layers, computed or taken from the cache at first use."""
        if self._moments is None:
            self._moments = second_moments(self.model, self.method.layers, seed=self.seed, progress=self.progress)
        return self._moments

    @property
    def history(self) -> KeyHistory:
        """Keys of all rounds so far."""
        if len(self._history) > len(self):
            self._history = self._history.upto(len(self))
        for done in self._rounds[len(self._history) :]:
            self._history.add(done.final_keys)
        return self._history

    # ---- rounds ------------------------------------------------------------------------------------------------------
    @property
    def rounds(self) -> tuple[EditRound, ...]:
        """The rounds so far; ``rounds[0]`` is round 1."""
        return tuple(self._rounds)

    @property
    def facts(self) -> list[FactList]:
        """The facts of each round."""
        return [r.facts for r in self._rounds]

    def __len__(self) -> int:
        return len(self._rounds)

    def __iter__(self) -> Iterator[EditRound]:
        return iter(self._rounds)

    def edit(self, facts: Fact | Sequence[Fact], values: TargetValues | None = None) -> EditRound:
        """Write a batch of facts into the model: one round.

        If anything goes wrong or is interrupted, the weights are put back bit for bit and no round is added.

        Parameters
        ----------
        facts : Fact or sequence of Fact
            The facts of the round.
        values : TargetValues, optional
            Their target values, where they are known already.

        Returns
        -------
        EditRound
            The record of the round.

        Raises
        ------
        FactError
            If there are no facts, or two of them contradict each other.
        StateError
            If somebody changed the edited weights since the last round.
        EditError
            If a step fails; it says at which fact, layer and setting.
        """
        batch = facts if isinstance(facts, FactList) else FactList([facts] if isinstance(facts, Fact) else facts)
        check_batch(batch)
        self._check_untouched()
        if values is not None and (values.fact_ids != tuple(batch.ids) or values.layer != self.method.last_layer):
            raise FactError(f"The given values are of other facts or of layer {values.layer}, not {self.method.last_layer}.")
        watch = Stopwatch()
        with self._all_or_nothing():
            values, written = self._write(batch, values, watch)
            done = EditRound(
                number=len(self) + 1,
                facts=batch,
                method=self.method,
                values=values,
                passes=written.passes,
                final_residuals=written.final_residuals,
                final_keys=written.final_keys,
                seconds=dict(watch.seconds),
                digest=digest_of(self.model, self.method.layers),
                after=written.after,
                first_values=written.first_values,
            )
            self._rounds = [*self._rounds, done]  # from here on the round is there
        if done.skipped:
            reasons = dict(Counter(done.skipped.values()))
            _log.warning(
                "round %d: %d facts were not edited (%s), e.g. %s", done.number, len(done.skipped), reasons, next(iter(done.skipped))
            )
        return done

    def edit_all(self, facts: FactList, rounds_of: int, watch: Callable[[EditSession], object] | None = None) -> list[EditRound]:
        """Edit facts round after round; a progress bar counts the rounds.

        ``watch`` is called with the session after each round: :class:`nse_tools.CollapseDetector` warns there, or stops.
        """
        done = []
        for batch in tqdm(facts.rounds(of=rounds_of), desc="rounds", unit="round", disable=not self.progress):
            done.append(self.edit(batch))
            if watch is not None:
                watch(self)
        return done

    def undo(self) -> EditRound:
        """Take the last round back, bit for bit; return it.

        Raises
        ------
        SettingError
            If there is no round.
        """
        if not self._rounds:
            raise SettingError("There is no round to undo.")
        return self.rewind(to=len(self) - 1)[0]

    def rewind(self, to: int) -> list[EditRound]:
        """Go back to the state after round ``to`` (0: unedited), bit for bit; return the rounds taken back, oldest first.

        Raises
        ------
        SettingError
            If there is no such round.
        StateError
            If somebody changed the edited weights meanwhile.
        """
        self._check_round(to)
        self._check_untouched()
        weights, taken = self.weights_at(to), self._rounds[to:]
        self.memo = {key: value for key, value in self.memo.items() if key[0] <= to}
        with self._all_or_nothing():
            write_weights(self.model, weights)
            self._rounds = self._rounds[:to]
        return taken

    @contextmanager
    def at(self, round: int) -> Iterator[EditableModel]:
        """Look at the model as it was after a round (0: unedited) inside a ``with`` block; then come back.

        Raises
        ------
        SettingError
            If there is no such round.
        """
        self._check_round(round)
        with weights_in_place(self.model, self.weights_at(round)):
            yield self.model

    @torch.no_grad()
    def weights_at(self, round: int) -> dict[int, Tensor]:
        """Return the edited layers' weights after a round: originals plus the recorded updates, in their order.

        Returns
        -------
        dict of int to Tensor
            Layer → (d_model, d_ff), on CPU.

        Raises
        ------
        StateError
            If the result is not, bit for bit, what the round left behind.
        """
        self._check_round(round)
        originals = {layer: self.model.originals[layer] for layer in self.method.layers}
        with weights_in_place(self.model, originals):
            for done in self._rounds[:round]:
                for update in done.updates:
                    update.apply(self.model)
            expected = self._rounds[round - 1].digest if round else self._original_digest
            if digest_of(self.model, self.method.layers) != expected:
                raise StateError(f"The weights of round {round} could not be made again bit for bit; was the thread count changed?")
            return {layer: copy_of(self.model.weight(layer)) for layer in self.method.layers}

    def export(self, path: str | Path, as_: str = "model", **options: Any) -> Any:
        """Write the edit for use without this session; it is read again and compared with this model before it is put in place.

        Parameters
        ----------
        path : str or Path
            The file (``"patch"``) or folder.
        as_ : {"model", "patch", "lora"}
            A Hugging Face folder that plain transformers loads; one small file for :func:`nse_tools.apply_patch`, which gives
            the same model these weights bit for bit; or a LoRA adapter for PEFT.
        **options
            ``round`` (the state after that round), ``overwrite`` (an earlier export), ``check`` (load model or adapter again
            and compare logits; True by default), ``rank`` (of the adapter).

        Returns
        -------
        SharedEdit
            What was written, with its size and what was compared.

        Raises
        ------
        SettingError
            If there is nothing to export, the path is taken, or an option is wrong.
        StateError
            If somebody changed the edited weights.
        ExportError
            If it cannot be written or does not do what the edit does; nothing is left behind.
        """
        self._check_untouched()
        return _late.call("sharing", "export_session", self, path, as_, **options)

    # ---- looking -----------------------------------------------------------------------------------------------------
    def scores(self, round: int | None = None, **options: Any) -> pd.DataFrame:
        """Return efficacy, generalization, specificity, … after each round, or after one (:func:`nse_tools.evaluation.session_scores`)."""
        return _late.call("evaluation", "session_scores", self, round=round, **options)

    def forgetting(self, **options: Any) -> Any:
        """Return the forgetting matrix M[t, s] (:func:`nse_tools.evaluation.forgetting_matrix`)."""
        return _late.call("evaluation", "forgetting_matrix", self, **options)

    def retention(self, **options: Any) -> Any:
        """Return what first and last round have kept at the end (:func:`nse_tools.evaluation.session_retention`)."""
        return _late.call("evaluation", "session_retention", self, **options)

    def drift(self, **options: Any) -> Any:
        """Return how far neutral text and weights have moved after each round (:func:`nse_tools.evaluation.session_drift`)."""
        return _late.call("evaluation", "session_drift", self, **options)

    def fluency(self, round: int | None = None, **options: Any) -> Any:
        """Return the fluency of what the model writes after a round (:func:`nse_tools.evaluation.session_fluency`)."""
        return _late.call("evaluation", "session_fluency", self, round=round, **options)

    def consistency(self, references: Any, round: int | None = None, **options: Any) -> Any:
        """Return its likeness to reference texts of the new targets (:func:`nse_tools.evaluation.session_consistency`)."""
        return _late.call("evaluation", "session_consistency", self, references, round=round, **options)

    def ability(self, tasks: str | Sequence[str] | None = None, **options: Any) -> Any:
        """Return how the model does at lm-eval's or our own tasks after some rounds (:func:`nse_tools.evaluation.session_ability`)."""
        return _late.call("evaluation", "session_ability", self, tasks, **options)

    def changed_parameters(self) -> pd.DataFrame:
        """Return one row an edited weight: name, shape, ‖ΔW‖, ‖ΔW‖/‖W₀‖, largest change of an entry."""
        rows = []
        for layer in self.method.layers:
            before = self.model.originals[layer].double()
            change = copy_of(self.model.weight(layer)).double() - before
            rows.append(
                {
                    "parameter": self.model.weight_name(layer),
                    "shape": tuple(before.shape),
                    "norm_change": float(change.norm()),
                    "relative_change": float(change.norm() / before.norm()),
                    "largest_change": float(change.abs().max()),
                }
            )
        return pd.DataFrame(rows)

    def residuals(self) -> pd.DataFrame:
        """Return the residuals of all rounds (:meth:`EditRound.residuals`)."""
        return pd.concat([r.residuals() for r in self._rounds], ignore_index=True) if self._rounds else pd.DataFrame()

    def to_frame(self) -> pd.DataFrame:
        """Return one row a round: facts, passes, facts skipped, mean residual before and after, ‖ΔW‖, seconds, values from the cache."""
        rows = []
        for r in self._rounds:
            before = r.residuals().query("step == 0").residual.mean()
            rows.append(
                {
                    "round": r.number,
                    "facts": len(r.facts),
                    "passes": len(r.passes),
                    "not_edited": len(r.skipped),
                    "residual_before": before,
                    "residual_after": sum(r.final_residuals) / len(r.facts),
                    "norm_update": sum(u.norm**2 for u in r.updates) ** 0.5,
                    "seconds": sum(r.seconds.values()),
                    "cached": sum(r.values.cached),
                }
            )
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        n = sum(len(f) for f in self.facts)
        return f"EditSession({self.model.name}: {len(self)} rounds, {n} facts, {self.method!r})"

    def _repr_html_(self) -> str:
        return table_html(self.to_frame(), head=self)

    def _write(self, facts: FactList, values: TargetValues | None, watch: Stopwatch) -> tuple[TargetValues, Written]:
        """Change the weights as the method's solver does; return the values and what was done."""
        model, method = self.model, self.method
        shown: dict[str, Any] = {"watch": watch, "progress": self.progress}
        if method.solver == "gradient":
            if values is not None:
                raise SettingError("Fine-tuning (solver 'gradient') seeks no values and can be given none.")
            return fine_tune(model, method, facts, self.contexts, **shown)
        if self._bases is None or self._bases[0] is not method:
            self._bases = method, preserved_moments(method, self.moments)
        inputs = (self.contexts, self.moments, self.history)
        if method.solver == "rank_one":
            return write_one_by_one(model, method, facts, values, *inputs, bases=self._bases[1], cache=self.value_cache, **shown)
        if values is None:
            with watch.time("values"):
                values = compute_values(model, facts, self.contexts, method, progress=self.progress, cache=self.value_cache)
        first = None
        if method.spread == "ends" and len(method.edited_layers) > 1:
            with watch.time("values"):
                at_first = method.with_(layers=method.layers[:1])
                first = compute_values(model, facts, self.contexts, at_first, progress=self.progress, cache=self.value_cache)
        return values, write_values(model, method, facts, values, *inputs, first_values=first, bases=self._bases[1], **shown)

    # ---- guards ------------------------------------------------------------------------------------------------------
    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """Put the weights back if the ``with`` block is left by an error or interrupt before it has set ``self._rounds``."""
        before, rounds = {layer: copy_of(self.model.weight(layer)) for layer in self.method.layers}, self._rounds
        try:
            yield
        except BaseException:
            if self._rounds is rounds:
                write_weights(self.model, before)
            raise

    def _check_round(self, round: int) -> None:
        if not isinstance(round, int) or not 0 <= round <= len(self):
            raise SettingError(f"There are rounds 0 (unedited) to {len(self)}; there is no round {round!r}.")

    def _check_untouched(self) -> None:
        expected = self._rounds[-1].digest if self._rounds else self._original_digest
        if digest_of(self.model, self.method.layers) != expected:
            raise StateError(
                f"The edited layers' weights are not what round {len(self)} left behind: somebody wrote into them. "
                "Put them back, or write session.weights_at(round) into the model."
            )


def check_batch(facts: FactList) -> None:
    """Refuse a batch that is empty or contradicts itself: one prompt and subject with two new targets.

    Raises
    ------
    FactError
        Naming the facts.
    """
    if not len(facts):
        raise FactError("There are no facts to edit.")
    targets: dict[str, list[Fact]] = defaultdict(list)
    for fact in facts:
        targets[fact.text].append(fact)
    for text, same in targets.items():
        if len({f.target_new for f in same}) > 1:
            raise FactError(f"Facts {[f.id for f in same]} contradict each other: {text!r} → {[f.target_new for f in same]}.")


def digest_of_originals(model: EditableModel, layers: Sequence[int]) -> str:
    """Return the hash that the edited layers have under the original weights."""
    with weights_in_place(model, {layer: model.originals[layer] for layer in layers}):
        return digest_of(model, layers)


def _check_preset(method: Method, model: EditableModel) -> None:
    if method.preset is None or method.preset not in methods.presets():
        return
    made_for = methods.presets()[method.preset]["model"]
    found = {"n_layers": model.n_layers, "d_model": model.d_model, "d_ff": model.d_ff}
    if made_for != found:
        raise SettingError(
            f"The preset {method.preset!r} was made for a model of shape {made_for}; {model.name} has {found}. "
            "Use its own preset, or preset=None with layers=… and settings for this model (alpha relative: band_unit='relative')."
        )
