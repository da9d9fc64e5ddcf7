"""Whatever is shown is escaped."""

from __future__ import annotations

import pandas as pd
from hypothesis import given
from hypothesis import strategies as st

from helpers.shown import EVIL
from nse_tools.widgets import _markup as markup

ANY = st.text(alphabet="<>&\"' \n\tabcé東", max_size=12)


@given(ANY)
def test_no_text_opens_a_tag_or_ends_an_attribute(text: str) -> None:
    assert not set(markup.escape(text)) & set("<>\"'")
    for made, own in ((markup.note(text), 2), (markup.error(text), 2), (markup.code(text), 2), (markup.tokens([text, text], 1), 6)):
        assert made.count("<") == own


def test_every_piece_of_a_panel_escapes_what_it_is_given() -> None:
    pieces = [
        markup.heading(EVIL, EVIL),
        markup.section(EVIL, "", EVIL),
        markup.progress(EVIL, 1, 2),
        markup.tokens([EVIL], 0),
        markup.frame(pd.DataFrame({EVIL: [EVIL]})),
        markup.rows([EVIL], [[markup.escape(EVIL)]]),
    ]
    for made in pieces:
        assert "<script" not in made
        assert "&lt;script&gt;" in made


def test_spaces_and_line_ends_of_tokens_are_visible() -> None:
    assert markup.visible(" a\n") == "·a↵"


def test_a_changed_cell_is_marked() -> None:
    table = markup.rows(["a"], [["same"], [markup.CHANGED + "other"]])
    assert "<td>same</td>" in table
    assert '<td class="nse-changed">other</td>' in table
