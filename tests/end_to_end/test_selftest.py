"""The command that proves exact resume, on runs of its own."""

from pathlib import Path

import pytest

from llmtrain.cli import main
from tests.end_to_end.commands import REPOSITORY, TINY


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_a_killed_run_goes_on_bit_by_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(REPOSITORY)
    words = [word for word in TINY if not word.startswith(("checkpoint", "monitor"))]
    kept = tmp_path / "kept"
    status = main(["selftest", "resume", "steps=3", "more_steps=2", *words, f"out={kept}"])
    printed = capsys.readouterr().out
    assert status == 0, printed
    assert "resume: exact: 3 + 2 steps against 5" in printed
    assert "resumed from" in (kept / "resumed.log").read_text()
    assert sorted(path.name for path in kept.glob("*/checkpoints/step-*")) == [
        "step-000000003", "step-000000003", "step-000000005", "step-000000005",
    ]  # fmt: skip
