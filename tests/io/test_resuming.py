"""What takes long besides sessions goes on where it was killed: passes for key statistics, and comparisons."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch

from helpers.kept import LAYERS, Start, compare_methods, run_and_kill, seconds_of, take_statistics
from nse_tools.comparison.result import load_comparison
from nse_tools.tracing import moments
from nse_tools.tracing.moments import _read as read_moments


def kill_and_resume(children: Start, kills: int, draw: random.Random, function: Callable[[Path], None], whole: Path, killed: Path) -> int:
    """Run once undisturbed into one folder, then killed and resumed into another until it is done; return how often it was killed."""
    took, happened = seconds_of(children, function, whole), 0
    while run_and_kill(children, draw.uniform(0.2, 0.7) * took if happened < kills else 600, function, killed):
        happened += 1
    return happened


def test_a_pass_for_key_statistics_that_is_killed_comes_to_the_same_bits(children: Start, tmp_path: Path) -> None:
    happened = kill_and_resume(children, 4, random.Random(0), take_statistics, tmp_path / "whole", tmp_path / "killed")
    assert happened >= 1  # how often depends on how far each run had come
    one, other = (read_moments(next((tmp_path / name).glob("*.safetensors"))) for name in ("whole", "killed"))
    assert one is not None
    assert other is not None
    assert all(torch.equal(one[layer], other[layer]) for layer in LAYERS)
    assert not list((tmp_path / "killed").glob("*.part"))


DAMAGES = {
    "none": lambda data: data,
    "empty": lambda data: b"",
    "cut in half": lambda data: data[: len(data) // 2],
    "zeros": lambda data: b"\0" * len(data),
}


@pytest.mark.parametrize("damage", ["none", "cut in half", *(pytest.param(d, marks=pytest.mark.long) for d in ("empty", "zeros"))])
def test_a_checkpoint_of_key_statistics_is_gone_on_from_or_not_used(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    take_statistics(tmp_path / "whole")
    real, saved = moments._save, []

    def dies(tensors: dict, file: Path, about: dict) -> None:
        real(tensors, file, about)
        saved.append(file)
        raise KeyboardInterrupt

    monkeypatch.setattr(moments, "_save", dies)
    with pytest.raises(KeyboardInterrupt):
        take_statistics(tmp_path / "cut")
    monkeypatch.setattr(moments, "_save", real)
    assert [file.suffix for file in saved] == [".part"]
    saved[0].write_bytes(DAMAGES[damage](saved[0].read_bytes()))
    batches, keys_of = [], moments._keys
    monkeypatch.setattr(moments, "_keys", lambda *args: batches.append(1) or keys_of(*args))
    take_statistics(tmp_path / "cut")
    resumed = len(batches)
    take_statistics(tmp_path / "again")
    one, other = (read_moments(next((tmp_path / name).glob("*.safetensors"))) for name in ("whole", "cut"))
    assert one is not None
    assert other is not None
    assert all(torch.equal(one[layer], other[layer]) for layer in LAYERS)
    assert (resumed < len(batches) - resumed) == (damage == "none")


def test_a_comparison_that_is_killed_comes_to_the_same_tables(children: Start, tmp_path: Path) -> None:
    whole, killed = tmp_path / "one" / "whole", tmp_path / "other" / "killed"
    happened = kill_and_resume(children, 4, random.Random(1), compare_methods, whole, killed)
    assert happened >= 1  # how often depends on how far each run had come
    one, other = load_comparison(whole), load_comparison(killed)
    # what is already known of the unedited model decides which prompts are scored together, and so how the last digit is rounded
    pd.testing.assert_frame_equal(one.scores, other.scores, check_exact=False, rtol=0, atol=2e-4)
    columns = ["method", "seed", "round", "facts", "passes", "not_edited", "residual_after", "norm_update"]
    pd.testing.assert_frame_equal(one.rounds[columns], other.rounds[columns], check_exact=True)
