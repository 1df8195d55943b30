"""The sweep.yaml of docs/sweeps.md, filled in by W&B's own agent code."""

import os
import re
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import yaml

DOCS = Path(__file__).parents[3] / "docs" / "sweeps.md"


def sweep_yaml() -> dict[str, object]:
    block = re.search(r"^    program: llmtrain\n(    .*\n|\n)*?(?=\n    wandb sweep)",
                      DOCS.read_text(), re.MULTILINE)  # fmt: skip
    assert block is not None
    found: dict[str, object] = yaml.safe_load(textwrap.dedent(block[0]))
    return found


def test_the_agents_command_is_a_training_command_line(tmp_path: Path) -> None:
    utils = pytest.importorskip("wandb.sdk.launch.sweeps.utils", reason="pip install wandb")
    config = sweep_yaml()
    chosen = {"optimizer.lr": 0.00123, "training.global_batch_tokens": 524288}
    assert set(chosen) == set(config["parameters"])  # type: ignore[call-overload]
    macros = utils.create_sweep_command_args({"args": {n: {"value": v} for n, v in chosen.items()}})
    macros["program"] = [config["program"]]
    words: list[str] = []
    for word in utils.create_sweep_command(list(config["command"])):  # type: ignore[call-overload]
        words += macros[word[2:-1]] if word.startswith("${") else [word]

    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "mine.yaml").write_text(
        "# @package _global_\ntraining: {num_tokens: 1e9}\n"
    )
    shown = tmp_path / "llmtrain"
    shown.write_text(
        f'#!/bin/sh\nexec {sys.executable} -m llmtrain "$@" --cfg job --config-dir {tmp_path}/mine'
    )
    shown.chmod(shown.stat().st_mode | stat.S_IXUSR)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "WANDB_RUN_ID": "r1"}
    done = subprocess.run(
        words, env=environment, cwd=DOCS.parents[1], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = yaml.safe_load(done.stdout)
    assert found["name"] == "agents/r1"
    assert found["optimizer"]["lr"] == chosen["optimizer.lr"]
    assert found["training"]["global_batch_tokens"] == chosen["training.global_batch_tokens"]


def test_a_run_takes_the_id_its_agent_gave(tmp_path: Path) -> None:
    """In a process of its own, as an agent starts it: wandb reads its environment once."""
    pytest.importorskip("wandb", reason="pip install wandb")
    code = textwrap.dedent(f"""
        from pathlib import Path
        from llmtrain.config.training import MonitorConfig
        from llmtrain.run.directory import RunDirectory
        from llmtrain.train.tracker import wandb_sink
        run = RunDirectory(Path({str(tmp_path / "run")!r}))
        with wandb_sink(MonitorConfig(wandb="offline"), run, {{}}) as tracker:
            print(tracker._run.id, run.read_record()["wandb_id"])
    """)
    environment = {**os.environ, "WANDB_RUN_ID": "abc12345"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["abc12345", "abc12345"], done.stderr
