"""Jobs for the tests on a cluster; a module of its own, which workers can import."""

from __future__ import annotations

import os
import time
from pathlib import Path

from nse_tools.errors import FactError
from nse_tools.models.editable_model import EditableModel


def noted(model: EditableModel, folder: str, item: tuple[int, float]) -> int:
    """Leave a file a start, take some time, return something."""
    number, seconds = item
    with (Path(folder) / f"{number}").open("a") as file:
        file.write(f"{os.getpid()}\n")
    time.sleep(seconds)
    return number * number


def heavy(model: EditableModel, n_bytes: int, number: int) -> bytes:
    """Return a large result."""
    return bytes([number % 256]) * n_bytes


def places(model: EditableModel, shared: None, item: int) -> dict[str, str]:
    """Say in which file's memory some weights are: "" is this process's own."""
    regions = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    spans = [(*(int(x, 16) for x in region[0].split("-")), " ".join(region[5:])) for region in regions]
    asked = {"embedding": model.hf.get_input_embeddings().weight, "edited": model.weight(0), "other": model.weight(1)}
    return {name: next(file for a, b, file in spans if a <= tensor.data_ptr() < b) for name, tensor in asked.items()}


def refuse(model: EditableModel, shared: None, item: int) -> None:
    """Fail as this library fails."""
    raise FactError(f"fact {item} has no target")


def crash(model: EditableModel, shared: None, item: int) -> None:
    """Fail otherwise."""
    raise ZeroDivisionError("a bug")
