"""Peak resident memory of the steps of a round, each in a process of its own: what a plan is compared with."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

MB = 2**20
ROOT = Path(__file__).parents[2]

CONTEXTS_OF = ("The", "Therefore", "Because", "I", "You")
SUBJECTS = ("Danielle Darrieux", "São Paulo", "Eiffel Tower", "東京", "the piano", "Denmark")
TARGETS = ("Berlin", "Rome", "Paris", "piano", "French", "Italy", "Japan", "Brazil")


def config_of(sizes: dict[str, int]) -> Any:
    """Return the configuration of a random Llama of given sizes."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=sizes.get("vocab", 400),
        hidden_size=sizes["d_model"],
        intermediate_size=sizes["d_ff"],
        num_hidden_layers=sizes["layers"],
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=0,
    )


def model_of(sizes: dict[str, int]) -> Any:
    """Build and wrap it, or load the embedded model where no sizes but the number of facts are given."""
    from transformers import AutoModelForCausalLM

    from helpers.models import tokenizer
    from nse_tools.models.editable_model import EditableModel
    from nse_tools.models.loading import load_model

    if "d_model" not in sizes:
        return load_model(progress=False)
    torch.manual_seed(0)
    return EditableModel(AutoModelForCausalLM.from_config(config_of(sizes)).float().eval(), tokenizer(), name="wide")


def inputs_of(sizes: dict[str, int]) -> tuple[Any, Any, Any]:
    """Return facts, contexts and method."""
    from nse_tools import methods
    from nse_tools.data.fact import Fact
    from nse_tools.data.fact_list import FactList
    from nse_tools.tracing.contexts import Contexts

    facts = [Fact(f"f{i}", f"{SUBJECTS[i % 6]} {i}", "I think that {} is in the city of", TARGETS[i % 8]) for i in range(sizes["facts"])]
    contexts = Contexts(("", *(f"{word} is in the city of Paris and I am. " for word in CONTEXTS_OF)))
    if "d_model" not in sizes:
        return FactList(facts), contexts, methods.nse(v_num_grad_steps=3)
    method = methods.nse(None, layers=tuple(range(sizes["edited"])), v_num_grad_steps=3, mom2_update_weight=100.0)
    return FactList(facts), contexts, method


def measured(sizes: dict[str, int]) -> dict[str, float]:
    """Run the steps in a new process; return the megabytes that each takes at most, beside what there is before it."""
    # large blocks go back to the system when they are freed, so that resident memory is what is in use
    variables = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    command = [sys.executable, __file__, json.dumps(sizes)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, **variables, "PYTHONPATH": path})
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 / MB for line in lines if line.startswith(f"{name}:"))


def _peak(work: Callable[[], Any]) -> tuple[Any, float]:
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak counts from here on
    before = _status("VmRSS")
    result = work()
    return result, _status("VmHWM") - before


def steps(sizes: dict[str, int]) -> dict[str, float]:
    """Make every step once on a tiny model, so that libraries have what they keep; then on the wide one, measured."""
    torch.set_num_threads(1)
    _all_steps({"d_model": 32, "d_ff": 48, "layers": 3, "facts": 2, "edited": 2})
    return _all_steps(sizes)


def _all_steps(sizes: dict[str, int]) -> dict[str, float]:
    from nse_tools.editing.session import EditSession
    from nse_tools.steps.values import compute_values
    from nse_tools.tracing.corpus import Corpus
    from nse_tools.tracing.moments import second_moments

    facts, contexts, method = inputs_of(sizes)
    draw = torch.Generator().manual_seed(0)
    texts = tuple(tuple(torch.randint(5, 300, (128,), generator=draw).tolist()) for _ in range(64))
    model, load = _peak(lambda: model_of(sizes))
    with tempfile.TemporaryDirectory() as folder:
        statistics, first = _peak(lambda: second_moments(model, method.layers, Corpus(texts, "random"), cache=Path(folder), progress=False))
    values, second = _peak(lambda: compute_values(model, facts, contexts, method))
    session = EditSession(model, method, contexts=contexts, moments=statistics, progress=False, value_cache=False)
    _, third = _peak(lambda: session.edit(facts, values))
    rounds = {"load": load, "statistics": first, "values": second, "update": third}
    if 12 * len(facts) >= model.d_ff:  # the next round's old keys are many
        _, rounds["update after many"] = _peak(lambda: session.edit(facts, values))
    return rounds


if __name__ == "__main__":
    print(json.dumps(steps(json.loads(sys.argv[1]))))  # noqa: T201
