"""A bit that flips in one replica is found, named and undone."""

import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from llmtrain import json_lines
from llmtrain.engine.native import NativeEngine
from tests.end_to_end.commands import (
    TINY,
    Command,
    losses,
    make_store,
    run_words,
    saved_state,
    saved_steps,
    status,
    steps,
)

EVERY = 5
FLIPPED_AT = 8
LAST = 20


def flip_once(place: object, words: list[str], log: str, environment: dict[str, str]) -> int:
    """Be a rank of which, if it is the second, one bit of a parameter flips after a step."""
    train_step, steps_done = NativeEngine.train_step, 0

    def flipping(engine: NativeEngine, *given: Any) -> Any:
        nonlocal steps_done
        result = train_step(engine, *given)
        steps_done += 1
        if steps_done == FLIPPED_AT and environment["RANK"] == "1":
            with torch.no_grad():
                engine._local.parameters[-1].local.view(-1).view(torch.int32)[3] ^= 1
        return result

    NativeEngine.train_step = flipping  # type: ignore[method-assign]
    return run_words(place, words, log, environment)


def train(folder: Path, name: str, *words: str, flipped: bool = True) -> int:
    command = Command(
        [
            "train", *TINY, f"name={name}", f"runs_dir={folder}",
            f"data.sources.web={folder}/store", f"training.num_tokens={256 * LAST}",
            "parallel.dp_replicate=2", "parallel.dp_shard=1", f"checkpoint.every_steps={EVERY}",
            *words,
        ],
        folder / f"{name}.log", ranks=2, body=flip_once if flipped else None,
    )  # fmt: skip
    return command.wait()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recheck")
    make_store(folder / "store", seed=0)
    return folder


def test_a_flipped_bit_is_named_and_its_steps_are_made_again(folder: Path) -> None:
    assert train(folder, "calm", flipped=False) == 0
    words = (f"guard.recheck_every_steps={EVERY}", "guard.on_corruption=rollback")
    assert train(folder, "flipped", *words) == 0
    run = folder / "flipped"
    found, back = (
        one for one in json_lines.read(run / "events.jsonl")
        if one["kind"] in ("corruption", "rollback")
    )  # fmt: skip
    host = socket.gethostname()
    assert found["step"] == 2 * EVERY
    assert found["text"].startswith(
        f"step 10: rank 0 on {host} and rank 1 on {host} differ among themselves in the bits of "
    )
    assert (back["to_step"], back["reached"]) == (EVERY, 2 * EVERY)
    expected, state = saved_state(folder / "calm", LAST), saved_state(run, LAST)
    assert [name for name in expected if not torch.equal(expected[name], state[name])] == []
    assert steps(run) == list(range(1, LAST + 1))
    assert losses(run) == losses(folder / "calm")


def test_a_run_that_stops_leaves_no_doubtful_checkpoint(folder: Path) -> None:
    """Saved at step 10, looked at at step 12: what it goes on from was saved before step 6."""
    assert train(folder, "stopped", "guard.recheck_every_steps=6") == 0  # under a launcher
    run = folder / "stopped"
    assert status(run) == {"code": 4, "reason": "corrupted", "step": 12}
    assert saved_steps(run) == [EVERY]
    last = json_lines.read(run / "events.jsonl")[-1]
    assert last["kind"] == "failed"
    assert "checkpoints after step 6 were set aside" in last["text"]
