"""The cluster: its tests run in a process of their own, in a network namespace that has only loopback."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nse_tools.errors import MissingPackageError, SettingError
from nse_tools.parallel.ray_executor import RayExecutor

HERE = Path(__file__).parent


def alone() -> list[str]:
    """Return what runs a command without any network but loopback: as root, or with user namespaces."""
    if shutil.which("unshare") is None:
        pytest.skip("no network namespaces on this system (util-linux's unshare is missing)")
    starter = [sys.executable, str(HERE / "alone.py")]
    tried = []
    for flags in ("-n", "-rn"):
        command = ["unshare", flags, *starter]
        done = subprocess.run([*command, sys.executable, "-c", ""], capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return command
        tried.append(done.stderr.strip())
    pytest.fail(f"Ray is tested in a network namespace of its own, and none can be made here, as root or as a user: {tried}")


@pytest.mark.timeout(600)
def test_on_two_real_workers(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="the extra `cluster` is not installed")
    home = tmp_path / "home"
    home.mkdir()
    root = HERE.parents[1]
    from nse_tools.models.embedded import cache_folder

    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTEST_"))},
        "HOME": str(home),
        "NSE_TOOLS_CACHE": str(cache_folder()),  # the embedded model is there
        "PYTHONPATH": os.pathsep.join([str(root), str(HERE.parent)]),
        "OMP_NUM_THREADS": "1",
        "RAY_worker_niceness": "0",  # else workers starve beside other tests
    }
    command = [*alone(), sys.executable, "-m", "pytest", str(HERE / "on_ray.py"), "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=580, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
    assert not [file for file in home.iterdir() if "ray" in file.name]


def test_without_ray_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingPackageError, match=r"nse-editing\[cluster\]"):
        RayExecutor(2).share(1)


def test_nothing_imports_ray_before_it_is_used() -> None:
    code = "import sys, nse_tools as nse; nse.parallel.RayExecutor(2); nse.EditSession; nse.compare; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=HERE.parents[1], check=False).returncode == 0


@pytest.mark.parametrize("wrong", [{"workers": -1}, {"in_flight": 0}, {"retries": -1}, {"threads": 0}, {"batch_facts": 0}])
def test_numbers_out_of_range_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(SettingError, match=next(iter(wrong))):
        RayExecutor(**wrong)
