"""One save: parts that come late, do not come, or are bad; memory that is staged."""

import threading
import time
from pathlib import Path

import pytest
import torch

from llmtrain.checkpoint import archive
from llmtrain.checkpoint.saving import Digests, Save, part_path
from llmtrain.checkpoint.staging import Staging
from llmtrain.checkpoint.tensor_files import own_items, place, share_out


class Folder:
    """A save of two ranks, and what the first commits."""

    def __init__(self, path: Path) -> None:
        self.aside = archive.fresh_aside(path, 1)
        self.committed: Digests = {}

    def rank(self, number: int, problem: str | None = None) -> Save:
        def write(save: Save) -> Digests:
            if problem is not None:
                raise OSError(problem)
            return {f"__{number}_0": {"bytes": number}}

        def commit(save: Save, files: Digests) -> None:
            self.committed = files

        first = number == 0
        return Save(1, self.aside, number, 2, write=write, commit=commit if first else None)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def test_the_first_rank_commits_once_all_have_told(folder: Folder) -> None:
    first, second = folder.rank(0), folder.rank(1)
    first.start()
    assert not first.done.wait(0.05)
    second.start()
    assert first.done.wait(10)
    assert first.problem is None
    assert sorted(folder.committed) == ["__0_0", "__1_0"]


@pytest.mark.parametrize("failing", [0, 1])
def test_what_fails_on_one_rank_is_not_committed_and_is_deleted(
    folder: Folder, failing: int, caplog: pytest.LogCaptureFixture
) -> None:
    saves = [folder.rank(n, "disk on fire" if n == failing else None) for n in (0, 1)]
    for save in reversed(saves):
        save.start()
        assert save.done.wait(10)
    assert saves[0].problem == f"rank {failing}: disk on fire"
    assert caplog.text.count("step 1 was not written") == 1
    assert not folder.committed
    assert not folder.aside.exists()


def test_a_part_that_cannot_be_told_is_handed_in(folder: Folder) -> None:
    first = folder.rank(0)
    first.start()
    first.written.wait(10)
    first.give([first.part, "rank 1 has no disk at all"])
    assert first.done.wait(10)
    assert first.problem == "rank 1: rank 1 has no disk at all"


def test_a_rank_that_is_gone_is_not_waited_for_any_longer(folder: Folder) -> None:
    first = folder.rank(0)
    first.start()
    threading.Timer(0.05, first.abandon).start()
    assert first.done.wait(10)
    assert first.problem == "ranks [1] did not say what they wrote"


def test_a_part_of_another_attempt_is_not_taken(folder: Folder, tmp_path: Path) -> None:
    folder.rank(1).finish()
    assert part_path(folder.aside, 1).exists()
    other = archive.aside_path(tmp_path, 1, attempt=2)
    other.mkdir()
    assert not part_path(other, 1).exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_pinned_memory_gets_the_state_of_the_call_while_the_gpu_goes_on() -> None:
    state = {"a": torch.randn(1 << 24, device="cuda"), "b": torch.randn(7, device="cuda")}
    expected = {name: tensor.cpu() for name, tensor in state.items()}
    plan = share_out([own_items(state, True)])[0][0]
    pieces = place(plan, "file").pieces
    staging = Staging(pieces, torch.device("cuda"))
    assert staging._pinned
    torch.cuda._sleep(100_000_000)
    ready = staging.ready()
    started = time.perf_counter()
    later = [tensor * 2 for tensor in state.values()]
    assert time.perf_counter() - started < 0.05
    staging.copy(state, ready)
    for piece, value in zip(pieces, staging.values, strict=True):
        assert torch.equal(value, expected[piece.index.fqn])
    assert len(later) == 2
    staging.close()
