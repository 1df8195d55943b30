"""Random and damaged input: nothing crashes, and no record is lost without a count.

``python -m benchmarks.fuzz minutes=10`` does the same for longer.
"""

import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzzing import KINDS, Case, check, random_case

QUICK = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
NAMES = {
    "warc": ("c.warc", "c.warc.gz"),
    "jsonl": ("a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.jsonl.bz2", "a.jsonl.xz"),
    "parquet": ("a.parquet",),
    "html": ("text/html", "", "text/html; charset=utf-16", "text/plain"),
}


@pytest.mark.parametrize("kind", KINDS)
@QUICK
@given(data=st.data())
def test_any_bytes(kind: str, data: st.DataObject, tmp_path: Path) -> None:
    name = data.draw(st.sampled_from(NAMES[kind]))
    check(Case(kind, name, data.draw(st.binary(max_size=400))), tmp_path / "x")


@pytest.mark.parametrize("kind", KINDS)
@QUICK
@given(seed=st.integers(0, 2**32))
def test_real_records_with_changes(kind: str, seed: int, tmp_path: Path) -> None:
    check(random_case(random.Random(seed), kind), tmp_path / "x")
