"""Does a stream of edits take more memory, or longer per edit, the longer it runs? One small random model, made-up facts.

    python benchmarks/stream.py --edits 10000 --of 20 --keep 3

Every twentieth edit corrects an earlier fact, every fortieth repeats one. Rounds are kept on disk (``autosave``), the last ``--keep``
in memory too. One row every ``--every`` edits: seconds an edit since the row before, resident memory, records in memory, and what
the folder takes. ``cpu_s_per_edit`` is the time the process had the processor, whatever else ran beside it; ``session_s`` is what
beside the model's work goes into old keys, checks, record and folder. ``--keep 0`` keeps every round in memory, for comparison.
"""

from __future__ import annotations

import gc
import os
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from _machine import finish, parser, read
from nse_tools import EditableModel, EditSession, EditStream, Fact, methods
from nse_tools.tracing.contexts import Contexts
from nse_tools.tracing.moments import SecondMoments

SYLLABLES = ["ba", "de", "ko", "lu", "mi", "no", "ra", "su", "ti", "ve"]
TARGETS = ["Berlin", "Rome", "Paris", "Lima", "Oslo", "Cairo", "Quito", "Seoul"]
LAYERS = (1, 2)


def model_of(width: int) -> EditableModel:
    """Return a random Llama of four layers, with a tokenizer of bytes."""
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tok.train_from_iterator([], trainers.BpeTrainer(initial_alphabet=alphabet, special_tokens=["<end>", "<s>"], show_progress=False))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tok, eos_token="<end>")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(fast),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
    )
    return EditableModel(transformers.LlamaForCausalLM(config), fast, name=f"random Llama, width {width}")


def facts(count: int) -> Iterator[Fact]:
    """Yield edits: new facts, corrections and repetitions."""
    draw, last = random.Random(0), {}
    for number in range(count):
        if number % 20 == 19:
            about = draw.randrange(number - number // 20)
            target = draw.choice([t for t in TARGETS if t != last.get(about)])
        elif number % 40 == 30 and last:
            about, target = draw.choice(list(last.items()))
        else:
            about, target = number, draw.choice(TARGETS)
        last[about] = target
        name = "".join(SYLLABLES[int(digit)] for digit in f"{about:05d}")
        yield Fact(f"f{about}", name, "The town of {} lies in", target, relation="lies in")


def moments_of(model: EditableModel) -> SecondMoments:
    """Return made-up key statistics of the right shape."""
    draw = torch.Generator().manual_seed(0)
    keys = {layer: torch.randn(3 * model.d_ff, model.d_ff, generator=draw) for layer in LAYERS}
    return SecondMoments({layer: k.T @ k / len(k) for layer, k in keys.items()}, 3 * model.d_ff, "made up")


def resident() -> float:
    """Return the process's resident memory, MB."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the means of the first and last quarter (the first row, which warms up, left out), and their ratio."""
    rows = []
    body = frame.iloc[1:] if len(frame) > 4 else frame
    quarter = max(1, len(body) // 4)
    for part in ("cpu_s_per_edit", "seconds_per_edit", "session_s", "resident_mb"):
        first, last = body[part].head(quarter).mean(), body[part].tail(quarter).mean()
        rows.append(
            {"part": part, "edits": frame.edits.iloc[-1], "first_quarter": first, "last_quarter": last, "last_to_first": last / first}
        )
    return pd.DataFrame(rows)


def main() -> None:
    """Read the arguments, run, show, save."""
    made = parser(__doc__, "stream")
    made.add_argument("--edits", type=int, default=10_000)
    made.add_argument("--of", type=int, default=20, help="facts in a round")
    made.add_argument("--keep", type=int, default=3, help="rounds in memory; 0: all")
    made.add_argument("--every", type=int, default=500, help="edits in a row of the table")
    made.add_argument("--width", type=int, default=32)
    made.add_argument("--steps", type=int, default=3, help="steps of the value search")
    chosen = read(made)
    model = model_of(chosen.width)
    method = methods.nse(
        None, name="nse", layers=LAYERS, v_num_grad_steps=chosen.steps, v_lr=0.3, mom2_update_weight=10.0, passes=1, neuron_threshold=1.0
    )
    contexts = Contexts(("", "The map of. "))
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        session = EditSession(
            model,
            method,
            contexts=contexts,
            moments=moments_of(model),
            value_cache=False,
            progress=False,
            autosave=Path(folder) / "session",
            keep=chosen.keep or None,
        )
        start, cpu, before, worked = time.perf_counter(), time.process_time(), 0, 0.0

        def note(at: EditSession) -> None:
            nonlocal start, cpu, before, worked
            worked += sum(at.rounds[-1].seconds.values())
            # every duplicate is in the journal by now or in the step that ends with this round
            edits = len(stream.journal)
            if edits - before < chosen.every and edits < chosen.edits:
                return
            seconds, spent = time.perf_counter() - start, time.process_time() - cpu
            gc.collect()
            rows.append(
                {
                    "edits": edits,
                    "rounds": len(at),
                    "keep": chosen.keep,
                    "cpu_s_per_edit": spent / (edits - before),
                    "seconds_per_edit": seconds / (edits - before),
                    "session_s": (seconds - worked) / (edits - before),
                    "resident_mb": resident(),
                    "records_in_memory": sum(held.in_memory for held in at.past.rounds.held),
                    "folder_mb": sum(f.stat().st_size for f in Path(folder).rglob("*") if f.is_file()) / 1e6,
                }
            )
            print(rows[-1], flush=True)
            start, cpu, before, worked = time.perf_counter(), time.process_time(), edits, 0.0

        stream = EditStream(session, facts(chosen.edits), rounds_of=chosen.of, wait=3600, watch=note)
        stream.run()
        print(stream.journal.counts())
        stream.close()
        session.autosave.close()
    finish(rows, summary, chosen, "a stream of edits, its first and its last quarter")


if __name__ == "__main__":
    main()
