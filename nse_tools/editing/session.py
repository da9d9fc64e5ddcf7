"""A sequence of rounds on one model: edit, look back in time, take back."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from tqdm.auto import tqdm

from nse_tools import methods
from nse_tools._repr import table_html
from nse_tools.data.fact import Fact
from nse_tools.data.fact_list import FactList
from nse_tools.editing.edit_round import EditRound
from nse_tools.editing.guards import check_batch, check_keep, check_moments, check_preset, check_replaced, check_values
from nse_tools.editing.preview import EditPreview, preview_edit
from nse_tools.editing.time_travel import TimeTravel
from nse_tools.editing.timeline import Past
from nse_tools.editing.turns import Turn
from nse_tools.errors import StateError
from nse_tools.methods.base import Method, RoundInputs
from nse_tools.models.editable_model import EditableModel
from nse_tools.models.weights import digest_of, digest_of_weights
from nse_tools.parallel.executor import Executor
from nse_tools.steps._value_cache import ValueCache
from nse_tools.steps.preserved import PreviousKeys
from nse_tools.steps.records import Replaced
from nse_tools.steps.values import TargetValues
from nse_tools.tracing.contexts import Contexts
from nse_tools.tracing.moments import SecondMoments

_log = logging.getLogger(__name__)


class EditSession(TimeTravel):
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
    autosave : str or Path, optional
        A new folder in which every round is kept: it is on disk before :meth:`edit`, :meth:`undo` or :meth:`rewind` returns.
    keep : int, optional
        How many of the last rounds stay in memory; older ones are read from the folder of ``autosave`` when they are asked for, so
        that a session of any length needs the same memory. All by default.
    executor : Executor, optional
        Where values are searched for, key statistics are computed and facts are scored, e.g. a cluster
        (:class:`nse_tools.scale.RayExecutor`); in this process by default. Not saved with the session.

    Raises
    ------
    StorageError
        If the folder for ``autosave`` holds a session already, is in use, or cannot be written.
    SettingError
        If the method names layers the model does not have, or its preset was made for a model of another shape; or if rounds
        shall be left to a folder and there is none.
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
        autosave: str | Path | None = None,
        keep: int | None = None,
        executor: Executor | None = None,
    ) -> None:
        self.model = model
        self.method = method or methods.nse()
        self.seed = seed
        self.progress = progress
        self.executor = executor
        self.value_cache: ValueCache | None = ValueCache() if value_cache is True else value_cache or None
        self.memo: dict[Any, Any] = {}
        """Results that other rooms keep with the session (scores); entries are keyed by the round they belong to."""
        self.name = "main"
        self._contexts, self._moments = contexts, moments
        self._history = PreviousKeys()
        self._prepared = None
        check_preset(self.method, model)
        model.check_layers(self.method.layers)
        if moments is not None:
            check_moments(moments, self.method.edited_layers, model.d_ff)
        model.originals.keep(self.method.layers)
        self._past = Past(digest_of_weights(model.originals[layer] for layer in self.method.layers))
        self._turn = Turn(self)
        if digest_of(model, self.method.layers) != self._past.original:
            raise StateError(
                "The model already carries edits of another session, or a patch. Take them back first (session.rewind(to=0), "
                "nse.remove_patch), load the model anew, or go on from that session: session.branch()."
            )
        self.keep = check_keep(keep, autosave is not None)
        from nse_tools.io.saved_session import start_autosave

        self.autosave = None if autosave is None else start_autosave(self, autosave)

    # ---- rounds ------------------------------------------------------------------------------------------------------
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
            Facts of earlier rounds that these correct. Their old keys, which would hold the old targets, leave the history before
            the update is solved for (:class:`PreviousKeys`); :class:`nse_tools.EditStream` finds them by itself.

        Returns
        -------
        EditRound
            The record of the round.

        Raises
        ------
        FactError
            If there are no facts, two of them contradict each other, or one that is to be replaced is not there.
        StateError
            If somebody changed the edited weights since the last round.
        EditError
            If a step fails; it says at which fact, layer and setting.
        StorageError
            If the round cannot be kept on disk (``autosave``): the edit is taken back.
        """
        batch = facts if isinstance(facts, FactList) else FactList([facts] if isinstance(facts, Fact) else facts)
        check_batch(batch)
        self._check_untouched()
        if values is not None:
            check_values(values, batch, self.method, self.model.d_model)
        check_replaced(replaces, self.rounds)
        with self._all_or_nothing():
            inputs = self._inputs(replaces)
            result = self.method.run_round(self.model, batch, inputs, values)
            done = EditRound(
                number=len(self) + 1,
                facts=batch,
                method=self.method,
                digest=digest_of(self.model, self.method.layers),
                replaces=tuple(replaces),
                **{f.name: getattr(result, f.name) for f in fields(result)},
            )
            self._commit(self._past.and_then(done))
        if self.method.apply.rounding == "master":
            assert inputs.writer is not None
            self._masters = self.rounds, inputs.writer.masters
        if done.number == 1 and done.rounding_loss > 0.5:
            _log.warning(
                "rounding to %s lost %.0f %% of the first round's updates (round.rounding()); method.with_(rounding='stochastic') or "
                "'master', or weights in float32, lose less",
                self.model.dtype,
                100 * done.rounding_loss,
            )
        if done.skipped:
            reasons = dict(Counter(done.skipped.values()))
            _log.warning(
                "round %d: %d facts were not edited (%s), e.g. %s", done.number, len(done.skipped), reasons, next(iter(done.skipped))
            )
        return done

    def preview(self, facts: Fact | Sequence[Fact], values: TargetValues | None = None) -> EditPreview:
        """Find out what :meth:`edit` would do, and change nothing (:func:`nse_tools.editing.preview.preview_edit`)."""
        return preview_edit(self, facts, values)

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

    # ---- on disk -----------------------------------------------------------------------------------------------------
    def save(self, path: str | Path, **options: Any) -> None:
        """Write the session into a folder, from which it can be loaded (:func:`nse_tools.storage.save_session`)."""
        from nse_tools.io.saved_session import save_session

        save_session(self, path, **options)

    @classmethod
    def load(cls, path: str | Path, model: EditableModel, **options: Any) -> EditSession:
        """Load a session into the unedited model it was made with (:func:`nse_tools.storage.load_session`)."""
        from nse_tools.io.saved_session import load_session

        session: EditSession = load_session(path, model, **options)
        return session

    def export(self, path: str | Path, as_: Literal["model", "patch", "lora"] = "model", **options: Any) -> Any:
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
        self._turn.check(self, own=False)
        from nse_tools.io.export import export_session

        return export_session(self, path, as_, **options)

    # ---- looking -----------------------------------------------------------------------------------------------------
    def scores(self, round: int | None = None, **options: Any) -> pd.DataFrame:
        """Return efficacy, generalization, specificity, … after each round, or after one (:func:`nse_tools.evaluation.session_scores`)."""
        from nse_tools.metrics.forgetting import session_scores

        return session_scores(self, round=round, **options)

    def forgetting(self, **options: Any) -> Any:
        """Return the forgetting matrix M[t, s] (:func:`nse_tools.evaluation.forgetting_matrix`)."""
        from nse_tools.metrics.forgetting import forgetting_matrix

        return forgetting_matrix(self, **options)

    def retention(self, **options: Any) -> Any:
        """Return what first and last round have kept at the end (:func:`nse_tools.evaluation.session_retention`)."""
        from nse_tools.metrics.forgetting import session_retention

        return session_retention(self, **options)

    def drift(self, **options: Any) -> Any:
        """Return how far neutral text and weights have moved after each round (:func:`nse_tools.evaluation.session_drift`)."""
        from nse_tools.metrics.drift import session_drift

        return session_drift(self, **options)

    def fluency(self, round: int | None = None, **options: Any) -> Any:
        """Return the fluency of what the model writes after a round (:func:`nse_tools.evaluation.session_fluency`)."""
        from nse_tools.metrics.generation import session_fluency

        return session_fluency(self, round=round, **options)

    def consistency(self, references: Any, round: int | None = None, **options: Any) -> Any:
        """Return its likeness to reference texts of the new targets (:func:`nse_tools.evaluation.session_consistency`)."""
        from nse_tools.metrics.generation import session_consistency

        return session_consistency(self, references, round=round, **options)

    def ability(self, tasks: str | Sequence[str] | None = None, **options: Any) -> Any:
        """Return how the model does at lm-eval's or our own tasks after some rounds (:func:`nse_tools.evaluation.session_ability`)."""
        from nse_tools.metrics.ability import session_ability

        return session_ability(self, tasks, **options)

    def report(self, path: str | Path | None = None, **options: Any) -> Any:
        """Return, and write to ``path``, one HTML page with all that an appendix needs (:func:`nse_tools.figures.session_report`)."""
        from nse_tools.figures.report import session_report

        return session_report(self, path, **options)

    def residuals(self) -> pd.DataFrame:
        """Return the residuals of all rounds (:meth:`EditRound.residuals`)."""
        return pd.concat([r.residuals() for r in self.rounds], ignore_index=True) if len(self) else pd.DataFrame()

    def to_frame(self) -> pd.DataFrame:
        """Return one row a round: facts, passes, facts skipped, residuals, ‖ΔW‖, its loss in rounding, seconds, …, approximate."""
        rows = []
        for r in self.rounds:
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
                    "rounding_loss": r.rounding_loss,
                    "seconds": sum(r.seconds.values()),
                    "cached": sum(r.values.cached),
                    "approximate": bool(r.approximate),
                }
            )
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        n = sum(len(f) for f in self.facts)
        branch = "" if self.name == "main" else f", {self.name!r}"
        return f"EditSession({self.model.name}{branch}: {len(self)} rounds, {n} facts, {self.method!r})"

    def _repr_html_(self) -> str:
        return table_html(self.to_frame(), head=self)

    def _inputs(self, replaces: Sequence[Replaced] = ()) -> RoundInputs:
        """Return what the method needs for the next round."""
        if self._prepared is None or self._prepared[0] is not self.method:
            self._prepared = self.method, self.method.prepare(self.moments) if self.method.needs_moments else {}
        return RoundInputs(
            contexts=self.contexts,
            prepared=self._prepared[1],
            previous_keys=self.history.without(replaces),
            writer=self._writer(),
            value_cache=self.value_cache,
            executor=self.executor,
            progress=self.progress,
        )
