"""The command that results name: ours, however it was started, and no other program's."""

from __future__ import annotations

import pytest

from nse_tools._provenance import command


@pytest.mark.parametrize(
    ("program", "noted"),
    [
        ("/somewhere/bin/nse-tools", "nse-tools compare --out 'my runs'"),
        ("/somewhere/nse_tools/__main__.py", "nse-tools compare --out 'my runs'"),
        ("/somewhere/nse_tools/cli.py", "nse-tools compare --out 'my runs'"),
        ("/somewhere/ipykernel_launcher.py", None),
    ],
)
def test_the_command_is_noted_where_it_is_ours(program: str, noted: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", [program, "compare", "--out", "my runs"])
    assert command() == noted
