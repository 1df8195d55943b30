"""Stopping and going on with the real command: killed, preempted, damaged, on another layout."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from shutil import copytree

import pytest
import torch

from llmtrain.checkpoint import archive
from llmtrain.tokenizer.tokenizer import train_sentencepiece
from tests.end_to_end.commands import (
    TINY,
    Command,
    losses,
    make_store,
    run_torchrun,
    run_words,
    saved_state,
    saved_steps,
    status,
    steps,
)

PP2 = ("parallel.pp=2",)
DP2 = ("parallel.dp_shard=2",)
DP2_PP2 = ("parallel.pp=2", "parallel.dp_shard=2")
LONG = ("training.num_tokens=100_000_000", "checkpoint.every_steps=10_000")

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


class Workplace:
    """A folder with two stores and the runs on them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stores = {
            name: make_store(folder / "stores" / name, seed)
            for seed, name in enumerate(("web", "code"))
        }
        self._started = 0

    def run(self, name: str) -> Path:
        return self.folder / "runs" / name

    def train(
        self,
        name: str,
        *words: str,
        ranks: int = 1,
        torchrun: bool = False,
        body: Callable[..., int] = run_words,
    ) -> Command:
        """Start (or go on with) the run ``name``."""
        sources = [f"data.sources.{source}={path}" for source, path in self.stores.items()]
        self._started += 1
        return Command(
            ["train", *TINY, f"name={name}", f"runs_dir={self.folder}/runs", *sources, *words],
            self.folder / f"{self._started:02d}-{name}.log",
            ranks,
            torchrun,
            body,
        )

    def finish(self, name: str, *words: str, ranks: int = 1, code: int = 0) -> str:
        """Run to the end; returns what was printed."""
        command = self.train(name, *words, ranks=ranks)
        assert command.wait() == code, command.output
        return command.output


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return Workplace(tmp_path_factory.mktemp("resume"))


@pytest.fixture(scope="module")
def straight(place: Workplace) -> Path:
    """40 steps on two pipeline stages without a stop."""
    place.finish("straight", *PP2, ranks=2)
    return place.run("straight")


@pytest.fixture(scope="module")
def killed(place: Workplace) -> Path:
    """The same run, killed with all its ranks right after the checkpoint of step 20."""
    command, run = place.train("killed", *PP2, ranks=2), place.run("killed")
    command.until(lambda: 20 in saved_steps(run))
    command.kill()
    assert not (run / "status.json").exists()
    return run


def assert_same_state(one: Path, other: Path, step: int) -> None:
    expected, found = saved_state(one, step), saved_state(other, step)
    assert expected.keys() == found.keys()
    differing = [name for name in expected if not torch.equal(expected[name], found[name])]
    assert not differing


def worst_difference(one: Path, other: Path) -> float:
    """Largest relative difference between the losses of the steps that ``other`` has done."""
    expected = losses(one)
    return max(abs(loss / expected[step] - 1) for step, loss in losses(other).items())


def test_a_straight_run_is_done(straight: Path) -> None:
    assert status(straight) == {"code": 0, "reason": "done", "step": 40}
    assert steps(straight) == list(range(1, 41))
    assert saved_steps(straight) == [20, 40]
    assert losses(straight)[40] < losses(straight)[1]


def test_the_same_command_on_a_run_that_is_done_does_nothing(
    place: Workplace, straight: Path
) -> None:
    def times() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in straight.rglob("*")}

    before = times()
    output = place.finish("straight", *PP2, ranks=2)
    assert output.count("is done, all 40 steps of it: nothing to do") == 1
    assert times() == before


def test_two_processes_on_one_run_are_one_too_many(place: Workplace) -> None:
    first, run = place.train("busy", *LONG), place.run("busy")
    first.until(lambda: len(steps(run)) >= 1)
    output = place.finish("busy", *LONG, code=2)
    assert_one_sentence(output, f"busy is in use by process {first.pid} on ")
    first.send(signal.SIGTERM)
    assert first.wait() == 3, first.output


def test_killed_with_all_ranks_and_resumed_is_bitwise_the_same(
    place: Workplace, straight: Path, killed: Path
) -> None:
    copytree(killed, place.run("same"), symlinks=True)
    output = place.finish("same", *PP2, ranks=2)
    assert "resumed from" in output
    assert steps(place.run("same")) == list(range(1, 41))
    assert losses(place.run("same")) == losses(straight)
    assert_same_state(straight, place.run("same"), 40)


def test_resumed_on_one_rank_and_then_on_four_gives_the_same_losses(
    place: Workplace, straight: Path, killed: Path
) -> None:
    run = place.run("moved")
    copytree(killed, run, symlinks=True)
    place.finish("moved", "training.stop_at_step=30")
    assert status(run) == {"code": 0, "reason": "stop_at_step", "step": 30}
    place.finish("moved", *DP2_PP2, ranks=4)
    assert steps(run) == list(range(1, 41))
    assert worst_difference(straight, run) <= 1e-6


def test_a_preempted_launch_saves_and_the_same_command_goes_on(
    place: Workplace, straight: Path
) -> None:
    command = place.train("sharded", *DP2, ranks=2, torchrun=True)
    run = place.run("sharded")
    command.until(lambda: len(steps(run)) >= 3)
    command.send(signal.SIGTERM)
    command.wait()
    step = status(run)["step"]
    assert status(run) == {"code": 3, "reason": "preempted", "step": step}
    assert saved_steps(run)[-1] == steps(run)[-1] == step
    place.finish("sharded", *DP2, f"training.stop_at_step={step + 3}", ranks=2)
    assert steps(run) == list(range(1, step + 4))
    assert worst_difference(straight, run) <= 1e-6


def test_a_rank_that_dies_takes_the_run_down_without_a_save(place: Workplace) -> None:
    command = place.train("orphan", *PP2, *LONG, body=run_torchrun)
    run = place.run("orphan")
    command.until(lambda: len(steps(run)) >= 3 and len(command.children) == 2)
    os.kill(command.children[1], signal.SIGKILL)
    assert command.wait() != 0
    assert saved_steps(run) == []
    assert status(run)["code"] == 1


def test_alone_sigterm_saves_with_status_3_and_the_same_command_goes_on(place: Workplace) -> None:
    words = (*LONG, "monitor.wandb=offline")
    command, run = place.train("alone", *words), place.run("alone")
    command.until(lambda: len(steps(run)) >= 5)
    command.send(signal.SIGTERM)
    assert command.wait() == 3, command.output
    step = status(run)["step"]
    assert status(run) == {"code": 3, "reason": "preempted", "step": step}
    assert saved_steps(run) == [step]

    stop = f"training.stop_at_step={step + 3}"
    place.finish("alone", *words, stop)
    assert steps(run) == list(range(1, step + 4))
    place.finish("alone-straight", *LONG, stop)
    assert_same_state(place.run("alone-straight"), run, step + 3)
    assert losses(place.run("alone-straight")) == losses(run)

    tracked = sorted(path.name for path in (run / "wandb").rglob("offline-run-*"))
    assert len(tracked) == 2
    assert len({name.rsplit("-", 1)[1] for name in tracked}) == 1


def test_a_flipped_byte_falls_back_to_the_checkpoint_before_and_says_so(
    place: Workplace, straight: Path
) -> None:
    run = place.run("flipped")
    copytree(straight, run)
    damaged = run / "checkpoints" / archive.folder_name(40)
    data = next(damaged.glob("__1_*"))
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 0x04
    data.write_bytes(content)
    output = place.finish("flipped", "training.stop_at_step=23")
    said = [line for line in output.splitlines() if "is damaged" in line]
    assert len(said) == 1
    assert f"step-000000040 is damaged: {data.name} does not match its checksum" in said[0]
    assert "falling back to the one before, step-000000020" in said[0]
    assert steps(run) == list(range(1, 24))
    assert worst_difference(straight, run) <= 1e-6


def truncate(place: Workplace) -> None:
    data = next(place.stores["web"].glob("*.bin"))
    data.write_bytes(data.read_bytes()[:-2])


@pytest.fixture
def fresh(tmp_path: Path) -> Workplace:
    return Workplace(tmp_path)


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("optimizer.lrr=1", "did you mean"),
        ("training.seeed=1", "did you mean"),
        ("parallel.pp=2", "parallel.pp=2"),
        ("data.sources.web=/nowhere/web", "/nowhere/web"),
        ("tokenizer.path=/nowhere/tokenizer", "/nowhere/tokenizer"),
    ],
)
def test_wrong_words_are_one_sentence_and_status_2(
    fresh: Workplace, word: str, sentence: str
) -> None:
    assert_one_sentence(fresh.finish("wrong", word, code=2), sentence)
    assert not fresh.run("wrong").exists()


def test_a_truncated_store_is_one_sentence_and_status_2(fresh: Workplace) -> None:
    truncate(fresh)
    assert_one_sentence(fresh.finish("wrong", code=2), "part-00000.bin")


def test_wrong_words_under_torchrun_are_said_once(fresh: Workplace) -> None:
    command = fresh.train("wrong", "optimizer.lrr=1", *PP2, body=run_torchrun)
    assert command.wait() != 0
    assert command.output.count("did you mean") == 1
    errors = [line for line in command.output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1


def test_another_tokenizer_than_the_stores_is_one_sentence_and_status_2(fresh: Workplace) -> None:
    texts = [f"the {number} words of line {number * 7}" for number in range(500)]
    train_sentencepiece(texts, fresh.folder / "other", vocab_size=300)
    del fresh.stores["code"]
    words = (f"tokenizer.path={fresh.folder}/other", "model.vocab_size=512")
    output = fresh.finish("wrong", *words, code=2)
    assert_one_sentence(output, "was made with tokenizer abababab")


def assert_one_sentence(output: str, part: str) -> None:
    """The output is one error line that holds ``part``, and no traceback."""
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, output
    assert part in errors[0]
    assert "Traceback" not in output
