"""How a command ends: message or traceback, exit status, and what the log files hold."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llmtrain import logs
from llmtrain.errors import ConfigError, DataError


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    logs.close()


def raising(error: BaseException) -> Callable[[], int]:
    def main() -> int:
        raise error

    return main


@pytest.mark.parametrize("status", [0, 1, 3])
def test_statuses_pass_through(status: int) -> None:
    assert logs.run_command(lambda: status) == status


@pytest.mark.parametrize(
    ("error", "status", "shown"),
    [
        (DataError("x is cut; copy it"), 2, "error: x is cut; copy it\n"),
        (ConfigError("one"), 2, "error: one\n"),
        (ConfigError(["one", "two\nlines"]), 2, "error: 2 problems\n  - one\n  - two\n    lines\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_wrong_input_is_a_message_without_traceback(
    error: BaseException, status: int, shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert logs.run_command(raising(error)) == status
    assert capsys.readouterr().err == shown


def test_a_fault_is_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert logs.run_command(raising(ValueError("our fault"))) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback")
    assert "ValueError: our fault" in shown


def test_other_ranks_say_who_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert logs.run_command(raising(DataError("gone")), rank=3) == 2
    assert capsys.readouterr().err == "rank 3: error: gone\n"


def test_rank_0_has_a_console_and_every_rank_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = logging.getLogger("llmtrain.somewhere")
    logs.setup(tmp_path, rank=0)
    logger.info("step 1")
    logger.warning("careful")
    logging.getLogger("library").info("chatter")
    logs.setup(tmp_path, rank=1)
    logger.info("step 2")
    assert capsys.readouterr().err == "step 1\nwarning: careful\n"
    first = (tmp_path / "logs" / "rank0.log").read_text()
    assert "INFO llmtrain.somewhere: step 1" in first
    assert "chatter" not in first
    assert "step 2" in (tmp_path / "logs" / "rank1.log").read_text()


def test_errors_are_in_the_file_too_but_once_on_the_console(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logs.setup(tmp_path, rank=0)
    logs.run_command(raising(DataError("gone")))
    assert capsys.readouterr().err == "error: gone\n"
    assert "error: gone" in (tmp_path / "logs" / "rank0.log").read_text()
