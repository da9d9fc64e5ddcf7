"""Same seed, same machine: the same bits, in this process and in another."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.models import FACTS, build
from helpers.sessions import METHOD
from nse_tools.editing.session import EditSession
from nse_tools.methods.base import Method
from nse_tools.models.weights import digest_of

RUN = METHOD.with_(layers=(1, 2), neuron_threshold=0.8)
PROGRAM = """
import json, sys
sys.path.insert(0, {tests!r})
from test_reproducible import run
print(json.dumps(run({seed}, {cache!r})))
"""


def run(seed: int, cache: str, method: Method = RUN) -> dict[str, object]:
    """Sample contexts, compute C, search values, edit two rounds, score: everything from the seed."""
    os.environ["NSE_TOOLS_CACHE"] = cache
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(int.from_bytes(os.urandom(4), "big"))  # nothing may depend on the global generator
    model = build("llama", "bos")
    torch.manual_seed(int.from_bytes(os.urandom(4), "big"))
    session = EditSession(model, method, seed=seed, progress=False, value_cache=False)
    for batch in FACTS.rounds(of=3):
        session.edit(batch)
    return {
        "contexts": list(session.contexts.prefixes),
        "moments": [float(session.moments[layer].double().sum()).hex() for layer in method.layers],
        "digests": [r.digest for r in session.rounds],
        "values": [float(r.values.z.double().sum()).hex() for r in session.rounds],
        "live": digest_of(model, method.layers),
        "residuals": [float(x).hex() for x in session.residuals().residual],
        "scores": [float(x).hex() for x in session.scores(with_perplexity=False).fillna(-1).to_numpy(dtype=float).ravel()],
    }


@pytest.fixture
def first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    monkeypatch.setenv("NSE_TOOLS_CACHE", "")
    return run(3, str(tmp_path / "first"))


def test_the_same_seed_gives_the_same_bits_here_and_in_another_process(first: dict[str, object], tmp_path: Path) -> None:
    assert run(3, str(tmp_path / "second")) == first
    program = PROGRAM.format(tests=str(Path(__file__).parent), seed=3, cache=str(tmp_path / "third"))
    path = os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parents[2])])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "77"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    assert json.loads(done.stdout.splitlines()[-1]) == first


def test_another_seed_gives_other_bits(first: dict[str, object], tmp_path: Path) -> None:
    other = run(4, str(tmp_path / "other"))
    assert other["contexts"] != first["contexts"]
    assert other["moments"] != first["moments"]
    assert other["live"] != first["live"]
