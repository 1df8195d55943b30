"""Killed between two checkpoints, the real command goes on from memory, bit by bit."""

import ctypes
import os
import shutil
import socket
from pathlib import Path

import pytest
import torch

from llmtrain.checkpoint import archive
from tests.end_to_end.commands import (
    TINY,
    Command,
    losses,
    make_store,
    run_words,
    saved_state,
    saved_steps,
    status,
)

CLONE_NEWUTS = 0x04000000
WORDS = (*TINY, "parallel.pp=2", "training.num_tokens=20480", "checkpoint.every_steps=20")
LAST = 80

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


def run_on_host(place: object, words: list[str], log: str, environment: dict[str, str]) -> int:
    """Be a rank on the machine that the environment names."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWUTS):
        raise OSError(ctypes.get_errno(), "unshare")
    socket.sethostname(environment["HOST"])
    return run_words(place, words, log, environment)


class Runs:
    """Runs of one command on one store."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.memory = folder / "memory"
        self._store = make_store(folder / "store", 1)
        self._started = 0

    def start(self, name: str, *words: str, hosts: tuple[str, ...] = (), ranks: int = 2) -> Command:
        self._started += 1
        return Command(
            ["train", *WORDS, f"name={name}", f"runs_dir={self.folder}/runs",
             f"data.sources.a={self._store}", f"checkpoint.memory_dir={self.memory}", *words],
            self.folder / f"{self._started}-{name}.log", ranks=ranks,
            body=run_on_host if hosts else run_words,
            environments=[{"HOST": host} for host in hosts],
        )  # fmt: skip

    def finish(self, name: str, *words: str, hosts: tuple[str, ...] = (), ranks: int = 2) -> str:
        command = self.start(name, *words, hosts=hosts, ranks=ranks)
        assert command.wait() == 0, command.output
        return command.output

    def run(self, name: str) -> Path:
        return self.folder / "runs" / name

    def kept(self, name: str, host: str = "*") -> int:
        """Newest step in the memory of a machine, 0 where there is none."""
        found = self.memory.glob(f"llmtrain-copies-*-{name}-*/{host}/step-*/meta.json")
        return max((archive.step_of(path.parent.name) or 0 for path in found), default=0)

    def kill_after(self, name: str, step: int, hosts: tuple[str, ...] = ()) -> None:
        """Kill all ranks once each host has ``step`` or a later one, and the disk an older one."""
        command = self.start(name, "checkpoint.memory_every_steps=3", hosts=hosts)

        def kept() -> int:
            return min(self.kept(name, host) for host in hosts or ("*",))

        command.until(lambda: 0 < kept() - max([step, *saved_steps(self.run(name))]) <= 12)
        command.kill()
        assert 0 < max(saved_steps(self.run(name))) < kept()

    def assert_as_straight(self, name: str) -> None:
        assert status(self.run(name)) == {"code": 0, "reason": "done", "step": LAST}
        assert losses(self.run(name)) == losses(self.run("straight"))
        expected, found = (saved_state(self.run(n), LAST) for n in ("straight", name))
        assert expected.keys() == found.keys()
        assert [n for n in expected if not torch.equal(expected[n], found[n])] == []


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """With an undisturbed run that keeps nothing in memory."""
    runs = Runs(tmp_path_factory.mktemp("memory"))
    runs.finish("straight")
    return runs


def test_killed_with_all_ranks_it_goes_on_from_memory_bit_by_bit(runs: Runs) -> None:
    runs.kill_after("killed", 21)
    kept = runs.kept("killed")
    output = runs.finish("killed", "checkpoint.memory_every_steps=3")
    assert f"resumed from memory, not from disk: {runs.memory}" in output
    assert archive.folder_name(kept) in output
    runs.assert_as_straight("killed")
    assert not list(runs.memory.glob("*-killed-*")), "a run that is done gives its memory back"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give processes host names")
def test_a_lost_machine_is_made_up_for_by_the_other(runs: Runs) -> None:
    hosts = ("one", "two")
    runs.kill_after("lost", 21, hosts)
    kept = runs.kept("lost", "one")
    (lost,) = runs.memory.glob("*-lost-*/two")
    shutil.rmtree(lost)
    output = runs.finish("lost", "checkpoint.memory_every_steps=3", hosts=hosts)
    assert "resumed from memory, not from disk" in output
    log = (runs.run("lost") / "logs" / "rank1.log").read_text()
    assert f"__1_0.distcp of step {kept} came from node one" in log
    runs.assert_as_straight("lost")
    assert not list(runs.memory.glob("*-lost-*"))


def test_a_rank_alone_goes_on_from_the_memory_of_two(runs: Runs) -> None:
    runs.kill_after("alone", 21)
    kept = runs.kept("alone")
    words = ("parallel.pp=1", f"training.stop_at_step={kept + 3}")
    output = runs.finish("alone", "checkpoint.memory_every_steps=3", *words, ranks=1)
    assert "resumed from memory, not from disk" in output
    expected = losses(runs.run("straight"))
    for step, loss in losses(runs.run("alone")).items():
        assert loss == pytest.approx(expected[step], rel=1e-6)
