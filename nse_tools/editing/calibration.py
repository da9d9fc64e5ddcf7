"""Propose NSE's settings for a model from measurements on a few facts."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from nse_tools._repr import table_html
from nse_tools._validate import checked_layers
from nse_tools.data.fact import Fact
from nse_tools.data.fact_list import FactList
from nse_tools.errors import FactError, ModelError
from nse_tools.methods.locate_then_edit import LocateThenEdit
from nse_tools.methods.nse import nse
from nse_tools.models.editable_model import EditableModel
from nse_tools.steps.keys import Keys, SubjectStates, hidden_states
from nse_tools.steps.solvers import PreservedMoments
from nse_tools.steps.values import compute_values
from nse_tools.tracing.causal_trace import CausalTrace, causal_trace, first_token_ratio
from nse_tools.tracing.contexts import Contexts, sample_contexts
from nse_tools.tracing.moments import SecondMoments, second_moments
from nse_tools.tracing.prompts import locate_fact

if TYPE_CHECKING:
    import plotly.graph_objects as go

_log = logging.getLogger(__name__)
Choice = tuple[str, Any, str]
"""Setting, value, and why, in one sentence."""

FEWEST = 3
"""Facts that a calibration needs at least, and known ones that a trace does."""
SAMPLE, OPTIMISED = 16, 8
"""Facts that are sampled, and those among them whose values are optimised."""
WIDEST = 5
"""Edited layers at most; the released settings have 5 or 6."""
DEPTH = 0.25
"""Depth of the last edited layer where no trace can be had, as a share of the model's (released: 0.26 to 0.36)."""
PLATEAU = 0.98
"""A layer is on the trace's plateau if it brings back this share of what the best layer does."""
SINK_RATIO = 100.0
"""Keys at the first token that are this many times larger (in ‖k‖²) than elsewhere write the attention sink."""
CLOSED = 0.95
"""Share of the residuals that one pass shall close."""
WEIGHTS = tuple(10 ** (e / 4) for e in range(25))
"""λ at which the closed share is noted, as evidence: 1 to 1 000 000."""
STRIDES = (0.02, 0.04, 0.08, 0.16)
"""Lengths of a step of Adam that are tried, as shares of ‖h₀‖: v_lr·√d_model/‖h₀‖."""
CLAMPS = (0.5, 0.75, 1.0)
"""Radii of the ball for δ that are tried, as shares of ‖h₀‖."""
LIKELY, NEARLY_ALL = 0.9, 0.9
"""p(target) that a value has to reach, and the share of the sampled facts for which it has to."""
ALPHA_SHARE, BOUND_MARGIN = 0.05, 1.5
"""α as a share of the mean ‖z − h‖; the upper bound as a multiple of the longest δ allowed."""
STEPS = 25
RELEASED: tuple[Choice, ...] = (
    ("v_num_grad_steps", STEPS, "As released for most models; the learning rate was chosen for it."),
    ("passes", 2, "As released: the second pass closes what the first leaves."),
    ("neuron_threshold", 1.0, "As released for most models: all neurons; a share below 1 was not measured here."),
)


@dataclass(frozen=True)
class Calibration:
    """Proposed settings with their reasons and the measurements behind them.

    Parameters
    ----------
    method : Method
        NSE with the proposed settings, without preset, ready for a session.
    choices : tuple of (str, object, str)
        Setting, value, and why, in one sentence.
    trace : CausalTrace, optional
        The causal trace of the facts that the model knows; none where it knows too few, or layers were given.
    layers : DataFrame
        One row per layer: ``recovered`` (share of p(true target) that its state brings back), ``first_token_ratio`` (mean ‖k‖²
        at the first token over that elsewhere), ``chosen``.
    weights : DataFrame
        One row per λ: ``closed``, the share of the residuals that one pass closes, and each layer's share (``layer 3``, …).
    rates : DataFrame
        One row per learning rate, fact and step of the value optimisation: ``loss``, ``probability`` of the new target.
    clamps : DataFrame
        One row per clamp and fact: ``norm_h0``, ``norm_delta`` (= ‖z − h‖ before an edit), ``probability`` and ``loss`` at the end.
    fact_ids : tuple of str
        The sampled facts.
    model : str
        The model's name.
    seed : int
        Seed of sample, noise, contexts and text for C.
    """

    method: LocateThenEdit
    choices: tuple[Choice, ...] = field(repr=False)
    trace: CausalTrace | None = field(repr=False)
    layers: pd.DataFrame = field(repr=False)
    weights: pd.DataFrame = field(repr=False)
    rates: pd.DataFrame = field(repr=False)
    clamps: pd.DataFrame = field(repr=False)
    fact_ids: tuple[str, ...] = field(repr=False)
    model: str
    seed: int

    def to_frame(self) -> pd.DataFrame:
        """Return one row per setting: value, and why."""
        return pd.DataFrame(list(self.choices), columns=["setting", "value", "why"])

    def __repr__(self) -> str:
        m = self.method
        return (
            f"Calibration({self.model}, {len(self.fact_ids)} facts, seed {self.seed}: layers {span(m.layers)}, v_lr {m.values.v_lr:g}, "
            f"clamp {m.values.clamp_norm_factor:g}, λ {m.setting('mom2_update_weight'):g}, "
            f"α {m.schedule.alpha:g}, upper bound {m.schedule.upper_bound:g})"
        )

    def _repr_html_(self) -> str:
        with pd.option_context("display.max_colwidth", None):  # the reasons are long
            return table_html(self.to_frame(), head=self)

    def plot(self, title: str | None = None) -> go.Figure:
        """Draw the evidence (:func:`nse_tools.plots.calibration`)."""
        from nse_tools.plots.calibration import calibration

        return calibration(self, title)


def calibrate(
    model: EditableModel,
    facts: Sequence[Fact],
    *,
    seed: int = 0,
    name: str = "calibrated",
    layers: Sequence[int] | None = None,
    contexts: Contexts | None = None,
    moments: SecondMoments | None = None,
    progress: bool = True,
) -> Calibration:
    """Propose NSE's settings for a model, from measurements on a few facts; nothing is edited.

    Layers come from a causal trace, λ from the keys' size in units of C, learning rate and clamp from optimised values, and the
    band of residuals from the values' distances. Everything runs under the original weights.

    Parameters
    ----------
    model : EditableModel
        The model.
    facts : sequence of Fact
        Three at least, with their true targets and best such that the model knows; up to 16 are sampled from them.
        Do not take those that will be used for measuring.
    seed : int
        Seed of the sample, the trace's noise, the contexts and the text for C.
    name : str
        The method's name.
    layers : sequence of int, optional
        Layers to edit, where they are not to be chosen here: no trace is made.
    contexts : Contexts, optional
        As a session takes them; sampled with ``seed`` by default.
    moments : SecondMoments, optional
        C of the layers; by default computed or read from the cache, where a session with the same seed finds it again.
    progress : bool
        Show progress bars.

    Raises
    ------
    FactError
        If there are fewer than three facts.
    SettingError
        If the given layers are not ascending.
    ModelError
        If a given layer does not exist, or every layer where facts are looked up writes the attention sink.
    """
    if len(facts) < FEWEST:
        raise FactError(f"calibrate: {len(facts)} facts are too few to judge by; give at least {FEWEST}, better {SAMPLE}.")
    sample = FactList(facts, "calibration").shuffled(seed)[:SAMPLE]
    with model.original_weights(), tqdm(total=5, desc="calibration", disable=not progress) as bar:
        trace, layer_table, layer_choice = _choose_layers(model, sample, layers, seed)
        chosen: tuple[int, ...] = layer_choice[1]
        bar.update()
        contexts = contexts or sample_contexts(model, seed)
        moments = moments or second_moments(model, chosen, seed=seed, progress=progress)
        bar.update()
        weights, weight = _choose_weight(model, sample, chosen, contexts, moments)
        bar.update()
        base = nse(None, name=name, layers=chosen, mom2_update_weight=weight[1])
        optimised, h0 = sample[:OPTIMISED], hidden_states(model, sample, chosen[-1]).norm(dim=1)
        rates, rate = _choose_rate(model, optimised, contexts, base, float(h0.mean()))
        bar.update()
        clamps, clamp = _choose_clamp(model, optimised, contexts, base.with_(v_lr=rate[1]))
        bar.update()
    choices = (layer_choice, weight, rate, clamp, *_choose_band(clamps, clamp[1], h0), *RELEASED)
    method = nse(None, name=name, **{setting: value for setting, value, _ in choices})
    return Calibration(method, choices, trace, layer_table, weights, rates, clamps, tuple(sample.ids), model.name, seed)


# ---- layers: from the causal trace -------------------------------------------------------------------------------------
def _choose_layers(
    model: EditableModel, facts: FactList, given: Sequence[int] | None, seed: int
) -> tuple[CausalTrace | None, pd.DataFrame, Choice]:
    ratio = first_token_ratio(model, [locate_fact(model, f, with_target=False).ids for f in facts])
    trace = None if given is not None else _trace_known(model, facts, seed)
    recovered = trace.recovered() if trace else None
    if given is not None:
        model.check_layers(given)
        layers, why = checked_layers(given), "Given."
    else:
        layers = propose_layers(recovered, ratio)
        why = _why_layers(layers, recovered)
    table = pd.DataFrame({"layer": range(model.n_layers), "first_token_ratio": ratio.tolist()})
    table.insert(1, "recovered", recovered.tolist() if recovered is not None else float("nan"))
    return trace, table.assign(chosen=table.layer.isin(layers)), ("layers", layers, why)


def _trace_known(model: EditableModel, facts: FactList, seed: int) -> CausalTrace | None:
    """Return the trace of the facts that the model knows; None, with a warning, where it shows nothing."""
    complete = [f for f in facts if f.target_true is not None]
    if len(complete) < FEWEST:
        reason = f"{len(complete)} have a true target"
    else:
        trace = causal_trace(model, complete, seed=seed).of_known()
        if len(trace) >= FEWEST and trace.total_effect > 0:
            return trace
        reason = f"{len(trace)} are known to {model.name}"
        if len(trace) >= FEWEST:
            reason = "corrupting their subjects does not make the true targets less likely"
    _log.warning(
        "calibrate: no causal trace can be made: of %d facts %s. Layers are proposed by depth alone; give facts that the model knows "
        "(nse.knowledge tells), or layers=(…).",
        len(facts),
        reason,
    )
    return None


def propose_layers(recovered: Tensor | None, sink_ratio: Tensor) -> tuple[int, ...]:
    """Choose consecutive layers that end where the trace's plateau begins and hold no layer that writes the sink."""
    n_layers = len(sink_ratio)
    width = max(1, min(WIDEST, round(n_layers / 6)))
    if recovered is None:
        ends = [round(DEPTH * (n_layers - 1))]
    else:
        ends = torch.nonzero(recovered >= PLATEAU * recovered.max())[:, 0].tolist()
    windows = [tuple(layer for layer in range(end - width + 1, end + 1) if layer >= 0) for end in ends]
    without_sink = [tuple(layer for layer in window if sink_ratio[layer] <= SINK_RATIO) for window in windows]
    complete = [window for window, kept in zip(windows, without_sink, strict=True) if window == kept]
    layers = complete[0] if complete else without_sink[0]
    if not layers:
        raise ModelError(f"Layers {windows[0]} all write the attention sink (first token's keys); choose layers yourself: layers=(…).")
    return layers


def _why_layers(layers: tuple[int, ...], recovered: Tensor | None) -> str:
    if recovered is None:
        return f"No trace could be made: the window ends at {DEPTH:.0%} of the depth, near the released settings."
    best, last = int(recovered.argmax()), layers[-1]
    return (
        f"Restoring the subject's last token after layer {last} brings back {float(recovered[last]):.0%} of p(true target), about the "
        f"most of any layer ({float(recovered[best]):.0%}, layer {best}); no layer of the window writes the attention sink."
    )


# ---- λ: from the keys' size in units of C ------------------------------------------------------------------------------
def _choose_weight(
    model: EditableModel, facts: FactList, layers: tuple[int, ...], contexts: Contexts, moments: SecondMoments
) -> tuple[pd.DataFrame, Choice]:
    spectra = key_spectra(SubjectStates.record(model, facts, contexts, layers[0], layers[-1]).keys(layers), moments)
    weight = rounded(propose_weight(spectra, CLOSED))
    rows = []
    for value in sorted({*WEIGHTS, weight}):
        shares = {f"layer {layer}": share for layer, share in layer_shares(spectra, value).items()}
        rows.append({"weight": value, "closed": closed_share(spectra, value), **shares})
    why = f"With it one pass closes {CLOSED:.0%} of the residuals of {len(facts)} facts, by their keys in units of C; more would move C."
    return pd.DataFrame(rows), ("mom2_update_weight", weight, why)


def key_spectra(keys: Mapping[int, Keys], moments: SecondMoments) -> dict[int, Tensor]:
    """Return the eigenvalues of Kᵀ C⁻¹ K for each layer, (n_facts,) float64: how large the facts' keys are in units of C."""
    spectra = {}
    for layer, k in keys.items():
        columns = k.matrix.double().T
        solved, _ = PreservedMoments(layer, moments[layer], 1.0).solve(torch.arange(len(columns)), columns)
        spectra[layer] = torch.linalg.eigvalsh(columns.T @ solved).clamp(min=0)
    return spectra


def layer_shares(spectra: Mapping[int, Tensor], weight: float) -> dict[int, float]:
    """Return the share of its residuals that each layer's solve closes."""
    return {layer: float((g / (weight + g)).mean()) for layer, g in spectra.items()}


def closed_share(spectra: Mapping[int, Tensor], weight: float) -> float:
    """Return the share of the residuals that one pass closes: each layer is given 1/(layers left) of the rest."""
    left, shares = 1.0, layer_shares(spectra, weight)
    for place, layer in enumerate(sorted(spectra)):
        left *= 1 - shares[layer] / (len(spectra) - place)
    return 1 - left


def propose_weight(spectra: Mapping[int, Tensor], share: float) -> float:
    """Return the λ with which one pass closes a share of the residuals (by bisection of log λ; the share falls with λ)."""
    low, high = -12.0, 15.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if closed_share(spectra, 10**middle) > share else (low, middle)
    return 10**low


# ---- learning rate, clamp, band: from optimised values -----------------------------------------------------------------
def _choose_rate(
    model: EditableModel, facts: FactList, contexts: Contexts, base: LocateThenEdit, norm_h0: float
) -> tuple[pd.DataFrame, Choice]:
    half = STEPS // 2
    traces, shares, losses = [], {}, {}
    for rate in (rounded(stride * norm_h0 / model.d_model**0.5) for stride in STRIDES):
        trace = compute_values(model, facts, contexts, base.with_(v_lr=rate, v_num_grad_steps=half + 1)).trace
        traces.append(trace[["fact", "step", "loss", "probability"]].assign(v_lr=rate))
        shares[rate] = float(reached(trace, half).mean())
        losses[rate] = float(trace.groupby("fact").loss.last().mean())
    rate, enough = first_sufficient(shares, losses)
    goal = f"p(target) ≥ {LIKELY:g} in half of the steps for {shares[rate]:.0%} of {len(facts)} facts"
    why = f"The smallest rate tried that reaches {goal}." if enough else f"The lowest loss of those tried; it reaches {goal}."
    return pd.concat(traces, ignore_index=True), ("v_lr", rate, why)


def _choose_clamp(model: EditableModel, facts: FactList, contexts: Contexts, base: LocateThenEdit) -> tuple[pd.DataFrame, Choice]:
    tables, shares, losses = [], {}, {}
    for clamp in CLAMPS:
        values = compute_values(model, facts, contexts, base.with_(clamp_norm_factor=clamp, v_num_grad_steps=STEPS))
        table = values.to_frame()[["fact", "norm_h0", "norm_delta", "probability", "loss"]]
        tables.append(table.assign(clamp_norm_factor=clamp))
        shares[clamp], losses[clamp] = float(reached(values.trace, STEPS).mean()), float(table.loss.mean())
        if shares[clamp] >= NEARLY_ALL:
            break
    clamp, enough = first_sufficient(shares, losses)
    goal = f"p(target) ≥ {LIKELY:g} is reached for {shares[clamp]:.0%} of {len(facts)} facts"
    why = f"The smallest ball tried in which {goal}." if enough else f"The lowest loss of those tried; {goal}."
    return pd.concat(tables, ignore_index=True), ("clamp_norm_factor", clamp, why)


def _choose_band(clamps: pd.DataFrame, clamp: float, h0: Tensor) -> tuple[Choice, Choice]:
    distance = float(clamps[clamps.clamp_norm_factor == clamp].norm_delta.mean())
    longest = clamp * float(torch.max(h0))
    why_alpha = f"{ALPHA_SHARE:.0%} of the mean ‖z − h‖ before an edit ({distance:.3g})."
    why_bound = f"{BOUND_MARGIN:g} times clamp·‖h₀‖ of the largest state ({longest:.3g}), so that no fact is left out."
    return ("alpha", rounded(ALPHA_SHARE * distance), why_alpha), ("upper_bound", rounded(BOUND_MARGIN * longest), why_bound)


def reached(trace: pd.DataFrame, step: int) -> pd.Series:
    """Return per fact whether its value had reached p(target) ≥ :data:`LIKELY` at a step (or stopped before)."""
    return trace[trace.step <= step].groupby("fact", sort=False).probability.last() >= LIKELY


def first_sufficient(shares: Mapping[float, float], losses: Mapping[float, float]) -> tuple[float, bool]:
    """Return the first candidate that works for nearly all facts and True; or the one of least loss and False."""
    for candidate, share in shares.items():
        if share >= NEARLY_ALL:
            return candidate, True
    return min(losses, key=lambda c: losses[c]), False


def rounded(value: float, digits: int = 2) -> float:
    """Round to significant digits: no setting is known better."""
    return value if not value or not math.isfinite(value) else round(value, digits - 1 - math.floor(math.log10(abs(value))))


def span(layers: Sequence[int]) -> str:
    """Write layers as a range where they are one."""
    consecutive = list(layers) == list(range(layers[0], layers[-1] + 1)) and len(layers) > 1
    return f"{layers[0]}–{layers[-1]}" if consecutive else ", ".join(map(str, layers))
