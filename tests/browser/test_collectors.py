"""The two collectors catch what they are there for; a page without complaints would prove nothing otherwise."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from browser.lab import Notebook

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = pytest.mark.browser


def test_complaints_and_outside_requests_are_caught(chromium: Browser) -> None:
    page = chromium.new_page()
    watched = Notebook(page, "http://127.0.0.1:1")
    watched.watch()
    page.set_content("<script>console.error('said'); fetch('http://example.invalid/x').catch(() => 0); throw new Error('thrown')</script>")
    page.wait_for_timeout(500)
    assert any("said" in text for text in watched.complaints)
    assert any("thrown" in text for text in watched.complaints)
    assert watched.outside == ["http://example.invalid/x"]
    page.close()
