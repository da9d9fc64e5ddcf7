"""``plan``: what a sequence of edits takes, before there are any weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import torch
from transformers import PretrainedConfig, PreTrainedModel

from nse_tools import methods
from nse_tools._repr import table_html
from nse_tools.data.fact import Fact
from nse_tools.editing.calibration import propose_layers
from nse_tools.errors import ModelError, SettingError
from nse_tools.methods.base import Method
from nse_tools.models.editable_model import EditableModel
from nse_tools.planning import operations
from nse_tools.planning.advice import Advice, Limits, advise
from nse_tools.planning.memory import STEPS, Part, all_parts, needed
from nse_tools.planning.shape import Shape, config_of
from nse_tools.planning.workload import Tokens, Workload, count_tokens, typical_tokens
from nse_tools.tracing.contexts import Contexts

GB = 1e9


@dataclass(frozen=True)
class Plan:
    """Bytes and operations of a sequence of rounds, and settings that fit.

    Parameters
    ----------
    model : str
        The model's name.
    shape : Shape
        Its sizes.
    method : Method
        The method.
    work : Workload
        A round's tokens.
    rounds : int
        Rounds.
    dtype : torch.dtype
        The weights' dtype.
    limits : Limits
        Bytes of the device's and the host's memory, where they were given.
    parts : tuple of Part
        What takes how many bytes, where.
    operations : dict of str to float
        Part of the work → operations: of the key statistics once, of everything else in a round.
    advice : tuple of Advice
        Which settings to use, and why.
    """

    model: str
    shape: Shape
    method: Method
    work: Workload = field(repr=False)
    rounds: int
    dtype: torch.dtype
    limits: Limits
    parts: tuple[Part, ...] = field(repr=False)
    operations: dict[str, float] = field(repr=False)
    advice: tuple[Advice, ...] = field(repr=False)

    def steps(self) -> pd.DataFrame:
        """Return one row a step: GB (10⁹ bytes) on the device and on the host, 10¹² operations, and whether it fits (None: no limit)."""
        rows = []
        for step in STEPS:
            done = sum(self.operations[name] for name in OPERATIONS_OF[step])
            on_device, on_host = (needed(self.parts, step, where) for where in ("device", "host"))
            rows.append((step, on_device / GB, on_host / GB, done / 1e12, self.limits.hold(on_device, on_host)))
        rows.append(("scoring", math.nan, math.nan, self.operations["scoring"] / 1e12, None))
        return pd.DataFrame(rows, columns=["step", "device_gb", "host_gb", "tera_operations", "fits"])

    @property
    def fits(self) -> bool | None:
        """Whether every step fits; None where no limit was given."""
        found = [fits for fits in self.steps()["fits"] if fits is not None]
        return all(found) if found else None

    def to_frame(self) -> pd.DataFrame:
        """Return one row a part: step, what, where, GB (10⁹ bytes), whether it is held for the session."""
        rows = [(p.step, p.what, p.where, p.bytes / GB, p.held) for p in self.parts if p.bytes]
        return pd.DataFrame(rows, columns=["step", "what", "where", "gb", "held"])

    def settings(self) -> pd.DataFrame:
        """Return one row a setting: its value, and why."""
        return pd.DataFrame([(a.setting, a.value, a.why) for a in self.advice], columns=["setting", "value", "why"])

    def seconds(self, tflops: float, tflops64: float) -> dict[str, float]:
        """Return each part's seconds at given rates, 10¹² operations a second: the model's products, and those in float64."""
        return operations.at_rates(self.operations, tflops, tflops64)

    def __repr__(self) -> str:
        fits = {None: "", True: ", fits", False: ", does not fit"}[self.fits]
        device, host = (max(needed(self.parts, step, where) for step in STEPS) / GB for where in ("device", "host"))
        return (
            f"Plan({self.model!r}, {self.rounds} rounds of {self.work.facts} facts, {str(self.dtype).removeprefix('torch.')}: "
            f"{device:.3g} GB on the device, {host:.3g} GB on the host{fits})"
        )

    def _repr_html_(self) -> str:
        return table_html(self.steps(), head=self, digits=3) + table_html(self.settings())


OPERATIONS_OF = {
    "load": (),
    "statistics": ("sampling", "statistics"),
    "values": ("values",),
    "update": ("states", "keys", "solve", "apply"),
}
"""Step → the parts of the work that it makes."""


def plan(
    model: EditableModel | PreTrainedModel | PretrainedConfig | Mapping[str, object] | str | Path,
    facts: int | Sequence[Fact] = 100,
    rounds: int = 1,
    *,
    method: Method | None = None,
    contexts: int | Contexts = 6,
    dtype: torch.dtype | None = None,
    device_memory: float | None = None,
    host_memory: float | None = None,
) -> Plan:
    """Say what a sequence of rounds takes in bytes and operations, what fits, and which settings to use; no weights are needed.

    Parameters
    ----------
    model : str, Path, EditableModel, PreTrainedModel, PretrainedConfig or mapping
        A name that comes with the package (``nse_tools.planning.known_configs()``), a folder with config.json, a hub id, a
        configuration or its fields, or a model.
    facts : int or sequence of Fact
        Facts of a round; given ones are counted token by token where the model is an :class:`EditableModel`, else rows of
        typical length are taken.
    rounds : int
        Rounds.
    method : Method, optional
        By default NSE with the preset made for a model of this shape, or with layers at the usual depth.
    contexts : int or Contexts
        The contexts, or their number.
    dtype : torch.dtype, optional
        The weights' dtype; by default the configuration's.
    device_memory, host_memory : float, optional
        Memory in GB (10⁹ bytes) of the device that holds the model, and of the host; a model on the CPU has no device memory of
        its own: give ``host_memory`` only.

    Returns
    -------
    Plan
        The parts, the steps, and the settings to use.

    Raises
    ------
    ModelError
        If there is no configuration to be had, or the model cannot be edited.
    SettingError
        If a number is out of range, or the method solves in another way than NSE and MEMIT.
    """
    name, config = config_of(model)
    shape = Shape.of(config)
    method = method or method_for(shape, name)
    n_facts = facts if isinstance(facts, int) else len(facts)
    _check(shape, method, n_facts, rounds, device_memory, host_memory)
    precision = dtype or _dtype_of(model, config)
    work = _work(model, method, facts, contexts)
    held = {"share_factor": method.setting("neuron_threshold") == 1, "history": method.setting("use_previous_keys")}
    limits = Limits(*(None if given is None else given * GB for given in (device_memory, host_memory)))
    parts = all_parts(shape, work, rounds, precision.itemsize, **held)
    return Plan(
        name,
        shape,
        method,
        work,
        rounds,
        precision,
        limits,
        tuple(parts),
        _operations(shape, work),
        tuple(advise(shape, work, rounds, precision, limits, held)),
    )


def method_for(shape: Shape, name: str) -> Method:
    """Return NSE with the preset for a model of a shape; without one, with a sixth of the layers at a quarter of the depth."""
    sizes = {"n_layers": shape.n_layers, "d_model": shape.d_model, "d_ff": shape.d_ff}
    fitting = [preset for preset, tables in methods.presets().items() if tables["model"] == sizes]
    if fitting:
        return methods.nse(preset=name if name in fitting else fitting[0])
    return methods.nse(preset=None, layers=propose_layers(None, torch.ones(shape.n_layers)))


def _work(model: object, method: Method, facts: int | Sequence[Fact], contexts: int | Contexts) -> Workload:
    if isinstance(model, EditableModel) and not isinstance(facts, int) and isinstance(contexts, Contexts):
        return count_tokens(model, method, facts, contexts)
    counts = [given if isinstance(given, int) else len(given) for given in (facts, contexts)]
    return typical_tokens(method, *counts)


def _operations(shape: Shape, work: Workload) -> dict[str, float]:
    n_tokens = 10 * shape.d_ff
    texts = Tokens.of([128]) * (n_tokens / 128)
    return {
        "sampling": operations.forward(shape, texts),
        "statistics": operations.key_statistics(shape, work.edited, texts),
        **operations.parts(shape, work),
    }


def _dtype_of(model: object, config: PretrainedConfig) -> torch.dtype:
    if isinstance(model, EditableModel):
        return model.dtype
    said = getattr(config.get_text_config(), "dtype", None)
    return said if isinstance(said, torch.dtype) else getattr(torch, str(said), torch.float32)


def _check(shape: Shape, method: Method, facts: int, rounds: int, *memory: float | None) -> None:
    for name, value in (("facts", facts), ("rounds", rounds)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise SettingError(f"{name}={value!r}: expected a whole number of at least 1.")
    for name, given in zip(("device_memory", "host_memory"), memory, strict=True):
        if given is not None and not (isinstance(given, int | float) and given > 0):
            raise SettingError(f"{name}={given!r}: expected a number of GB above 0.")
    if method.settings().get("solver") != "least_squares":
        raise SettingError(f"solver={method.settings().get('solver')!r}: expected least_squares.")
    if method.last_layer >= shape.n_layers:
        raise ModelError(f"The method edits layer {method.last_layer}; the model has layers 0 to {shape.n_layers - 1}.")
