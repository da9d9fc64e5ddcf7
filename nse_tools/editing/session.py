"""Edit a model round after round, look at earlier rounds, and undo, redo or drop them."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from nse_tools import methods
from nse_tools._repr import table_html
from nse_tools.data.fact import Fact
from nse_tools.data.fact_list import FactList
from nse_tools.editing.batches import EditedRounds, OnConflict, check_batch, check_replaced, check_values, plan_edits
from nse_tools.editing.edit_round import EditRound
from nse_tools.editing.preview import EditPreview
from nse_tools.editing.timeline import Timeline
from nse_tools.editing.weight_history import ParameterChanges, Verification, WeightHistory
from nse_tools.errors import SettingError, StateError
from nse_tools.methods._presets import check_preset
from nse_tools.methods.base import Method, Preparation, RoundInputs
from nse_tools.metrics._cache import MetricCache
from nse_tools.metrics.ability import AbilityScores, session_ability
from nse_tools.metrics.drift import Drift, session_drift
from nse_tools.metrics.forgetting import ForgettingMatrix, Retention, forgetting_matrix, session_retention, session_scores
from nse_tools.metrics.generation import Consistency, Fluency, ReferenceTexts, session_consistency, session_fluency
from nse_tools.models.editable_model import EditableModel
from nse_tools.models.weights import surely_afterwards, uninterrupted, weights_in_place, write_weights
from nse_tools.parallel.executor import Executor
from nse_tools.steps._value_cache import ValueCache
from nse_tools.steps.preserved import PreviousKeys
from nse_tools.steps.records import Replaced
from nse_tools.steps.update import Writer
from nse_tools.steps.values import TargetValues
from nse_tools.tracing.contexts import Contexts, sample_contexts
from nse_tools.tracing.moments import SecondMoments, second_moments

if TYPE_CHECKING:
    from nse_tools.figures.report import Report
    from nse_tools.io._session_folder import SessionFolder
    from nse_tools.io._shared_edit import SharedEdit

_log = logging.getLogger(__name__)


class EditSession:
    """A sequence of rounds of edits on one model; every step is kept for inspection.

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
        Where target values are kept, for this and other sessions: the same facts edited into the same weights with the same
        contexts and settings have the same values (``round.values.cached``). The user's cache by default; False for none.
    autosave : str or Path, optional
        A new folder in which every round is kept: it is on disk before :meth:`edit`, :meth:`undo` or :meth:`rewind` returns.
    executor : Executor, optional
        Where values are optimised, key statistics computed and facts scored, e.g. a cluster
        (:class:`nse_tools.parallel.RayExecutor`); in this process by default. Not saved with the session.

    Raises
    ------
    StorageError
        If the folder for ``autosave`` holds a session already, is in use, or cannot be written.
    SettingError
        If the method names layers the model does not have, or its preset was made for a model of another shape.
    StateError
        If the model already carries edits of another session.
    """

    autosave: SessionFolder | None
    """The folder that keeps every round, if one does; ``autosave.close()`` releases it."""

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
        autosave: str | Path | None = None,
        executor: Executor | None = None,
    ) -> None:
        from nse_tools.io.saved_session import start_autosave

        self.model = model
        self.method = method or methods.nse()
        self.seed = seed
        self.progress = progress
        self.executor = executor
        self.value_cache: ValueCache | None = ValueCache() if value_cache is True else value_cache or None
        self.metric_cache = MetricCache()
        self.find_moments: Callable[[], SecondMoments] | None = None
        self._contexts, self._moments = contexts, moments
        check_preset(self.method, model)
        model.check_layers(self.method.layers)
        if moments is not None:
            _check_moments(moments, self.method.edited_layers, model.d_ff)
        self._weights = WeightHistory(model, self.method.layers)
        self._timeline = Timeline(self._weights.original_digest())
        self._viewed_rounds: tuple[int, ...] = ()
        self._previous_keys = PreviousKeys()
        self._prepared: tuple[Method, dict[int, Preparation]] | None = None
        if self._weights.digest() != self._timeline.original:
            raise StateError(
                f"{model.name}: expected an unedited model, got one that carries edits of another session, or a patch. Undo them first "
                "(session.rewind(to=0), nse.remove_patch), load the model again, or go on with that session."
            )
        self.autosave = None if autosave is None else start_autosave(self, autosave)

    # ---- inputs and records ------------------------------------------------------------------------------------------
    @property
    def contexts(self) -> Contexts:
        """The contexts of values and keys, sampled at first use."""
        if self._contexts is None:
            self._contexts = sample_contexts(self.model, self.seed)
        return self._contexts

    @property
    def moments(self) -> SecondMoments:
        """The key statistics C of the edited layers, computed or taken from the cache at first use."""
        if self._moments is None:
            moments = self.find_moments() if self.find_moments is not None else self._compute_moments()
            _check_moments(moments, self.method.edited_layers, self.model.d_ff)
            self._moments = moments
        return self._moments

    def _compute_moments(self) -> SecondMoments:
        return second_moments(self.model, self.method.layers, seed=self.seed, progress=self.progress, executor=self.executor)

    def known_inputs(self) -> tuple[Contexts | None, SecondMoments | None]:
        """Return contexts and key statistics as far as they are known, without sampling or computing them."""
        return self._contexts, self._moments

    @property
    def history(self) -> PreviousKeys:
        """The keys of all rounds so far."""
        if not self._previous_keys.is_of(self.rounds):
            self._previous_keys = self._previous_keys.of(self.rounds)
        return self._previous_keys

    @property
    def timeline(self) -> Timeline:
        """The rounds so far and those that can be redone, as one immutable object."""
        return self._timeline

    @property
    def rounds(self) -> tuple[EditRound, ...]:
        """The rounds so far; ``rounds[0]`` is round 1."""
        return self._timeline.rounds

    @property
    def facts(self) -> list[FactList]:
        """The facts of each round."""
        return [done.facts for done in self.rounds]

    def facts_at(self, round: int) -> list[FactList]:
        """Return the facts of each round up to one, without those that a later of these rounds replaces."""
        return self._timeline.facts_at(round)

    def __len__(self) -> int:
        return len(self._timeline)

    def __iter__(self) -> Iterator[EditRound]:
        return iter(self.rounds)

    # ---- editing -----------------------------------------------------------------------------------------------------
    def edit(self, facts: Fact | Sequence[Fact], values: TargetValues | None = None, *, replaces: Sequence[Replaced] = ()) -> EditRound:
        """Write a batch of facts into the model: one round.

        If anything goes wrong or is interrupted, the weights are put back bit for bit and no round is added.

        Parameters
        ----------
        facts : Fact or sequence of Fact
            The facts of the round.
        values : TargetValues, optional
            Their target values, where they are known already.
        replaces : sequence of Replaced
            Facts of earlier rounds whose targets these replace. Their old keys leave the preserved keys before the update is
            solved for (:class:`PreviousKeys`); ``edit_all(…, on_conflict="replace")`` finds them itself.

        Raises
        ------
        FactError
            If there are no facts, two of them contradict each other, or one that is to be replaced is not there.
        StateError
            If somebody changed the edited weights since the last round.
        EditError
            If a step fails; it says at which fact, layer and setting.
        StorageError
            If the round cannot be kept on disk (``autosave``).
        """
        self._check_weights()
        with self._weights.rollback_on_error(lambda: self._timeline):
            done, writer = self._make_round(facts, values, replaces)
            self._commit(self._timeline.append(done))
        self._weights.keep_masters(self.rounds, writer)
        self._warn_about(done)
        return done

    def _make_round(
        self, facts: Fact | Sequence[Fact], values: TargetValues | None = None, replaces: Sequence[Replaced] = ()
    ) -> tuple[EditRound, Writer]:
        """Change the weights as the next round does, and return its record; the session does not have it yet."""
        batch = facts if isinstance(facts, FactList) else FactList([facts] if isinstance(facts, Fact) else facts)
        check_batch(batch)
        if values is not None:
            check_values(values, batch, self.method, self.model.d_model)
        check_replaced(replaces, self.rounds)
        writer = self._weights.writer(self.rounds, self.method.apply.rounding, self.seed)
        result = self.method.run_round(self.model, batch, self._round_inputs(replaces, writer), values)
        done = EditRound(
            number=len(self) + 1,
            facts=batch,
            method=self.method,
            digest=self._weights.digest(),
            replaces=tuple(replaces),
            **{f.name: getattr(result, f.name) for f in fields(result)},
        )
        return done, writer

    def _round_inputs(self, replaces: Sequence[Replaced], writer: Writer) -> RoundInputs:
        """Return what the method needs for the next round."""
        if self._prepared is None or self._prepared[0] is not self.method:
            self._prepared = self.method, self.method.prepare(self.moments) if self.method.needs_moments else {}
        return RoundInputs(
            contexts=self.contexts,
            prepared=self._prepared[1],
            previous_keys=self.history.without(replaces),
            writer=writer,
            value_cache=self.value_cache,
            executor=self.executor,
            progress=self.progress,
        )

    def _warn_about(self, done: EditRound) -> None:
        if done.number == 1 and done.rounding_loss > 0.5:
            _log.warning(
                "rounding to %s lost %.0f %% of the first round's updates (round.rounding()); method.with_(rounding='stochastic') or "
                "'master', or weights in float32, lose less",
                self.model.dtype,
                100 * done.rounding_loss,
            )
        if done.skipped:
            reasons = dict(Counter(done.skipped.values()))
            first = next(iter(done.skipped))
            _log.warning("round %d: %d facts were not edited (%s), e.g. %s", done.number, len(done.skipped), reasons, first)

    def edit_all(
        self,
        facts: FactList,
        rounds_of: int,
        on_conflict: OnConflict = "error",
        watch: Callable[[EditSession], object] | None = None,
    ) -> EditedRounds:
        """Edit facts round after round.

        A fact whose question (:func:`nse_tools.find_conflicts`) has the same target already, in an earlier round or earlier in the
        list, is skipped, and a warning says so. So a killed run can be resumed: on a session loaded from its ``autosave`` folder,
        the same call makes the rounds that are missing.

        Parameters
        ----------
        facts : FactList
            The facts.
        rounds_of : int
            Facts per round.
        on_conflict : {"error", "replace", "skip"}
            What to do where a question has another target, in an earlier round or in the list: refuse the list before anything is
            edited; edit the newest target, which replaces those of earlier rounds (their old keys leave the preserved keys, and
            measures ask the newest only); or keep the oldest target.
        watch : callable, optional
            Called with the session after each round: :class:`nse_tools.CollapseDetector` warns there, or stops.

        Returns
        -------
        EditedRounds
            The rounds that were made, and the facts that were skipped, with the reason.
        """
        plan = plan_edits(facts, self.rounds, on_conflict)
        if plan.skipped:
            fact, reason = next(iter(plan.skipped.items()))
            _log.warning("edit_all: %d of %d facts are skipped, e.g. %r: %s", len(plan.skipped), len(facts), fact, reason)
        made = []
        for batch, replaces in tqdm(plan.rounds(of=rounds_of), desc="rounds", unit="round", disable=not self.progress):
            made.append(self.edit(batch, replaces=replaces))
            if watch is not None:
                watch(self)
        return EditedRounds(made, plan.skipped)

    def preview(self, facts: Fact | Sequence[Fact], values: TargetValues | None = None) -> EditPreview:
        """Return what :meth:`edit` would do, and leave weights and session as they are, bit for bit.

        The round is made in full and every weight put back, also if a step fails or is interrupted; the edit made afterwards
        gives the same numbers. Contexts, key statistics and optimised values are kept for it.
        """
        self._check_weights()
        with self.model.lock, weights_in_place(self.model, self._weights.current()):
            return EditPreview(self._make_round(facts, values)[0])

    # ---- back and forth ----------------------------------------------------------------------------------------------
    def undo(self) -> EditRound:
        """Undo the last round, bit for bit; return it. :meth:`redo` makes it again."""
        if not self.rounds:
            raise SettingError("There is no round to undo.")
        return self.rewind(to=len(self) - 1)[0]

    def rewind(self, to: int) -> list[EditRound]:
        """Go back to the weights after round ``to`` (0: unedited), bit for bit; return the undone rounds, oldest first."""
        self._timeline.check_round(to)
        self._check_weights()
        undone = list(self.rounds[to:])
        if undone:
            self._move(self._timeline.back_to(to), measured_upto=to)
        return undone

    def redo(self, to: int | None = None) -> EditRound:
        """Make undone rounds again, bit for bit, up to a number (the next one by default); return the last of them."""
        ahead = self._timeline.forward_to(len(self) + 1 if to is None else to)
        self._check_weights()
        self._move(ahead, measured_upto=len(self))
        return self.rounds[-1]

    @contextmanager
    def at(self, round: int) -> Iterator[EditableModel]:
        """Give the model the weights after a round (0: unedited) inside a ``with`` block, then its current weights again.

        Whatever the block writes into the edited weights is discarded. Nothing can be edited inside.
        """
        self._timeline.check_round(round)
        if not self._viewed_rounds:
            self._check_weights()
        last = round == len(self) and not self._viewed_rounds
        weights = self._weights.current() if last else self.weights_at(round)
        before = self._viewed_rounds
        with surely_afterwards(lambda: setattr(self, "_viewed_rounds", before)):
            self._viewed_rounds = (*before, round)
            with weights_in_place(self.model, weights):
                yield self.model

    def weights_at(self, round: int) -> dict[int, Tensor]:
        """Return the weights after a round, layer → (d_model, d_ff) on CPU: W₀ plus the recorded updates, in their order."""
        self._timeline.check_round(round)
        return self._weights.after(self._timeline, round, self.method.apply.rounding)

    def drop(self, round: int) -> EditRound:
        """Remove one round's update and keep the later ones, which move up by one; return the record of the dropped round.

        Exact for the last round (that is :meth:`undo`). Otherwise approximate: the later rounds' updates were solved for on
        weights, and next to keys, that held the dropped round, and are added again as they are. Their residuals, keys and
        digests are measured again, and :attr:`EditRound.approximate` says what happened. To solve again instead:
        ``rewind(to=round - 1)``, then ``edit`` each later round's facts.
        """
        self._timeline.check_round(round, first=1)
        if round == len(self):
            return self.undo()
        self._check_weights()
        dropped, earlier, later = self.rounds[round - 1], self.rounds[: round - 1], self.rounds[round:]
        reason = f"round {round} ({_short_ids(dropped.facts)}) before it was dropped"
        self._forget_measurements_after(round - 1)
        with self._weights.rollback_on_error(lambda: self._timeline):
            write_weights(self.model, self.weights_at(round - 1))
            writer = self._weights.writer(earlier, self.method.apply.rounding, self.seed)
            moved = [
                self._weights.reapply(writer, _without_round(done, round), number, self.contexts, reason)
                for number, done in enumerate(later, start=round)
            ]
            self._commit(self._timeline.with_rounds([*earlier, *moved]))
        return dropped

    def restore(self) -> None:
        """Write the weights of the last round into the model, whatever somebody else wrote into them."""
        self._check_not_viewing()
        with self._weights.rollback_on_error(lambda: None):
            write_weights(self.model, self.weights_at(len(self)))

    def take_over(self, rounds: Sequence[EditRound]) -> None:
        """Give the model, bit for bit, the weights after recorded rounds, and go on from there; for a session without rounds."""
        self._check_weights()
        if self.rounds:
            raise StateError(f"take_over: expected a session without rounds, got one with {len(self)}.")
        if rounds:
            self._move(self._timeline.with_rounds(rounds), measured_upto=0)

    def _check_weights(self) -> None:
        """Refuse to go on unless the model has the weights of the last round."""
        self._check_not_viewing()
        if self._weights.digest() != self._timeline.digest:
            raise StateError(
                f"{self.model.name}: expected the weights of round {len(self)} in the edited layers, got others: somebody wrote into them. "
                "session.restore() puts the recorded weights back, bit for bit."
            )

    def _check_not_viewing(self) -> None:
        if self._viewed_rounds:
            round = self._viewed_rounds[-1]
            raise StateError(f"The model has the weights of round {round}: leave the block `with session.at({round}):` first.")

    def _move(self, timeline: Timeline, measured_upto: int) -> None:
        """Go to another timeline and the weights of its last round; all or nothing."""
        weights = self._weights.after(timeline, len(timeline), self.method.apply.rounding)
        self._forget_measurements_after(measured_upto)
        with self._weights.rollback_on_error(lambda: self._timeline):
            write_weights(self.model, weights)
            self._commit(timeline)

    def _commit(self, timeline: Timeline) -> None:
        """Take over a timeline whose last round the model has the weights of; where rounds are kept on disk, they are written first."""
        with uninterrupted():
            if self.autosave is not None:
                self.autosave.keep(self, timeline.rounds)
            self._timeline = timeline

    def _forget_measurements_after(self, round: int) -> None:
        self.metric_cache = self.metric_cache.upto(round)

    # ---- what changed ------------------------------------------------------------------------------------------------
    def verify(self) -> Verification:
        """Recompute the weights of every round from W₀ and the records; compare them with the digests and with the model.

        Nothing is changed, and nothing is raised where they differ: the result says what does.
        """
        return self._weights.verify(self._timeline, self.method.apply.rounding)

    def changed_parameters(self, from_: int = 0, to: int | None = None) -> ParameterChanges:
        """Return which parameters changed between two rounds (0: unedited): norms, largest change, columns, rank, effective rank.

        From the unedited model to the last round by default.
        """
        last = len(self) if to is None else to
        return self._weights.changes(self.weights_at(from_), self.weights_at(last), (from_, last))

    def residuals(self) -> pd.DataFrame:
        """Return the residuals of all rounds (:meth:`EditRound.residuals`)."""
        return pd.concat([done.residuals() for done in self.rounds], ignore_index=True) if len(self) else pd.DataFrame()

    def to_frame(self) -> pd.DataFrame:
        """Return one row per round: facts, passes, facts not edited, residuals, ‖ΔW‖, its loss in rounding, seconds, …."""
        return pd.DataFrame([_row_of(done) for done in self.rounds])

    def __repr__(self) -> str:
        n_facts = sum(len(batch) for batch in self.facts)
        return f"EditSession({self.model.name}: {len(self)} rounds, {n_facts} facts, {self.method!r})"

    def _repr_html_(self) -> str:
        return table_html(self.to_frame(), head=self)

    # ---- what was learned and kept -----------------------------------------------------------------------------------
    def scores(self, round: int | None = None, *, with_perplexity: bool = True) -> pd.DataFrame:
        """Return efficacy, generalization, specificity, … after each round, or after one (:func:`nse_tools.metrics.session_scores`)."""
        return session_scores(self, round, with_perplexity=with_perplexity)

    def forgetting(self, measure: str = "efficacy") -> ForgettingMatrix:
        """Return the forgetting matrix M[t, s] (:func:`nse_tools.metrics.forgetting_matrix`)."""
        return forgetting_matrix(self, measure)

    def retention(self, measure: str = "efficacy") -> Retention:
        """Return how much of each round is kept at the end (:func:`nse_tools.metrics.session_retention`)."""
        return session_retention(self, measure)

    def drift(self, round: int | None = None, texts: Sequence[str] | None = None) -> Drift:
        """Return how far neutral text and weights have moved after each round (:func:`nse_tools.metrics.session_drift`)."""
        return session_drift(self, round, texts)

    def fluency(self, round: int | None = None, **options: Any) -> Fluency:
        """Return the fluency of what the model writes after a round (:func:`nse_tools.metrics.session_fluency`)."""
        return session_fluency(self, round, **options)

    def consistency(self, references: ReferenceTexts, round: int | None = None, **options: Any) -> Consistency:
        """Return its likeness to reference texts of the new targets (:func:`nse_tools.metrics.session_consistency`)."""
        return session_consistency(self, references, round, **options)

    def ability(self, tasks: str | Sequence[str] | None = None, rounds: int | Sequence[int] | None = None, **options: Any) -> AbilityScores:
        """Return the scores of lm-eval's or our own tasks after some rounds (:func:`nse_tools.metrics.session_ability`)."""
        return session_ability(self, tasks, rounds, **options)

    def report(self, path: str | Path | None = None, *, measure: bool = True) -> Report:
        """Return, and write to ``path``, one HTML page with all that an appendix needs (:func:`nse_tools.figures.session_report`)."""
        from nse_tools.figures.report import session_report

        return session_report(self, path, measure=measure)

    # ---- on disk -----------------------------------------------------------------------------------------------------
    def save(self, path: str | Path, *, include_moments: bool = False, overwrite: bool = False) -> None:
        """Write the session into a folder, from which it can be loaded (:func:`nse_tools.io.save_session`)."""
        from nse_tools.io.saved_session import save_session

        save_session(self, path, include_moments=include_moments, overwrite=overwrite)

    @classmethod
    def load(
        cls,
        path: str | Path,
        model: EditableModel,
        *,
        force: bool = False,
        upto: int | None = None,
        autosave: bool = False,
        moments: SecondMoments | None = None,
        progress: bool = True,
        value_cache: ValueCache | bool = True,
    ) -> EditSession:
        """Load a session into the unedited model it was made with (:func:`nse_tools.io.load_session`)."""
        from nse_tools.io.saved_session import load_session

        return load_session(
            path, model, force=force, upto=upto, autosave=autosave, moments=moments, progress=progress, value_cache=value_cache
        )

    def export(
        self,
        path: str | Path,
        as_: Literal["model", "patch", "lora"] = "model",
        *,
        round: int | None = None,
        overwrite: bool = False,
        check: bool = True,
        rank: int | None = None,
    ) -> SharedEdit:
        """Write the edit for use without this session; it is read again and compared with this model before it is put in place.

        Parameters
        ----------
        path : str or Path
            The file (``"patch"``) or folder.
        as_ : {"model", "patch", "lora"}
            A Hugging Face folder that plain transformers loads; one small file for :func:`nse_tools.apply_patch`, which gives
            the same model these weights bit for bit; or a LoRA adapter for PEFT.
        round : int, optional
            After which round; the last by default.
        overwrite, check : bool
            Replace an earlier export; load model or adapter again and compare logits.
        rank : int, optional
            Rank of the adapter.

        Raises
        ------
        ExportError
            If it cannot be written or does not do what the edit does; nothing is left behind.
        """
        from nse_tools.io.export import export_session

        self._check_weights()
        return export_session(self, path, as_, round=round, overwrite=overwrite, check=check, rank=rank)


def _row_of(done: EditRound) -> dict[str, object]:
    """Return a round's row of :meth:`EditSession.to_frame`."""
    return {
        "round": done.number,
        "facts": len(done.facts),
        "passes": len(done.passes),
        "not_edited": len(done.skipped),
        "residual_before": done.residuals().query("step == 0").residual.mean(),
        "residual_after": sum(done.final_residuals) / len(done.facts),
        "norm_update": sum(update.norm**2 for update in done.updates) ** 0.5,
        "rounding_loss": done.rounding_loss,
        "seconds": sum(done.seconds.values()),
        "cached": sum(done.values.cached),
        "approximate": bool(done.approximate),
    }


def _without_round(done: EditRound, dropped: int) -> EditRound:
    """Return a round's record as it is once an earlier round is dropped, and those after that have moved up."""
    kept = [old for old in done.replaces if old.round != dropped]
    return replace(done, replaces=tuple(Replaced(old.round - (old.round > dropped), old.fact) for old in kept))


def _short_ids(facts: FactList) -> str:
    """Return the first ids of some facts."""
    return ", ".join(map(repr, facts.ids[:3])) + (f" and {len(facts) - 3} more" if len(facts) > 3 else "")


def _check_moments(moments: SecondMoments, layers: Sequence[int], d_ff: int) -> None:
    """Refuse key statistics C that are of another width, or not finite."""
    for layer in sorted(set(layers) & set(moments.layers)):  # fine-tuning needs none
        matrix = moments[layer]
        if matrix.shape != (d_ff, d_ff):
            raise SettingError(
                f"Layer {layer}: the key statistics C have shape {tuple(matrix.shape)}, but keys of this model have {d_ff} coordinates; "
                "they are of another model."
            )
        if not bool(torch.isfinite(matrix).all()):
            raise SettingError(f"Layer {layer}: the key statistics C ({moments.source}) are not finite; compute them again.")
