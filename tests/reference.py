"""The method's equations, obvious and slow: one fact at a time, whole sequences, float64, plain torch hooks.

Written from the equations; nothing of ``nse_tools`` is used. Facts are anything with ``subject``, ``prompt`` and ``target_new``.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

PLACES = {
    "gpt2": ("transformer.h", "mlp.c_proj"),
    "gptj": ("transformer.h", "mlp.fc_out"),
    "gpt_neox": ("gpt_neox.layers", "mlp.dense_4h_to_h"),
    "phi": ("model.layers", "mlp.fc2"),
}


class Reference:
    """A float64 copy of a model with its tokenizer."""

    def __init__(self, hf: nn.Module, tokenizer: Any) -> None:
        self.hf = copy.deepcopy(hf).double().eval()
        self.tokenizer = tokenizer
        self.layers_path, self.down_path = PLACES.get(hf.config.model_type, ("model.layers", "mlp.down_proj"))

    # ---- places ------------------------------------------------------------------------------------------------------
    def layer(self, index: int) -> nn.Module:
        return self.hf.get_submodule(f"{self.layers_path}.{index}")

    def down(self, index: int) -> nn.Module:
        return self.hf.get_submodule(f"{self.layers_path}.{index}.{self.down_path}")

    def weight(self, index: int) -> Tensor:
        """W_out as (d_model, d_ff): GPT-2 stores it the other way round."""
        weight = self.down(index).weight.data
        return weight.T if self.hf.config.model_type == "gpt2" else weight

    # ---- tokens ------------------------------------------------------------------------------------------------------
    def metaspace(self) -> bool:
        """Whether spaces are written as ▁ and one is put in front of every text."""
        return self.tokenizer.convert_tokens_to_ids("▁") not in (None, self.tokenizer.unk_token_id)

    def token_bytes(self, token: int) -> int:
        """Number of bytes of text that a token stands for."""
        if token in self.tokenizer.all_special_ids:
            return 0
        text = self.tokenizer.convert_ids_to_tokens(token)
        if text.startswith("<0x") and text.endswith(">"):
            return 1
        if self.metaspace():
            return len(text.replace("▁", " ").encode())
        return len(text)  # byte level: one letter a byte

    def token_at(self, ids: list[int], text: str, end: int) -> int:
        """Index of the token that holds the last byte of ``text[:end]``, by counting bytes from the left."""
        goal = len(text[:end].encode()) + (self.metaspace() and not text.startswith(" "))
        count = 0
        for place, token in enumerate(ids):
            count += self.token_bytes(token)
            if count >= goal:
                return place
        raise AssertionError(f"{text!r} has no byte {goal}")

    def locate(self, prompt: str, subject: str, prefix: str = "", target: str | None = None) -> tuple[list[int], int, int]:
        """Token ids, place of the subject's last token, place of the target's first token."""
        before, after = prompt.split("{}")
        for lead in ("", "\n"):
            head = lead + prefix + before + subject
            text = (head + after).rstrip()
            ids = self.tokenizer(text if target is None else f"{text} {target}")["input_ids"]
            place = self.token_at(ids, text, len(head))
            if place > 0:
                break
        start = len(ids) if target is None else self.token_at(ids, text, len(text)) + 1
        return ids, place, start

    # ---- running -----------------------------------------------------------------------------------------------------
    def run(
        self, ids: list[int], *, add: tuple[int, int, Tensor] | None = None, see: int | None = None, keys: tuple[int, ...] = ()
    ) -> tuple[Tensor, Tensor | None, dict[int, Tensor]]:
        """Whole forward of one prompt. ``add``: (layer, place, vector). Returns logits, h^see and keys, of all tokens."""
        seen: dict[str, Tensor] = {}
        found: dict[int, Tensor] = {}
        handles = []

        def add_hook(_: nn.Module, __: Any, output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            change = torch.zeros_like(hidden)
            change[0, add[1]] = 1.0
            hidden = hidden + change * add[2]
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        def see_hook(_: nn.Module, __: Any, output: Any) -> None:
            seen["h"] = (output[0] if isinstance(output, tuple) else output)[0].detach().clone()

        def key_hook(layer: int) -> Any:
            def hook(_: nn.Module, inputs: Any) -> None:
                found[layer] = inputs[0].reshape(len(ids), -1).detach().clone()

            return hook

        if add is not None:
            handles.append(self.layer(add[0]).register_forward_hook(add_hook))
        if see is not None:
            handles.append(self.layer(see).register_forward_hook(see_hook))
        handles += [self.down(layer).register_forward_pre_hook(key_hook(layer)) for layer in keys]
        try:
            logits = self.hf(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        finally:
            for handle in handles:
                handle.remove()
        return logits, seen.get("h"), found

    @torch.no_grad()
    def hidden(self, fact: Any, layer: int) -> Tensor:
        """h^l of the bare prompt at the subject's last token."""
        ids, place, _ = self.locate(fact.prompt, fact.subject)
        return self.run(ids, see=layer)[1][place]

    @torch.no_grad()
    def key(self, fact: Any, prefixes: tuple[str, ...], layer: int) -> Tensor:
        """½ k(bare) + ½ mean of k(prefixed)."""
        each = []
        for prefix in prefixes:
            ids, place, _ = self.locate(fact.prompt, fact.subject, prefix)
            each.append(self.run(ids, keys=(layer,))[2][layer][place])
        return each[0] if len(each) == 1 else 0.5 * each[0] + 0.5 * torch.stack(each[1:]).mean(0)

    @torch.no_grad()
    def moments(self, sequences: Any, layer: int) -> Tensor:
        """E[k kᵀ] over all tokens but each sequence's first."""
        total, count = torch.zeros(1, dtype=torch.float64), 0
        for sequence in sequences:
            keys = self.run(list(sequence), keys=(layer,))[2][layer]
            for key in keys[1:]:
                total = total + torch.outer(key, key)
                count += 1
        return total / count

    # ---- step 1 ------------------------------------------------------------------------------------------------------
    def loss_terms(
        self, fact: Any, prefixes: tuple[str, ...], layer: int, delta: Tensor, clean: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """NLL, KL and the essence prompt's log-probabilities."""
        nll = torch.zeros((), dtype=torch.float64)
        for prefix in prefixes:
            ids, place, start = self.locate(fact.prompt, fact.subject, prefix, fact.target_new)
            logp = self.run(ids, add=(layer, place, delta))[0].log_softmax(-1)
            target = [logp[i - 1, ids[i]] for i in range(start, len(ids))]
            nll = nll - sum(target) / len(target) / len(prefixes)
        ids, place, _ = self.locate("{} is a", fact.subject)
        logp = self.run(ids, add=(layer, place, delta))[0][place].log_softmax(-1)
        clean = logp.detach() if clean is None else clean
        return nll, (logp.exp() * (logp - clean)).sum(), clean

    def value(self, fact: Any, prefixes: tuple[str, ...], method: Any) -> dict[str, Any]:
        """δ by Adam: at most ``v_num_grad_steps`` evaluations of the loss, δ moves one time less."""
        layer = method.layers[-1]
        h0 = self.hidden(fact, layer)
        delta = torch.zeros_like(h0, requires_grad=True)
        adam = torch.optim.Adam([delta], lr=method.values.v_lr)
        clean, course, said = None, [], 0
        for step in range(method.values.v_num_grad_steps):
            adam.zero_grad()
            nll, kl, clean = self.loss_terms(fact, prefixes, layer, delta, clean)
            decay = method.values.v_weight_decay * delta.norm() / h0.norm() ** 2
            loss = nll + method.values.kl_factor * kl + decay
            course.append([float(x.detach()) for x in (nll, kl, decay, loss)])
            said = said + 1 if self.says(fact, prefixes, layer, delta) else 0
            enough = 0 < method.values.v_stop_at_argmax <= said
            if course[-1][-1] < method.values.v_loss_threshold or enough or step == method.values.v_num_grad_steps - 1:
                break
            loss.backward()
            adam.step()
            limit = method.values.clamp_norm_factor * h0.norm()
            with torch.no_grad():
                if delta.norm() > limit:
                    delta.mul_(limit / delta.norm())
        stop = "loss" if course[-1][-1] < method.values.v_loss_threshold else "argmax" if enough else "steps"
        return {"delta": delta.detach(), "h0": h0, "z": h0 + delta.detach(), "course": course, "stop": stop}

    @torch.no_grad()
    def says(self, fact: Any, prefixes: tuple[str, ...], layer: int, delta: Tensor) -> bool:
        """Whether every target token is the likeliest one in every context."""
        for prefix in prefixes:
            ids, place, start = self.locate(fact.prompt, fact.subject, prefix, fact.target_new)
            logits = self.run(ids, add=(layer, place, delta))[0]
            if any(int(logits[i - 1].argmax()) != ids[i] for i in range(start, len(ids))):
                return False
        return True

    @torch.no_grad()
    def usual_norm(self, fact: Any, prefixes: tuple[str, ...], layer: int) -> float:
        """Mean over contexts of ‖h^l‖ at the subject's last token."""
        norms = []
        for prefix in prefixes:
            ids, place, _ = self.locate(fact.prompt, fact.subject, prefix)
            norms.append(float(self.run(ids, see=layer)[1][place].norm()))
        return sum(norms) / len(norms)

    @torch.no_grad()
    def replayed(self, fact: Any, first: int, layer: int, z_first: Tensor) -> Tensor:
        """h^layer of the bare prompt at the subject's last token when h^first there is z_first."""
        ids, place, _ = self.locate(fact.prompt, fact.subject)
        return self.run(ids, add=(first, place, z_first - self.hidden(fact, first)), see=layer)[1][place]

    # ---- steps 2 to 4 ------------------------------------------------------------------------------------------------
    def round(
        self,
        facts: Any,
        prefixes: tuple[str, ...],
        z: Tensor,
        method: Any,
        moments: dict[int, Tensor],
        history: dict[int, Tensor],
        z_first: Tensor | None = None,
        originals: dict[int, Tensor] | None = None,
    ) -> dict[str, Any]:
        """One whole round; changes the weights. ``history`` maps a layer to H and is brought up to date.

        ``z_first``: targets at the first layer, where it has its own. ``originals``: W₀, where growth is held back or targets are replayed.
        """
        layers, last = method.layers, method.layers[-1]
        steps = {step.name: step for step in method.post_process}
        if method.schedule.spread == "ends":
            layers = (layers[0], last)
        own_z = {layers[0]: z_first, last: z}
        if method.schedule.spread == "replay":
            now = {layer: self.weight(layer).clone() for layer in layers}
            for layer in layers if method.values.values_under == "original" else ():
                self.weight(layer).copy_(originals[layer])
            for layer in layers[1:]:
                own_z[layer] = torch.stack([self.replayed(f, layers[0], layer, z_first[j]) for j, f in enumerate(facts)])
            for layer in layers:
                self.weight(layer).copy_(now[layer])
        statuses, chosen, residuals_seen, unit = [], [], [], None
        for _ in range(method.schedule.passes):
            norms = [float((z[j] - self.hidden(f, last)).norm()) for j, f in enumerate(facts)]
            if unit is None:
                unit = sum(norms) / len(norms) if method.schedule.band_unit == "relative" else 1.0
            taken = [j for j, norm in enumerate(norms) if method.schedule.alpha * unit < norm < method.schedule.upper_bound * unit]
            if not taken:
                break
            statuses.append(taken)
            for place, layer in enumerate(layers):
                residual = torch.stack([z[j] - self.hidden(facts[j], last) for j in range(len(facts))])
                residuals_seen.append(residual.norm(dim=1))
                share = residual[taken] / (len(layers) - place)
                if method.schedule.spread != "even":
                    share = torch.stack([own_z[layer][j] - self.hidden(facts[j], layer) for j in taken])
                keys = torch.stack([self.key(facts[j], prefixes, layer) for j in taken])
                scores = score(keys, method.neurons.neuron_score.name, moments[layer].double(), self.weight(layer))
                neurons = sorted(select(scores.sum(0), method.neurons.neuron_threshold, method.neurons.selection_rule.name))
                if method.neurons.per == "fact":
                    own = [select(s, method.neurons.neuron_threshold, method.neurons.selection_rule.name) for s in scores]
                    neurons = sorted(set().union(*own))
                    cut = [[float(v) if i in s else 0.0 for i, v in enumerate(k)] for k, s in zip(keys, own, strict=True)]
                    keys = torch.tensor(cut, dtype=torch.float64)
                chosen.append(neurons)
                old = history[layer] if method.solver.use_previous_keys and layer in history else torch.zeros_like(moments[layer]).double()
                change = solved(method, moments[layer].double(), old, keys, share, neurons)
                change = multiplied(method, change, moments[layer].double(), self.weight(layer), neurons)
                if "keep_largest" in steps:
                    change = largest_kept(change, self.weight(layer)[:, neurons], steps["keep_largest"].keep_share)
                self.weight(layer)[:, neurons] += change
        if "compress_growth" in steps:
            for layer in layers:
                base = steps["compress_growth"].compress_base
                self.weight(layer).copy_(compressed(self.weight(layer), originals[layer].double(), base))
        for layer in layers:
            keys = torch.stack([self.key(f, prefixes, layer) for f in facts])
            history[layer] = history.get(layer, torch.zeros(keys.shape[1], keys.shape[1]).double()) + keys.T @ keys
        final = torch.tensor([float((z[j] - self.hidden(f, last)).norm()) for j, f in enumerate(facts)])
        return {"taken": statuses, "neurons": chosen, "residuals": residuals_seen, "final": final}


def select(scores: Tensor, share: float, rule: str = "reach") -> set[int]:
    """The neurons with the largest scores that reach (or do not exceed) a share of the total."""
    values = [float(s) for s in scores]
    if share == 1:
        return set(range(len(values)))
    order = sorted(range(len(values)), key=lambda i: -values[i])
    total, running, chosen = sum(values), 0.0, []
    for neuron in order:
        if rule == "not_exceed" and running + values[neuron] > share * total:
            break
        chosen.append(neuron)
        running += values[neuron]
        if rule == "reach" and running >= share * total:
            break
    return set(chosen) or {order[0]}


def update(preserved: Tensor, keys: Tensor, residuals: Tensor, neurons: list[int]) -> Tensor:
    """ΔW[:, I] = R ((B + K Kᵀ)_I⁻¹ K_I)ᵀ by one dense solve; rows of ``keys`` and ``residuals`` are facts."""
    a = (preserved + keys.T @ keys)[neurons][:, neurons]
    return residuals.double().T @ torch.linalg.solve(a, keys[:, neurons].T).T


def score(keys: Tensor, kind: str, moments: Tensor, weight: Tensor) -> Tensor:
    """Scores of all neurons, a row a fact, entry by entry."""
    rows = keys.abs().tolist()
    for row in rows:
        for i, k in enumerate(row):
            if kind == "key_by_moment":
                row[i] = k * k / float(moments[i, i])
            elif kind == "key_by_column":
                row[i] = k * sum(float(w) ** 2 for w in weight[:, i]) ** 0.5
    return torch.tensor(rows, dtype=torch.float64)


def projector(moments: Tensor, threshold: float, unit: str) -> Tensor:
    """P, as AlphaEdit releases it: by an SVD of C, singular vectors of small singular values."""
    u, s, _ = torch.linalg.svd(moments)
    small = u[:, s < threshold * (float(s.mean()) if unit == "relative" else 1)]
    return small @ small.T


def solved(method: Any, moments: Tensor, old: Tensor, keys: Tensor, residuals: Tensor, neurons: list[int]) -> Tensor:
    """ΔW[:, I] by one dense solve, whichever solver: for the null space the equation as it is released, not symmetric."""
    on = torch.eye(len(moments), dtype=torch.float64)[neurons]
    identity = torch.eye(len(neurons), dtype=torch.float64)
    if method.solver.name == "least_squares":
        preserved = method.solver.mom2_update_weight * moments + old + method.solver.ridge * torch.eye(len(moments), dtype=torch.float64)
        return update(preserved, keys, residuals, neurons)
    p = projector(on @ moments @ on.T, method.solver.nullspace_threshold, method.solver.nullspace_unit)
    k = keys[:, neurons].T
    return (torch.linalg.inv(p @ (k @ k.T + on @ old @ on.T) + method.solver.ridge * identity) @ p @ k @ residuals.double()).T


def multiplied(method: Any, change: Tensor, moments: Tensor, weight: Tensor, neurons: list[int]) -> Tensor:
    """ΔW[:, I] times the multiplier, a dense matrix."""
    steps = {step.name: step for step in method.post_process}
    if step := steps.get("project_on_null_space"):
        return change @ projector(moments[neurons][:, neurons], step.nullspace_threshold, step.nullspace_unit)
    if step := steps.get("damp_top_directions"):
        rows = torch.stack([row / row.norm() for row in weight[:, neurons]])
        values, vectors = torch.linalg.eigh(rows.T @ rows / len(rows))
        total, running, top = float(values.sum()), 0.0, []
        for value, vector in sorted(zip(values.tolist(), vectors.T, strict=True), key=lambda pair: -pair[0]):
            top.append(vector)
            running += value
            if running > step.top_share * total:
                break
        u = torch.stack(top).T
        return change @ (torch.eye(len(neurons), dtype=torch.float64) - step.top_damping * u @ u.T)
    return change


def largest_kept(change: Tensor, weight: Tensor, share: float) -> Tensor:
    """Only the share of the entries with the largest |ΔW/W|; the others 0."""
    places = [(i, j) for i in range(change.shape[0]) for j in range(change.shape[1])]
    places.sort(key=lambda ij: -abs(float(change[ij]) / float(weight[ij])))
    kept = torch.zeros_like(change)
    for ij in places[: math.ceil(share * len(places) - 1e-9)]:
        kept[ij] = change[ij]
    return kept


def compressed(weight: Tensor, original: Tensor, base: float) -> Tensor:
    """W₀ + U diag(f(s)) Vᵀ of W − W₀, f(s) = log_b(s) − log_b(σ) + σ above σ = σ_max(W₀)."""
    u, s, v = torch.linalg.svd(weight - original, full_matrices=False)
    limit = float(torch.linalg.svdvals(original)[0])
    held = [math.log(x, base) - math.log(limit, base) + limit if x > limit else x for x in s.tolist()]
    return original + u @ torch.diag(torch.tensor(held, dtype=torch.float64)) @ v


def apart(found: Tensor, expected: Tensor) -> float:
    """Relative distance ‖found − expected‖ / ‖expected‖."""
    found, expected = found.detach().double(), expected.detach().double()
    assert found.shape == expected.shape
    return float((found - expected).norm() / expected.norm().clamp(min=1e-300))
