"""The depth of a page's elements, told from its tags."""

import random
import re

import pytest

from data_pipeline.read.depth import _FLAT, exceeds_depth

TAG = re.compile(r"<(/?)([A-Za-z][A-Za-z0-9]*)")


def reference(html: str, limit: int) -> bool:
    depth = deepest = 0
    for closing, name in TAG.findall(html):
        if name.lower() not in _FLAT.split():
            depth = max(0, depth - 1) if closing else depth + 1
            deepest = max(deepest, depth)
    return deepest > limit


@pytest.mark.parametrize("seed", range(5))
def test_it_is_that_of_a_plain_count(seed: int) -> None:
    rng = random.Random(seed)
    parts = ["<", "</", "div", "DIV", "p", ">", " ", "a1", "<br>", "<colgroup>", "</b", "<b>", "é",
             "<optgroups>", "<!--", "<é", "h1", "1", "/", "<i>", "</i>", "<TFOOT>"]  # fmt: skip
    for _ in range(200):
        html, limit = "".join(rng.choices(parts, k=rng.randrange(60))), rng.randrange(6)
        assert exceeds_depth(html, limit) == reference(html, limit), html
