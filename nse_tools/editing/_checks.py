"""Run the single checks of :func:`nse_tools.check_model`: each returns verdict, what was seen and what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from nse_tools.data.fact import Fact
from nse_tools.editing.calibration import propose_layers
from nse_tools.editing.session import EditSession
from nse_tools.methods.locate_then_edit import LocateThenEdit
from nse_tools.methods.nse import nse
from nse_tools.models.architecture import ARCHITECTURES, stores_transposed
from nse_tools.models.editable_model import EditableModel, hidden_of
from nse_tools.models.weights import changed_layers, copy_of, digest_of
from nse_tools.steps.keys import collect_keys, hidden_states
from nse_tools.steps.values import compute_values
from nse_tools.tracing._engine.packed_attention import packs_rows
from nse_tools.tracing.contexts import Contexts
from nse_tools.tracing.hidden_states import LastTokenStates
from nse_tools.tracing.moments import SecondMoments
from nse_tools.tracing.prompts import LEAD, locate, locate_fact

Verdict = Literal["ok", "warning", "problem"]
Finding = tuple[Verdict, str, str]
TRIAL = Fact("trial", "Eiffel Tower", "The {} is in the city of", "Rome")
BARE = Contexts(("",))
PROBES = (("The capital of {} is", "France"), ("{} was born in", "São Tomé"), ("Who wrote about {}", "東京 & Øresund"))
PLAIN_TEXT = "The sun rises in the east and sets in the west, and in the summer the days are longer than in the winter."
CLOSE = 1e-3
"""Relative difference that rounding explains."""
SHORT_WINDOW = 64
"""Prompts with a prefix and a target are mostly shorter."""


def trial_layers(model: EditableModel) -> tuple[int, ...]:
    """Return the layers that the trial edits: those at the usual depth."""
    return propose_layers(None, torch.ones(model.n_layers))


def architecture_of(model: EditableModel) -> Finding:
    """Name the row of the table, and check that the down projection does what its orientation says."""
    rows = [name for name, row in ARCHITECTURES.items() if row == model.architecture]
    layer = trial_layers(model)[-1]
    down = model.down(layer)
    keys = torch.linspace(-1, 1, 2 * model.d_ff, device=model.weight(layer).device).reshape(2, -1).to(model.dtype)
    with torch.no_grad():
        got = down(keys).float()
        bias = getattr(down, "bias", None)
        expected = keys.float() @ model.weight(layer).float().T + (0 if bias is None else bias.float())
    stored = "(d_ff, d_model), as Conv1D" if stores_transposed(down) else "(d_model, d_ff)"
    seen = f"{rows[0] if rows else 'named by hand'}: {model.weight_name(layer)}, stored as {stored}; logits follow from the last state"
    if _apart(got, expected) > 10 * _rounding(model):
        return (
            "problem",
            f"{seen}; but W·k is {_apart(got, expected):.2g} off",
            "The down projection does more than a product with its weight.",
        )
    return "ok", seen, ""


def tokens(model: EditableModel) -> Finding:
    """Check that the subject's last token is found by characters, and that every token has an embedding."""
    table = model.hf.get_input_embeddings().weight.shape[0]
    misspelt = []
    for prompt, subject in PROBES:
        located = locate(model, prompt, subject)
        if max(located.ids) >= table:
            return "problem", f"token {max(located.ids)} has no embedding ({table} rows)", "Take the tokenizer that belongs to the model."
        decoded = model.tokenizer.decode(list(located.upto_subject), skip_special_tokens=True)
        if not decoded.rstrip().endswith(subject[-1]):
            misspelt.append(subject)
    if misspelt:
        return (
            "warning",
            f"tokens of {', '.join(map(repr, misspelt))} do not spell it again",
            "The tokenizer changes letters; look at locate(model, prompt, subject) for subjects like these.",
        )
    return "ok", f"subjects are found by characters, also {PROBES[-1][1]!r}; {len(model.tokenizer)} tokens, {table} embeddings", ""


def first_token(model: EditableModel) -> Finding:
    """Check whether a BOS token is put first, and whether the model needs one."""
    ids = list(model.encode(PLAIN_TEXT).ids)
    bos = model.tokenizer.bos_token_id
    if model.encode(PLAIN_TEXT).spans[0] == (0, 0):
        return "ok", f"the tokenizer begins every text with {model.tokenizer.decode(ids[:1])!r}", ""
    seen = f"the tokenizer adds no first token; a subject that would come first gets {LEAD!r} before it"
    if bos is None:
        return "ok", seen, ""
    without, with_it = _nll(model, ids, 0), _nll(model, [bos, *ids], 1)
    if without - with_it > 0.5:
        return (
            "warning",
            f"{seen}; plain text costs {without:.2f} nats per token, with {model.tokenizer.bos_token!r} first {with_it:.2f}",
            "Load the tokenizer so that it adds its BOS token (add_bos_token=True).",
        )
    return "ok", f"{seen}; {model.tokenizer.bos_token!r} first would change little ({without:.2f} → {with_it:.2f} nats per token)", ""


def padding(model: EditableModel) -> Finding:
    """Check that a row has the same state in a batch with a longer one as alone."""
    rows = [locate(model, prompt, subject).upto_subject for prompt, subject in PROBES]
    layer = model.n_layers - 1
    together = LastTokenStates.record(model, rows, layer, layer).hidden(layer).float()
    alone = torch.cat([LastTokenStates.record(model, [row], layer, layer).hidden(layer).float() for row in rows])
    apart = _apart(together, alone)
    seen = f"padded rows differ from single ones by {apart:.1g}"
    if apart > 10 * _rounding(model):
        return "problem", seen, "The model ignores attention mask or positions; results depend on what is in a batch."
    return "ok", seen, ""


def attention_window(model: EditableModel) -> Finding:
    """Report how far back the model attends, and how many positions it has."""
    config = model.hf.config.get_text_config()
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    positions = model.n_positions
    back = "all tokens before" if window is None else f"{window} tokens back in some or all layers"
    seen = f"{back}; {positions or 'any number of'} positions"
    if window is not None and window < SHORT_WINDOW:
        return (
            "warning",
            seen,
            "Prompts longer than the window are run one by one, whole and more slowly; a subject further back is not attended to.",
        )
    if positions is not None and positions < SHORT_WINDOW:
        return "warning", seen, "Long prompts with their prefix and target do not fit, and are refused by name."
    return "ok", seen, ""


def numbers(model: EditableModel) -> Finding:
    """Check the weights' dtype, float64 where updates are added, and that a forward pass gives the same bits twice."""
    weight = model.weight(trial_layers(model)[-1])
    if not weight.is_floating_point():
        return (
            "problem",
            f"edited weights are {weight.dtype}",
            "Load the model without quantisation, or with its edited layers in full precision.",
        )
    try:
        torch.zeros(1, dtype=torch.float64, device=weight.device)
    except (TypeError, RuntimeError):
        return "problem", f"{weight.device} has no float64, in which updates are added", "Load the model on the CPU for editing."
    again = [hidden_states(model, [TRIAL], model.n_layers - 1) for _ in range(2)]
    seen = f"{str(model.dtype).removeprefix('torch.')}, one step of rounding is {_rounding(model):.1g} of a weight"
    if not torch.equal(*again):
        return (
            "warning",
            f"{seen}; two forward passes differ by {_apart(*again):.1g}",
            "torch.use_deterministic_algorithms(True), if runs shall repeat.",
        )
    if weight.dtype in (torch.bfloat16, torch.float16):
        return (
            "warning",
            seen,
            "Updates are rounded to it, small ones partly vanish; load with dtype=torch.float32 where that fits (estimate_memory).",
        )
    return "ok", f"{seen}; sums and solves in float64; a forward pass repeats bit for bit", ""


def placement(model: EditableModel) -> Finding:
    """Check that the edited weights are in memory, and name the devices."""
    offloaded = {name for name, p in model.hf.named_parameters() if p.device.type == "meta"}
    edited = {model.weight_name(layer) for layer in trial_layers(model)}
    devices = sorted({str(p.device) for p in model.hf.parameters()})
    if edited & offloaded:
        return (
            "problem",
            f"{len(offloaded)} tensors are offloaded, {min(edited & offloaded)} among them",
            "Keep the edited layers in memory (device_map).",
        )
    if offloaded:
        return (
            "warning",
            f"{len(offloaded)} tensors are offloaded, none of the edited layers",
            "Every forward pass loads them again: slow, but exact.",
        )
    config = getattr(model.hf.config, "quantization_config", None)
    if config is not None:
        return "warning", f"weights were quantised ({type(config).__name__})", "Values and scores are those of the quantised model."
    return "ok", f"all on {', '.join(devices)}", ""


def shared_weights(model: EditableModel) -> Finding:
    """Check that no down projection is also another weight of the model."""
    places = [model.weight(layer).data_ptr() for layer in range(model.n_layers) if model.weight(layer).device.type != "meta"]
    if len(set(places)) < len(places):
        return "problem", "layers share their down projection", "Editing one layer edits the others too; this method is not made for it."
    others = {p.data_ptr() for name, p in model.hf.named_parameters() if not name.endswith(f"{model.architecture.down}.weight")}
    if others & set(places):
        return "problem", "a down projection is also another weight of the model", "Editing it changes that too."
    tied = model.hf.get_input_embeddings().weight is getattr(model.hf.get_output_embeddings(), "weight", None)
    return "ok", f"embedding and unembedding are {'one matrix' if tied else 'two'}, which editing leaves alone", ""


def after_mlp(model: EditableModel) -> Finding:
    """Measure how much of a change of the MLP's output arrives in the hidden state: all, unless a norm or a factor follows."""
    layer = trial_layers(model)[-1]
    prompt = locate_fact(model, TRIAL, with_target=False)
    clean = _leaving(model, layer, prompt.upto_subject, None)
    push = 0.1 * clean.norm() * torch.nn.functional.normalize(torch.linspace(-1, 1, len(clean), dtype=clean.dtype), dim=0)
    moved = _leaving(model, layer, prompt.upto_subject, push) - clean
    share = float(moved @ push / (push @ push))
    if _apart(moved, push) <= max(0.02, 20 * _rounding(model)):
        return "ok", "a change of the MLP's output arrives in the hidden state as it is", ""
    return (
        "warning",
        f"of a change of the MLP's output {100 * share:.0f} % arrives in the hidden state: a norm or factor follows the MLP",
        "The update, which counts on all of it, under- or overshoots: give it more passes (passes=4), look at round.residuals().",
    )


def fast_replay(model: EditableModel) -> Finding:
    """Check whether the value optimisation may replay only what follows the subject."""
    values = compute_values(model, [TRIAL], BARE, _trial_method(model, v_num_grad_steps=2))
    if values.replay_mode == "whole":
        return (
            "warning",
            "the value optimisation must run whole prompts: replaying only what follows the subject does not give the model's own states",
            "Several times slower, and exact; attn_implementation='sdpa' or 'eager' may help.",
        )
    packed = packs_rows(model)
    seen = f"only the tokens from the subject on are run, {'end to end' if packed else 'padded'}; replays give the model's own states"
    return "ok", seen, "" if packed else "On a CPU, float32 weights and attn_implementation='sdpa' spare the padding."


def trial_edit(model: EditableModel) -> Finding:
    """Edit one fact, measure what it does, undo it, compare the bits."""
    if changed_layers(model):
        return "warning", "the model carries edits, so no trial was made", "Check the unedited model: session.rewind(to=0)."
    kept_originals, layers = set(model.originals.layers), trial_layers(model)
    before = digest_of(model, layers)
    copies = {layer: copy_of(model.weight(layer)) for layer in layers}
    try:
        session = EditSession(model, _trial_method(model), contexts=BARE, moments=_plain_moments(model), progress=False, value_cache=False)
        edit_round = session.edit(TRIAL)
        session.undo()
    finally:
        undone = digest_of(model, layers) == before
        if not undone:
            for layer, weight in copies.items():
                model.weight(layer).copy_(weight)
        model.originals.release([layer for layer in layers if layer not in kept_originals])
    if not undone:
        return "problem", "undo did not give the weights back (they were restored from a copy)", "Please report this model."
    table = edit_round.values.to_frame()
    first, last = table.probability_before[0], table.probability[0]
    left = edit_round.final_residuals[0] / float(edit_round.values.delta.norm())
    seen = (
        f"layers {layers[0]}–{layers[-1]}: p({TRIAL.target_new}) {first:.2g} → {last:.2g} in the optimisation; "
        f"{100 * left:.0f} % of the residual left after {len(edit_round.passes)} passes; undone bit for bit"
    )
    if last <= first:
        return "warning", seen, "The optimisation did not make the target likelier: calibrate v_lr and clamp (nse.calibrate)."
    if left > 0.5:
        return "warning", seen, "The update does not reach the value: more passes, other layers (nse.calibrate)."
    return "ok", seen, "Settings for this model: nse.calibrate(model, facts)."


def _trial_method(model: EditableModel, **settings: int) -> LocateThenEdit:
    layers = trial_layers(model)
    return nse(None, name="check", layers=layers, mom2_update_weight=1e-3, v_lr=_rate(model), **{"v_num_grad_steps": 12, **settings})


def _rate(model: EditableModel) -> float:
    """Return the learning rate whose steps have 8 % of the hidden state's length."""
    state = hidden_states(model, [TRIAL], trial_layers(model)[-1])
    return 0.08 * float(state.norm()) / model.d_model**0.5


def _plain_moments(model: EditableModel) -> SecondMoments:
    """Return made-up key statistics of the right size: a multiple of the identity, ‖k‖² of the trial's key."""
    sizes = {layer: float(collect_keys(model, [TRIAL], BARE, layer).matrix.norm() ** 2) for layer in trial_layers(model)}
    return SecondMoments({layer: torch.eye(model.d_ff) * max(size, 1e-12) for layer, size in sizes.items()}, 0, "made up for a trial")


def _leaving(model: EditableModel, layer: int, ids: tuple[int, ...], push: Tensor | None) -> Tensor:
    """Return what leaves a layer at the last token, (d_model,) on CPU, with something added to its MLP's output there."""
    seen: list[Tensor] = []

    def add(_: nn.Module, __: object, output: Tensor) -> Tensor:
        changed = output.clone()
        flat = changed.reshape(-1, changed.shape[-1])
        flat[-1] += 0 if push is None else push.to(flat)
        return flat.reshape(output.shape)

    def note(_: nn.Module, __: object, output: object) -> None:
        seen.append(hidden_of(output)[0, -1].float().cpu())

    with torch.no_grad(), model.running(), _hooked(model.down(layer), add), _hooked(model.layer(layer), note):
        model.hf.base_model(input_ids=torch.tensor([ids], device=model.device), use_cache=False)
    return seen[0]


@contextmanager
def _hooked(module: nn.Module, hook: object) -> Iterator[None]:
    handle = module.register_forward_hook(hook)  # type: ignore[arg-type]
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def _nll(model: EditableModel, ids: list[int], start: int) -> float:
    """Return the mean −log p of the tokens after the first two of a text, in nats."""
    with model.running():
        logp = model.hf(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0].float().log_softmax(-1)
    places = torch.arange(start + 1, len(ids) - 1, device=logp.device)
    return float(-logp[places, torch.tensor(ids, device=logp.device)[places + 1]].mean())


def _apart(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).norm() / other.double().norm().clamp(min=1e-30))


def _rounding(model: EditableModel) -> float:
    return max(torch.finfo(model.dtype).eps, 1e-4 * CLOSE) if model.dtype.is_floating_point else CLOSE
