"""Sessions of a small random model that are kept on disk: how they are made, compared bit for bit, and run in processes that are killed."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from helpers.models import CONTEXTS, build, moments_for, varied
from nse_tools import methods
from nse_tools.comparison.runner import compare
from nse_tools.data.fact import Fact
from nse_tools.data.fact_list import FactList
from nse_tools.editing.session import EditSession
from nse_tools.io.saved_session import holds_session
from nse_tools.methods.base import Method
from nse_tools.models.editable_model import EditableModel
from nse_tools.tracing.corpus import Corpus
from nse_tools.tracing.moments import second_moments

LAYERS = (0, 2)
METHOD = methods.nse(None, name="nse", layers=LAYERS, v_lr=0.3, v_num_grad_steps=3, mom2_update_weight=2.0, neuron_threshold=0.9)
ONE_LAYER = METHOD.with_(layers=(2,), passes=1, neuron_threshold=1.0)
METHODS = {
    "nse": METHOD,
    "per_fact": METHOD.with_(per="fact", alpha=0.1, upper_bound=1e6),
    "memit_seq": METHOD.with_(name="memit_seq", values_under="current", neuron_threshold=1.0, passes=1),
    "rect": METHOD.with_(name="rect", post_process=["keep_largest"]),
    "prune": METHOD.with_(
        name="prune", post_process=["compress_growth"], compress_base=3.0, mom2_update_weight=1e-6, v_lr=5.0, clamp_norm_factor=20.0
    ),
    "alphaedit": METHOD.with_(name="alphaedit", solver="null_space", ridge=1.0, nullspace_threshold=1.0, nullspace_unit="relative"),
    "rome": varied(ONE_LAYER, "rome", name="rome", use_previous_keys=False, values_under="current"),
    "ft": varied(ONE_LAYER, "ft", name="ft", ft_num_steps=3, ft_lr=1e-2),
    "ends": METHOD.with_(name="ends", spread="ends"),
    "replay": METHOD.with_(name="replay", spread="replay"),
    "anchored": METHOD.with_(name="anchored", norm_anchor=True, v_stop_at_argmax=1),
}
FAST = METHOD.with_(layers=(2,), v_num_grad_steps=1, passes=1, neuron_threshold=1.0)
TARGETS = ("Berlin", "Rome", "Paris", "piano", "French", "Italy", "Japan", "Brazil")


def many_facts(count: int) -> FactList:
    """Return facts of two targets each a subject."""
    subjects = ("Danielle Darrieux", "São Paulo", "Eiffel Tower", "東京", "the piano", "Denmark")
    made = [(s, t) for t in TARGETS for s in subjects]
    return FactList(Fact(f"f{i:02d}", *pair[:1], "I think that {} is", pair[1]) for i, pair in enumerate(made[:count]))


def fact(number: int, target: int = 0, **more: Any) -> Fact:
    """Return a fact about one of any number of subjects."""
    new = TARGETS[(number + target) % len(TARGETS)]
    return Fact(f"f{number}", f"Number {number} of Denmark", "I think that {} is", new, relation="is", **more)


def session_of(name: str = "llama", method: Method = METHOD, **options: Any) -> EditSession:
    model = build(name)
    return EditSession(
        model, method, contexts=CONTEXTS, moments=moments_for(model, method.layers), progress=False, value_cache=False, **options
    )


def load(path: Path, model: EditableModel, layers: tuple[int, ...] = LAYERS, **options: Any) -> EditSession:
    given = {"moments": moments_for(model, layers), "progress": False, "value_cache": False, **options}
    return EditSession.load(path, model, **given)


def weights_of(model: EditableModel) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.hf.state_dict().items()}


def same_weights(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def assert_same(one: Any, other: Any, where: str = "", ignoring: tuple[str, ...] = ("seconds",)) -> None:
    """Compare two records bit for bit, memory order of their tensors included; times may differ."""
    assert type(one) is type(other) or isinstance(one, int | float | Mapping), where
    if isinstance(one, Tensor):
        assert one.dtype == other.dtype, where
        assert torch.equal(one, other), where
        assert one.stride() == other.stride() or 1 in one.shape, where
    elif isinstance(one, pd.DataFrame):
        pd.testing.assert_frame_equal(one, other, check_exact=True)
    elif is_dataclass(one):
        for f in fields(one):
            if f.name not in ignoring:
                assert_same(getattr(one, f.name), getattr(other, f.name), f"{where}.{f.name}", ignoring)
    elif isinstance(one, Mapping):
        assert list(one) == list(other), where
        for key in one:
            assert_same(one[key], other[key], f"{where}[{key}]", ignoring)
    elif isinstance(one, tuple | list):
        assert len(one) == len(other), where
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{where}[{i}]", ignoring)
    else:
        assert one == other or (isinstance(one, float) and math.isnan(one) and math.isnan(other)), (where, one, other)


def take_statistics(cache: Path) -> None:
    """Compute the key statistics of random tokens, into a cache."""
    torch.set_num_threads(1)
    draw = torch.Generator().manual_seed(0)
    texts = tuple(tuple(torch.randint(5, 300, (60,), generator=draw).tolist()) for _ in range(800))
    second_moments(build(), LAYERS, Corpus(texts, "random tokens"), cache=cache, progress=False)


def compare_methods(folder: Path) -> None:
    """Compare two methods under two seeds, into a folder."""
    torch.set_num_threads(1)
    os.environ["NSE_TOOLS_CACHE"] = str(folder.parent / "cache")
    facts = FactList(replace(f, target_true="Denmark") for f in many_facts(4))
    methods = [METHODS[name] for name in ("nse", "memit_seq")]
    compare(build(), facts, methods, rounds_of=2, seeds=(0, 1), folder=folder, value_cache=False, progress=False)


def run_to_the_end(path: Path, facts: FactList, rounds_of: int) -> None:
    """Begin a session with autosave, or go on with it where it is, and edit what is missing: what a user's script does."""
    torch.set_num_threads(1)
    session = load(path, build(), autosave=True) if holds_session(path) else session_of(autosave=path)
    for batch in facts.rounds(of=rounds_of)[len(session) :]:
        session.edit(batch)


Start = Callable[..., BaseProcess]


def ended(child: BaseProcess) -> BaseProcess:
    child.join(timeout=600)
    assert child.exitcode is not None
    return child


def seconds_of(children: Start, function: Callable[..., Any], *args: Any) -> float:
    """Run a function in a process of its own, undisturbed; return how long that takes."""
    ended(children(int))  # the first child waits for the server to be there
    began = time.monotonic()
    assert ended(children(function, *args)).exitcode == 0
    return time.monotonic() - began


def run_and_kill(children: Start, after: float, function: Callable[..., Any], *args: Any) -> bool:
    """Run a function in a process that is killed after some seconds; return whether it was, rather than had come to its end."""
    child = children(function, *args)
    child.join(timeout=after)
    if killed := child.exitcode is None:
        os.kill(child.pid, signal.SIGKILL)
    assert ended(child).exitcode == (-signal.SIGKILL if killed else 0)
    return killed
