"""Two runs bit by bit, and the words of the command."""

import json
from pathlib import Path

import pytest
import torch

from llmtrain.config.arguments import parse
from llmtrain.config.selftest import SelftestConfig, split
from llmtrain.errors import CheckpointError, ConfigError
from llmtrain.run.directory import RunDirectory
from llmtrain.selftest.children import Child
from llmtrain.selftest.compare import compare, table
from tests.unit.checkpoint.test_checkpoints import State, save


def run(folder: Path, state: State, losses: dict[int, float]) -> RunDirectory:
    made = RunDirectory(folder)
    save(made.checkpoints, state, 4)
    rows = [{"step": s, "loss": x, "grad_norm": 1.0, "lr": 0.1} for s, x in losses.items()]
    made.metrics_jsonl.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return made


def test_equal_runs_are_equal_whatever_came_before(tmp_path: Path) -> None:
    one = run(tmp_path / "one", State(1), {2: 9.0, 3: 2.0, 4: 1.5})
    other = run(tmp_path / "other", State(1), {2: 8.0, 3: 2.0, 4: 1.5})
    findings = compare(one, other, first=2, last=4)
    assert all(finding.same for finding in findings)
    assert [f.what for f in findings] == [
        "parameters", "optimizer exp_avg", "optimizer step", "loss of each step",
        "grad_norm of each step", "lr of each step",
    ]  # fmt: skip
    assert [f.count for f in findings] == [15, 15, 1, 2, 2, 2]


def test_one_bit_is_found_and_named(tmp_path: Path) -> None:
    odd = State(1)
    with torch.no_grad():
        odd.tensors["model.embed.weight"][2, 1].view(torch.int32).bitwise_xor_(1)
    one = run(tmp_path / "one", State(1), {3: 2.0, 4: 1.5})
    other = run(tmp_path / "other", odd, {3: 2.0, 4: 1.25})
    differing = [f for f in compare(one, other, first=2, last=4) if not f.same]
    assert [(f.what, f.different, f.first) for f in differing] == [
        ("parameters", 1, "model.embed.weight"), ("loss of each step", 1, "step 4"),
    ]  # fmt: skip
    assert differing[0].worst > 0
    assert "first in model.embed.weight" in table(differing)


def test_zeros_of_either_sign_are_not_the_same(tmp_path: Path) -> None:
    plus, minus = State(1), State(1)
    plus.tensors["optim.step"], minus.tensors["optim.step"] = torch.tensor(0.0), torch.tensor(-0.0)
    one, other = (run(tmp_path / n, s, {4: 1.0}) for n, s in (("one", plus), ("other", minus)))
    assert [f.what for f in compare(one, other, first=3, last=4) if not f.same] == [
        "optimizer step"
    ]


def test_runs_that_report_other_steps_are_refused(tmp_path: Path) -> None:
    one = run(tmp_path / "one", State(1), {3: 2.0, 4: 1.5})
    other = run(tmp_path / "other", State(1), {4: 1.5})
    with pytest.raises(CheckpointError, match=r"other steps: \[3, 4\] and \[4\]"):
        compare(one, other, first=2, last=4)


def test_words_are_the_tests_or_the_trainings() -> None:
    words = parse(
        ["selftest", "resume", "steps=3", "model=llama_tiny", "~data", "parallel.pp=2"],
        {"selftest"},
    )
    assert split(words.overrides) == (
        ["test=resume", "steps=3"], ["model=llama_tiny", "~data", "parallel.pp=2"],
    )  # fmt: skip
    with pytest.raises(ConfigError, match="more_steps=0 must be at least 1"):
        SelftestConfig(more_steps=0)


def test_a_run_that_is_refused_is_told_with_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"status 2: error: .*did you mean optimizer\.lr"):
        Child(["training.num_tokens=1e5", "optimizer.lrr=1"], tmp_path / "log").finish()
