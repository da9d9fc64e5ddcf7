"""A real JupyterLab on loopback, and a real browser in front of it."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, Playwright

TOKEN = "only-for-this-test"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def find_chromium() -> str | None:
    """Return where the system's chromium is."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


@contextmanager
def jupyterlab(notebooks: Path, home: Path, theme: str = "JupyterLab Light") -> Iterator[str]:
    """Run a server with folders and settings of its own; yield its address."""
    _write_settings(home, theme)
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
    log = (home / "server.log").open("w")
    server = subprocess.Popen(_command(notebooks, port, home), env=_environment(home), stdout=log, stderr=log, preexec_fn=_die_with_parent)
    address = f"http://127.0.0.1:{port}"
    try:
        _wait_for(f"{address}/api/status?token={TOKEN}", server, home / "server.log")
        yield address
    finally:
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(timeout=20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
        log.close()


def launch(playwright: Playwright, executable: str) -> Browser:
    """Start the system's chromium; no name but this machine's own can be looked up from it."""
    blocked = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
    options = ["--no-sandbox", "--disable-background-networking", "--disable-dev-shm-usage", blocked]
    return playwright.chromium.launch(executable_path=executable, args=options)


@dataclass
class Notebook:
    """A notebook open in JupyterLab, and everything the page complained about."""

    page: Page
    address: str
    complaints: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)

    @classmethod
    def open(cls, browser: Browser, address: str, name: str, size: tuple[int, int] = (1280, 1500)) -> Notebook:
        """Open a notebook and wait until its kernel is there: "run all" before that asks for a kernel and hangs."""
        page = browser.new_page(viewport={"width": size[0], "height": size[1]})
        notebook = cls(page, address)
        notebook.watch()
        page.goto(f"{address}/lab/tree/{name}?token={TOKEN}&reset")
        page.wait_for_function(_KERNEL_IS_IDLE, timeout=120_000)
        return notebook

    def watch(self) -> None:
        """Collect the page's complaints and its requests to other places."""
        self.page.on("console", lambda message: self.complaints.append(message.text) if message.type == "error" else None)
        self.page.on("pageerror", lambda wrong: self.complaints.append(str(wrong)))
        self.page.on("request", lambda asked: self._check(asked.url))

    def run_all(self, timeout: float) -> None:
        """Run all cells and wait until the last has been run."""
        self.page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells'); }")
        self.page.wait_for_function(_ALL_HAVE_RUN, timeout=timeout * 1000)

    def errors(self) -> list[str]:
        """Return the error outputs of cells."""
        return self.page.locator(".jp-RenderedText[data-mime-type='application/vnd.jupyter.error'], .jp-OutputArea-error").all_inner_texts()

    def _check(self, url: str) -> None:
        if not url.startswith((self.address, self.address.replace("http", "ws"), "data:", "blob:", "about:")):
            self.outside.append(url)


_KERNEL_IS_IDLE = """() => {
  const widget = window.jupyterapp?.shell?.currentWidget;
  const kernel = widget?.sessionContext?.session?.kernel;
  return kernel && kernel.connectionStatus === 'connected' && kernel.status === 'idle';
}"""
_ALL_HAVE_RUN = """() => {
  const widget = window.jupyterapp.shell.currentWidget;
  const cells = widget.content.widgets.filter(c => c.model.type === 'code');
  const failed = cells.some(c => c.model.outputs?.toJSON().some(o => o.output_type === 'error'));
  return failed || (cells.every(c => c.model.executionCount) && widget.sessionContext.session.kernel.status === 'idle');
}"""


def _command(notebooks: Path, port: int, home: Path) -> list[str]:
    options = {
        "ServerApp.ip": "127.0.0.1",
        "ServerApp.port": port,
        "ServerApp.port_retries": 0,
        "ServerApp.root_dir": notebooks,
        "ServerApp.open_browser": False,
        "ServerApp.allow_root": True,
        "ServerApp.terminals_enabled": False,
        "IdentityProvider.token": TOKEN,
        "LabApp.expose_app_in_browser": True,
        "LabApp.extension_manager": "readonly",
        "LabApp.user_settings_dir": home / "settings",
        "LabApp.workspaces_dir": home / "workspaces",
        "LabApp.news_url": "None",
    }
    return [sys.executable, "-m", "jupyterlab", *(f"--{name}={value}" for name, value in options.items())]


def _environment(home: Path) -> dict[str, str]:
    folders = {f"JUPYTER_{name}_DIR": str(home / name.lower()) for name in ("CONFIG", "DATA", "RUNTIME")}
    return {**os.environ, **folders, "IPYTHONDIR": str(home / "ipython"), "OMP_NUM_THREADS": "1"}


def _write_settings(home: Path, theme: str) -> None:
    settings: dict[str, dict[str, Any]] = {
        "notebook-extension/tracker": {"windowingMode": "none"},  # every cell is in the page
        "apputils-extension/notification": {"checkForUpdates": False, "doNotDisturbMode": True, "fetchNews": "false"},
        "apputils-extension/themes": {"theme": theme},
    }
    for name, values in settings.items():
        file = home / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values))


def _die_with_parent() -> None:
    """Let the server end with the test, even when that is killed: PR_SET_PDEATHSIG, where there is one."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def _wait_for(url: str, server: subprocess.Popen[bytes], log: Path, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and server.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError(f"JupyterLab did not start:\n{log.read_text()[-2000:]}")
