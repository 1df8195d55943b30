"""Two ranks started as a launcher starts them: who speaks and how they end."""

import os
import subprocess
import sys

from tests.ports import free_ports

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.getcwd()}


def launch(*words: str) -> list[tuple[int, str]]:
    """Start two ranks as a launcher does; give exit status and stderr of each."""
    (port,) = free_ports(1)
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "llmtrain", *words],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**ENVIRONMENT, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                 "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)},
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        return [(p.wait(120), p.communicate()[1]) for p in ranks]
    finally:
        for process in ranks:
            process.kill()


def test_a_wrong_setting_ends_every_rank_and_rank_0_alone_says_it() -> None:
    (first, said), (second, silent) = launch("train", "modle.hidden_size=3", "parallel.pp=3")
    assert (first, second) == (2, 2)
    assert "unknown key modle.hidden_size; did you mean model.hidden_size?" in said
    assert silent == ""


def test_an_unknown_option_ends_every_rank_and_rank_0_alone_says_it() -> None:
    (first, said), (second, silent) = launch("train", "--nope")
    assert (first, second) == (2, 2)
    assert said.startswith("error: unknown option --nope")
    assert silent == ""
