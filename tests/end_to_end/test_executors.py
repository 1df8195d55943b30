"""Local processes, a real Ray and a real Slurm: every task once, the same bytes, whoever dies."""

import hashlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import pytest

from benchmarks.processes import workers_of
from data_pipeline.cli import main
from data_pipeline.config.execute import RayConfig, SlurmConfig
from data_pipeline.execute.local import Executor, Task
from llmtrain.errors import ConfigError, DataError
from tests.crawl import write_crawl
from tests.slurm_cluster import PACKAGES, SlurmCluster, missing_programs

ray = pytest.importorskip("ray", reason="pip install 'llmtrain[ray]'")
pytest.importorskip("submitit", reason="pip install 'llmtrain[slurm]'")

from data_pipeline.execute.on_ray import RayExecutor  # noqa: E402
from data_pipeline.execute.on_slurm import SlurmExecutor  # noqa: E402

needs_slurm = pytest.mark.skipif(bool(missing_programs()), reason=PACKAGES)
REMOTE = ["ray", pytest.param("slurm", marks=needs_slurm)]
SETTINGS = [
    "pipeline=demo", "pipeline.stages=[url,line_dedup,minhash]",
    "pipeline.extract.shard_bytes=50000", "pipeline.tokenizer.vocab_size=400",
    "pipeline.split.validation_share=0.1", "pipeline.store.part_bytes=30000",
]  # fmt: skip
Opener = Callable[..., AbstractContextManager[Executor]]


@pytest.fixture(scope="module")
def ray_address() -> Iterator[str]:
    """A local cluster with two cores, for all tests of this file."""
    ray.init(
        "local", num_cpus=2, object_store_memory=100 << 20, include_dashboard=False,
        log_to_driver=False, configure_logging=False,
    )  # fmt: skip
    yield str(ray.get_runtime_context().gcs_address)
    ray.shutdown()


@pytest.fixture
def options(request: pytest.FixtureRequest, executor: str) -> list[str]:
    """What a command line needs to use the cluster of an executor."""
    if executor == "ray":
        address = request.getfixturevalue("ray_address")
        return ["executor=ray", f"ray.address={address}"]
    if executor == "slurm":
        request.getfixturevalue("cluster")
        return ["executor=slurm", "slurm.poll_s=0.3", "slurm.hours=0.1", "time_limit_s=60"]
    return ["executor=local"]


@pytest.fixture
def opener(options: list[str], executor: str, tmp_path: Path) -> Opener:
    """What opens an executor with two workers and a time limit."""

    def start(time_limit_s: float = 30.0) -> AbstractContextManager[Executor]:
        if executor == "ray":
            return RayExecutor(RayConfig(), 2, time_limit_s)
        config = SlurmConfig(poll_s=0.3, hours=0.1, idle_s=20)
        return SlurmExecutor(config, tmp_path / ".slurm", 2, time_limit_s)

    return start


def square(x: int) -> int:
    return x * x


def die_once(folder: str, name: str) -> str:
    """Kill the own process in the first attempt."""
    marker = Path(folder) / name
    if not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return name


def refuse(folder: str) -> None:
    with (Path(folder) / "refusals").open("a") as file:
        file.write("x")
    raise DataError("the input is wrong")


def sleep_once(folder: str) -> str:
    marker = Path(folder) / "slept"
    if not marker.exists():
        marker.touch()
        time.sleep(600)
    return "awake"


def collect(executor: Executor, tasks: list[Task]) -> dict[str, Any]:
    results: dict[str, Any] = {}
    executor.run(tasks, lambda task, value: results.__setitem__(task.key, value))
    return results


@pytest.mark.parametrize("executor", REMOTE)
def test_tasks_run_once_with_success_whatever_happens(opener: Opener, tmp_path: Path) -> None:
    folder = str(tmp_path)
    with opener() as live:
        tasks = [Task(str(i), square, {"x": i}, cost=i) for i in range(9)]
        tasks += [Task(f"d{i}", die_once, {"folder": folder, "name": f"d{i}"}) for i in range(2)]
        expected = {str(i): i * i for i in range(9)} | {"d0": "d0", "d1": "d1"}
        assert collect(live, tasks) == expected
        with pytest.raises(DataError, match="the input is wrong"):
            collect(live, [Task("wrong", refuse, {"folder": folder})])
        assert (tmp_path / "refusals").read_text() == "x"
        assert collect(live, tasks[:2]) == {"0": 0, "1": 1}


@pytest.mark.parametrize("executor", REMOTE)
def test_late_task_is_tried_again(opener: Opener, tmp_path: Path) -> None:
    with opener(time_limit_s=1.0) as live:
        task = Task("late", sleep_once, {"folder": str(tmp_path)})
        assert collect(live, [task]) == {"late": "awake"}


def name_of_node(folder: str) -> str:
    """Wait to be killed on the first node."""
    node = os.environ["SLURMD_NODENAME"]
    first = Path(folder) / "node"
    if not first.exists():
        first.write_text(node)
        time.sleep(600)
    return node


@needs_slurm
def test_task_of_a_node_that_fails_runs_elsewhere(cluster: SlurmCluster, tmp_path: Path) -> None:
    def fail_the_node() -> None:
        while not (tmp_path / "node").exists() or not (tmp_path / "node").read_text():
            time.sleep(0.05)
        cluster.kill_node((tmp_path / "node").read_text())

    config = SlurmConfig(poll_s=0.3, hours=0.1, idle_s=20)
    with SlurmExecutor(config, tmp_path / ".slurm", 1, 30.0) as live:
        killer = threading.Thread(target=fail_the_node, daemon=True)
        killer.start()
        results = collect(live, [Task("t", name_of_node, {"folder": str(tmp_path)})])
        killer.join()
    failed = (tmp_path / "node").read_text()
    assert {failed, results["t"]} == set(cluster.names)
    cluster.start_node(failed)


@needs_slurm
def test_workers_are_elements_of_one_job_array(cluster: SlurmCluster, tmp_path: Path) -> None:
    config = SlurmConfig(poll_s=0.3, hours=0.1, idle_s=20)
    with SlurmExecutor(config, tmp_path / ".slurm", 2, 30.0) as live:
        assert collect(live, [Task(str(i), square, {"x": i}) for i in range(2)]) == {"0": 0, "1": 1}
        (script,) = live.queue.folder.glob("jobs/*submission.sh")
        assert "#SBATCH --array=0-1%2" in script.read_text()


@needs_slurm
def test_what_slurm_refuses_is_one_sentence(cluster: SlurmCluster, tmp_path: Path) -> None:
    config = SlurmConfig(partition="nowhere")
    with (
        SlurmExecutor(config, tmp_path / ".slurm", 1) as live,
        pytest.raises(ConfigError, match=r"Slurm refuses the jobs: .*slurm\.partition=nowhere"),
    ):
        live.run([Task("t", square, {"x": 1})], lambda *_: None)


def configure(crawl: dict[str, str], out: Path) -> list[str]:
    inputs = [f"input.{name}={path}" for name, path in crawl.items()]
    return ["run", *SETTINGS, *inputs, f"out={out}"]


def digests(out: Path) -> dict[str, str]:
    """Digest of every file that is not about time or place, below a pipeline's folder."""
    aside = {"timing.json", "funnel.json", "inputs.json", "report.html", ".lock"}
    files = [p for p in out.rglob("*") if p.is_file() and p.name not in aside]
    return {
        str(p.relative_to(out)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in files
        if ".slurm" not in p.parts
    }


@pytest.mark.parametrize(
    ("executor", "package", "extras"),
    [("ray", "ray", "data,ray"), ("slurm", "submitit", "data,slurm")],
)
def test_missing_package_is_named_with_its_command(
    executor: str, package: str, extras: str, crawl: dict[str, str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"data_pipeline.execute.on_{executor}", raising=False)
    assert main([*configure(crawl, tmp_path / "out"), f"executor={executor}"]) == 2
    said = capsys.readouterr().err
    assert f"needs the package {package}, which is not installed" in said
    assert f"run: pip install 'llmtrain[{extras}]'" in said


def test_machine_without_slurm(
    crawl: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main([*configure(crawl, tmp_path / "out"), "executor=slurm"]) == 2
    assert "executor=slurm needs sbatch, srun, squeue, scancel" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def crawl(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_crawl(tmp_path_factory.mktemp("crawl"), pages_per_file=30)


@pytest.fixture(scope="module")
def reference(crawl: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Digests of a run by one local worker."""
    out = tmp_path_factory.mktemp("one") / "out"
    assert main(configure(crawl, out)) == 0
    return digests(out)


@pytest.mark.parametrize(("executor", "num_workers"), [("local", 4), ("ray", 2)])
def test_same_bytes(
    options: list[str], num_workers: int, crawl: dict[str, str], reference: dict[str, str],
    tmp_path: Path,
) -> None:  # fmt: skip
    command = configure(crawl, tmp_path / "out")
    assert main([*command, *options, f"num_workers={num_workers}"]) == 0
    assert digests(tmp_path / "out") == reference


@pytest.mark.parametrize(
    ("executor", "kills"),
    [("local", 3), ("ray", 3), pytest.param("slurm", 3, marks=needs_slurm)],
)
def test_same_bytes_after_random_kills(
    options: list[str], executor: str, kills: int, crawl: dict[str, str],
    reference: dict[str, str], tmp_path: Path,
) -> None:  # fmt: skip
    """Kill -9 workers and the driver at random moments; each dead driver is followed by another."""
    rng = random.Random(executor)
    command = [sys.executable, "-m", "data_pipeline", *configure(crawl, tmp_path / "out")]
    driver: subprocess.Popen[str] | None = None
    victims = ["worker", "worker", "driver"] * (kills // 3)
    while True:
        if driver is None:
            driver = subprocess.Popen(
                [*command, *options, "num_workers=2"], stderr=subprocess.PIPE, text=True
            )
        if victims and kill(victims[-1], driver, executor, rng):
            victims.pop()
        if driver.poll() is None and victims:
            continue
        _, messages = driver.communicate(timeout=60)
        if driver.returncode == 0:
            break
        assert driver.returncode == -signal.SIGKILL or "failed 3 times" in messages, messages
        driver = None
    assert len(victims) <= kills - 2  # the driver, and a worker of the one that followed
    assert digests(tmp_path / "out") == reference


def kill(victim: str, driver: "subprocess.Popen[str]", executor: str, rng: random.Random) -> bool:
    """Wait for workers and a random moment, then kill one of them or the driver."""
    delay = rng.uniform(0.0, 0.4)
    while driver.poll() is None:
        if workers_of(driver.pid, executor):
            time.sleep(delay)
            workers = workers_of(driver.pid, executor)
            with suppress(IndexError, ProcessLookupError):  # they have left in the meantime
                os.kill(driver.pid if victim == "driver" else rng.choice(workers), signal.SIGKILL)
                return True
        time.sleep(0.005)
    return False
