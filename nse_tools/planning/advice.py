"""Which settings a plan advises, each with its reason in one sentence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from nse_tools.planning import memory
from nse_tools.planning.memory import Part, all_parts, needed
from nse_tools.planning.shape import Shape
from nse_tools.planning.workload import Workload
from nse_tools.steps.preserved import LOW_RANK


@dataclass(frozen=True, slots=True)
class Limits:
    """Bytes of memory of the device and of the host; None where it is not known."""

    device: float | None = None
    host: float | None = None

    def hold(self, on_device: float, on_host: float) -> bool | None:
        """Say whether so many bytes fit; None without limits. Without a device's own memory, all is on the host."""
        if self.device is None and self.host is None:
            return None
        if self.device is None:
            return on_device + on_host <= self.host  # type: ignore[operator]
        return on_device <= self.device and (self.host is None or on_host <= self.host)

    def room(self, taken_on_device: float, taken_on_host: float) -> float | None:
        """Return the bytes left where the model is; None without a limit."""
        if self.device is not None:
            return self.device - taken_on_device
        return None if self.host is None else self.host - taken_on_device - taken_on_host


@dataclass(frozen=True, slots=True)
class Advice:
    """A setting, the value to give it, and why."""

    setting: str
    value: str
    why: str


def advise(shape: Shape, work: Workload, rounds: int, dtype: torch.dtype, limits: Limits, held: Mapping[str, bool]) -> Iterator[Advice]:
    """Yield the settings to use."""
    yield _dtype(shape, dtype, limits)
    yield _facts_at_once(shape, work, rounds, dtype, limits, held)
    yield Advice(
        "n_tokens of the key statistics",
        f"{10 * shape.d_ff:,}",
        "Ten tokens a neuron make C well-conditioned and suffice for efficacy; specificity gains a little from more.",
    )
    yield _layers_at_once(shape, work, dtype, limits)
    yield _old_keys(shape, work, rounds, held)


def _gb(count: float) -> str:
    return f"{count / 1e9:.3g} GB"


def _dtype(shape: Shape, dtype: torch.dtype, limits: Limits) -> Advice:
    names = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
    room = limits.room(0.0, 0.0)
    if room is None:
        chosen = str(dtype).removeprefix("torch.")
        return Advice(
            "dtype", chosen, f"The weights take {_gb(shape.parameters * dtype.itemsize)} so, {_gb(4 * shape.parameters)} in float32."
        )
    for candidate, name in names.items():
        taken = shape.parameters * candidate.itemsize
        if taken <= 0.8 * room:
            loss = (
                "and no update is lost to rounding"
                if candidate == torch.float32
                else "and updates are rounded to eight bits; float32 has no room"
            )
            return Advice("dtype", name, f"The weights take {_gb(taken)} of {_gb(room)}, {loss}.")
    edited = shape.layer_weights * 2
    return Advice(
        "device_map",
        "auto",
        f"Even in bfloat16 the weights take {_gb(2 * shape.parameters)} of {_gb(room)}: spread them over devices, or offload layers that "
        f"are not edited ({_gb(edited)} each); edited layers must stay in memory.",
    )


def _facts_at_once(shape: Shape, work: Workload, rounds: int, dtype: torch.dtype, limits: Limits, held: Mapping[str, bool]) -> Advice:
    """Find the largest part of a round whose value search fits, by halves."""
    parts = all_parts(shape, work, rounds, dtype.itemsize, **held)
    own = _search(parts)
    everything = limits.room(needed(parts, "values", "device"), needed(parts, "values", "host"))
    name = "facts in one compute_values"
    if everything is None or everything >= 0:
        return Advice(name, str(work.facts), f"The search for a whole round's values takes {_gb(own)} beside the weights.")
    facts = work.facts
    while facts > 1:
        facts //= 2
        less = memory.values(shape, work.scaled(facts, work.edited, int(work.steps), work.passes), dtype.itemsize)
        if everything + own - _search(less) >= 0:
            return Advice(name, str(facts), f"A whole round's search takes {_gb(own)}; in parts of {facts} it fits (TargetValues.join).")
    return Advice(name, "1", "Not even one fact's search fits beside the weights: a smaller dtype, or device_map, comes first.")


def _search(parts: Sequence[Part]) -> float:
    return needed([p for p in parts if p.step == "values"], "values")


def _layers_at_once(shape: Shape, work: Workload, dtype: torch.dtype, limits: Limits) -> Advice:
    """Say of how many layers C can be summed in one pass over the text."""
    name = "layers in one second_moments"
    a_layer = 8 * shape.d_ff**2

    def short(layers: int) -> bool:
        some = replace(work, edited=work.edited[-layers:])
        parts = [*memory.weights(shape, work, dtype.itemsize), *memory.statistics(shape, some, dtype.itemsize)]
        return limits.hold(needed(parts, "statistics", "device"), needed(parts, "statistics", "host")) is False

    for layers in range(len(work.edited), 0, -1):
        if not short(layers):
            whole = layers == len(work.edited)
            why = f"Each layer's sum takes {_gb(a_layer)} of the host's memory in float64" + (
                "." if whole else "; more do not fit at once."
            )
            return Advice(name, str(layers), why)
    return Advice(
        name, "1", f"Even one layer does not fit: its sum takes {_gb(a_layer)} on the host, a batch of text its forward on the device."
    )


def _old_keys(shape: Shape, work: Workload, rounds: int, held: Mapping[str, bool]) -> Advice:
    """Say what many old keys cost."""
    name = "facts before old keys cost more"
    if not held["history"]:
        return Advice(name, "any", "The method keeps no old keys.")
    if not held["share_factor"]:
        return Advice(
            name, "0", "With a share of the neurons every round sums old keys and factors anew; p = 1 spares it while keys are few."
        )
    threshold = -(-shape.d_ff // LOW_RANK)
    reached = work.facts * (rounds - 1) >= threshold
    more = _gb(len(work.edited) * 8 * shape.d_ff**2)
    why = f"From then on H is summed ({more} in float64) and every round factors anew" + (
        "; the plan's last round is beyond." if reached else "; the plan's rounds stay below."
    )
    return Advice(name, f"{threshold:,}", why)
