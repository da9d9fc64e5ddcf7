"""Errors that teach."""

from __future__ import annotations

import pytest

from nse_tools import errors


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [
        (errors.FactError, ValueError),
        (errors.ModelError, ValueError),
        (errors.SettingError, ValueError),
        (errors.EditError, RuntimeError),
        (errors.StateError, RuntimeError),
    ],
)
def test_every_error_is_ours_and_of_the_kind_python_expects(kind: type, builtin: type) -> None:
    assert issubclass(kind, errors.NSEError)
    assert issubclass(kind, builtin)


def test_the_nearest_name_or_all_of_them() -> None:
    assert errors.nearest("layrs", ["layers", "passes"]) == " Did you mean 'layers'?"
    assert errors.nearest("zzz", ["b", "a"]) == " Known: a, b."
