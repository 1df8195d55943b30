"""The command line: parsing, help, what is printed, exit statuses, and that torch stays out."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llmtrain import cli
from llmtrain.cli import COMMANDS, main
from llmtrain.config.arguments import MULTIRUN, OPTIONS, parse
from llmtrain.errors import ConfigError

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.getcwd()}


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "llmtrain", *words],
        capture_output=True, text=True, timeout=60, env={**ENVIRONMENT, **environment},
    )  # fmt: skip


def test_options_stand_anywhere_and_launchers_may_add_theirs() -> None:
    words = ["--local_rank=1", "train", "a=1", "--config-dir", "x", "-cd=y"]
    words += ["--cfg", "job", "-m", "b=2"]
    found = parse(words, COMMANDS, (*OPTIONS, MULTIRUN))
    assert (found.command, found.overrides) == ("train", ["a=1", "b=2"])
    assert found.config_dirs == [Path("x"), Path("y")]
    assert (found.show, found.multirun, found.help) == (True, True, False)
    assert found.local_rank == 1
    assert parse(["--local-rank=0", "parity"], COMMANDS, (*OPTIONS, MULTIRUN)).command == "parity"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "unknown command trian; did you mean train?"),
        (["train", "--mulirun"], "unknown option --mulirun; did you mean --multirun?"),
        (
            ["--local_rank=one", "train"],
            "unknown option --local_rank=one; use one of --cfg, --config-dir, --help, --multirun",
        ),
        (["train", "--cfg"], "--cfg needs a value; write --cfg=job"),
        (["train", "--cfg=hydra"], "--cfg=hydra is unknown; use --cfg job"),
        (["train", "--config-dir"], "--config-dir needs a value; write --config-dir=DIR"),
    ],
)
def test_a_command_line_that_cannot_be_read_is_one_sentence(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(words, COMMANDS, (*OPTIONS, MULTIRUN))
    assert str(caught.value) == message
    assert main(words) == 2
    assert capsys.readouterr().err == f"error: {message}\n"


def test_help_names_every_command_and_group(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name}" in shown and c.help in shown for name, c in COMMANDS.items())
    assert main([]) == 2
    assert capsys.readouterr().out == shown
    for name in COMMANDS:
        assert main([name, "--help"]) == 0
        assert f"usage: llmtrain {name}" in capsys.readouterr().out
    main(["train", "-h"])
    assert "experiment  demo" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"]])
def test_help_answers_within_a_second_and_without_torch(words: list[str]) -> None:
    """Processor seconds of the whole process, so that a busy machine does not count."""
    code = (
        "import sys, json, time; from llmtrain.cli import main; status = main(sys.argv[1:]);"
        "found = ['torch' in sys.modules, 'hydra' in sys.modules];"
        "print(json.dumps([status, *found, time.process_time()]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        capture_output=True, text=True, check=True, env=ENVIRONMENT,
    )  # fmt: skip
    *found, seconds = json.loads(done.stdout.splitlines()[-1])
    assert found == [0, False, False]
    assert seconds < 1.0


def test_wrong_settings_are_refused_without_torch() -> None:
    code = (
        "import sys; from llmtrain.cli import main; status = main(sys.argv[1:]);"
        "sys.exit(9 if 'torch' in sys.modules else status)"
    )
    words = ["train", "parallel.pp=2", "training.num_tokens=1e6", "data.sources.a=/nowhere"]
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, env=ENVIRONMENT
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: 2 problems\n  - parallel.pp=2 does not divide")
    assert "data.sources.a: /nowhere does not exist" in done.stderr
    assert list(Path.cwd().iterdir()) == []


def test_cfg_job_prints_every_field_and_runs_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--cfg", "job", "experiment=demo", "training.seed=7"]) == 0
    shown = capsys.readouterr().out
    assert "  seed: 7\n" in shown
    assert "  wandb_project: llmtrain\n" in shown
    assert list(Path.cwd().iterdir()) == []


def test_a_config_dir_reaches_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "long.yaml").write_text(
        "# @package _global_\ntraining:\n  num_tokens: 5e9\n"
    )
    words = ["train", "experiment=long", "--cfg=job", "--config-dir", str(tmp_path / "mine")]
    assert main(words) == 0
    assert "num_tokens: 5000000000" in capsys.readouterr().out


def test_hydras_launcher_runs_every_combination_here_and_returns_the_worst_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    seen = []

    def entry(target: str, *values: object) -> int:
        (config, *_) = values
        if target.endswith("prepare"):
            return config  # type: ignore[return-value]
        seen.append(config)
        return len(seen) - 1

    monkeypatch.setattr(cli, "_call", entry)
    words = ["hydra/launcher=basic", "experiment=demo", "optimizer.lr=1e-3,1e-4", "name=sweep"]
    status = main(["train", "-m", *words])
    assert status == 1
    assert [c.optimizer.lr for c in seen] == [1e-3, 1e-4]
    assert len({c.name for c in seen}) == 2
    assert all(c.name.startswith("sweep-") for c in seen)
    assert Path.cwd() == tmp_path
    assert [p.name for p in tmp_path.iterdir()] == ["multirun"]


def test_a_job_that_is_asked_to_stop_stops_the_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def entry(target: str, *values: object) -> object:
        if target.endswith("prepare"):
            return values[0]
        seen.append(values[0])
        return cli.STOPPED

    monkeypatch.setattr(cli, "_call", entry)
    with pytest.raises(SystemExit) as ended:
        main(["train", "-m", "hydra/launcher=basic", "experiment=demo", "optimizer.lr=1e-3,1e-4"])
    assert ended.value.code == cli.STOPPED
    assert len(seen) == 1


@pytest.mark.parametrize(("launched", "status"), [(False, cli.STOPPED), (True, 0)])
def test_a_launcher_is_not_told_to_restart_what_was_asked_to_stop(
    launched: bool, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it started one process alone."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value) if launched else monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(
        cli, "_call", lambda target, *v: v[0] if target.endswith("prepare") else cli.STOPPED
    )
    assert main(["train", "experiment=demo"]) == status


def test_what_runs_in_one_process_refuses_a_launcher(capsys: pytest.CaptureFixture[str]) -> None:
    done = run("report", "run=x", RANK="0", WORLD_SIZE="2")
    assert done.returncode == 2
    assert done.stderr == (
        "error: llmtrain report runs in one process, started were 2; leave torchrun out\n"
    )


def test_a_rank_heeds_sigterm_though_its_launcher_is_shielded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RANK", "0")
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        assert main(["--help"]) == 0
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)
