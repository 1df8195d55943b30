"""A sweep of quick trials: the real command, processes and signals around a loop without torch."""

import stat
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.end_to_end.commands import TINY, make_store

TRAINER = '''\
"""Stands in for the interpreter of a trial: rows of a loss that the learning rate decides."""
import fcntl, json, math, os, signal, sys, time
from pathlib import Path

words = dict(w.lstrip("+").partition("=")[::2] for w in sys.argv[4:] if not w.startswith("-"))
plain = {key: value.strip('"') for key, value in words.items()}
run = Path(plain["runs_dir"]) / plain["name"]
run.mkdir(parents=True, exist_ok=True)
lock = (run / ".lock").open("a+")
fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
(run / "status.json").unlink(missing_ok=True)
(run / "starts").open("a").write(f"{time.time()}\\\\n")
(run / "place").write_text(json.dumps(sorted(os.sched_getaffinity(0))))
asked = []
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
    signal.signal(number, lambda *_: asked.append(1))
(run / "config.yaml").write_text("evaluation: {every_steps: null}\\\\ndata: {validation: {}}\\\\n")
lr, num_steps = float(plain["optimizer.lr"]), 40
pause = float(plain.get("model.rope_theta", "0")) / 1e6
rows = run / "metrics.jsonl"
step = len(rows.read_text().splitlines()) if rows.exists() else 0

def leave(code, reason):
    (run / "status.json").write_text(json.dumps({"code": code, "reason": reason, "step": step}))
    sys.exit(code)

if lr == 0.5 and len((run / "starts").read_text().splitlines()) < 2:
    leave(1, "failed")
if lr == 0.25 and len((run / "starts").read_text().splitlines()) < 2:
    os.kill(os.getpid(), signal.SIGKILL)
while step < num_steps:
    step += 1
    loss = None if lr > 0.9 else 2 + abs(math.log10(lr) + 2) + math.exp(-step / 10)
    with rows.open("a") as file:
        file.write(json.dumps({"step": step, "num_steps": num_steps, "loss": loss}) + "\\\\n")
    time.sleep(pause)
    if asked:
        leave(3, "preempted")
leave(0, "done")
'''.replace("\\\\n", "\\n")
"""Options: lr above 0.9 gives no number, 0.5 fails once, 0.25 is killed once."""


@pytest.fixture
def words(tmp_path: Path) -> Callable[..., list[str]]:
    """The words of a sweep of quick trials; ``pause`` is the seconds of a step."""
    trainer = tmp_path / "python"
    trainer.write_text(f"#!{sys.executable}\n{TRAINER}")
    trainer.chmod(trainer.stat().st_mode | stat.S_IXUSR)
    store = make_store(tmp_path / "store", 1, num_documents=5)

    def made(*more: str, pause: float = 0.0) -> list[str]:
        return [
            *TINY, f"data.sources.a={store}", f"runs_dir={tmp_path / 'runs'}", "name=lr",
            f"model.rope_theta={max(1, round(1e6 * pause))}", f"cluster.python={trainer}", *more,
        ]  # fmt: skip

    return made
