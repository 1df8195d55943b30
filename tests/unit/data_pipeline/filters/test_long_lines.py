"""mC4's rule: three lines of 200 characters, whatever the language."""

import pytest

from data_pipeline.document import Document
from data_pipeline.filters.c4 import C4
from data_pipeline.filters.long_lines import LongLines
from data_pipeline.step import Dropped, Kept

LONG = "字" * 200


def page(text: str) -> Document:
    return Document(id="0" * 32, source="s", text=text)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (f"{LONG}\n{LONG}\n{LONG}", True),
        (f"{LONG}\nshort\n{LONG}\n\n{LONG} and more", True),
        (f"{LONG}\n{LONG}\n{LONG[:-1]}", False),
        (LONG * 10, False),
        (f"{LONG}\r{LONG}\r{LONG}", False),
        ("", False),
    ],
)
def test_three_long_lines_are_needed(text: str, kept: bool) -> None:
    verdict, (finding,) = LongLines()(page(text)), LongLines().findings(page(text))
    assert finding.passed == kept
    if kept:
        assert verdict == Kept(page(text))
    else:
        assert verdict == Dropped("c4.few_long_lines")


def test_variant_mc4_is_this_rule_and_no_other() -> None:
    step = C4.build(variant="mc4")
    text = "\n".join([f"lorem ipsum {{ javascript {LONG}"] * 3)
    assert step(page(text)) == Kept(page(text))
