"""Sides of the training benchmark: our loop and the plain one train the same model alike."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from llmtrain.errors import ConfigError

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
CASE = {
    "hidden_size": 32, "intermediate_size": 48, "num_layers": 2, "num_heads": 2, "vocab_size": 96,
    "rows": 2, "sequence_length": 24, "precision": "fp32",
}  # fmt: skip


class Enough(Exception):
    pass


class Losses:
    """A meter that ends the loop it is called from."""

    def __init__(self, steps: int) -> None:
        self.steps, self.found = steps, list[float]()

    def done(self, loss: float, **more: float) -> None:
        self.found.append(loss)
        if len(self.found) == self.steps:
            raise Enough


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    kept = list(sys.path)
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.syspath_prepend(str(BENCHMARKS / "peers"))
    yield importlib.import_module
    sys.path[:] = kept


def losses(side: ModuleType, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> list[float]:
    case = importlib.import_module("train_side").Case(**CASE | changes)
    meter = Losses(3)
    monkeypatch.setattr(side, "begin", lambda: (case, meter))
    threads = torch.get_num_threads()
    with pytest.raises(Enough):
        side.main()
    torch.set_num_threads(threads)
    return meter.found


def test_both_loops_have_the_same_losses(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = losses(module("train_own"), monkeypatch)
    theirs = losses(module("train_plain"), monkeypatch)
    assert ours[2] < ours[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=0)


def test_packed_rows_are_documents(module: Any) -> None:
    side = module("train_side")
    rows = side.rows_of(side.Case(**CASE | {"document_tokens": 5}), 0)
    assert int(rows.documents.max()) > 1
    inside = rows.targets >= 0
    assert not inside[:, -1].any()
    following = torch.roll(rows.tokens, -1, dims=1)
    assert torch.equal(rows.targets[inside], following[inside])
    assert torch.equal(inside[:, :-1], rows.documents[:, 1:] == rows.documents[:, :-1])
    assert rows.positions[:, 1:][~inside[:, :-1]].eq(0).all()


def test_results_become_tables(module: Any) -> None:
    side = {
        "tokens_per_s": 10.0, "tokens_per_cpu_s": 9.0, "ours_is_faster_by": 1.25, "least": 1.2,
        "most": 1.3, "peak_bytes": 2**30,
    }  # fmt: skip
    found = {
        "sides": {"ours": side, "plain": side}, "ours": "ours", "best_peer": "plain",
        "ours_over_best_peer": 1.25, "peak_over_best_peer": 0.5, "peak_over_smallest_peer": 0.75,
        "bars": {"speed": 1.1, "peak": 0.8}, "case": CASE | {"threads": 2},
    }  # fmt: skip
    text = module("train_cpu_table").table(json.loads(json.dumps({"speed": {"case": found}})))
    assert "| case | ours | plain | 1.25 | 1.1 | 0.50 | 0.75 | 0.8 |" in text


def test_unknown_names_are_refused(module: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"size=9t is not of 25m, 125m"):
        module("train_cpu").parse([f"out={tmp_path}", "size=9t", "side=plain"])
