"""Two hosts with addresses of their own: torchrun and DeepSpeed train to one host's losses."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.end_to_end import commands
from tests.namespaces import ADDRESSES, INTERFACE, Hosts, missing

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

LAUNCH = [
    sys.executable, "-m", "llmtrain", "launch", "cluster=cpu", *commands.TINY,
    f"cluster.environment.GLOO_SOCKET_IFNAME={INTERFACE}",
]  # fmt: skip
STEPS = ["training.num_tokens=512", "parallel.pp=2"]
"""Two steps of two pipeline stages: the second has felt the first update."""


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    with Hosts(tmp_path_factory.mktemp("hosts")) as hosts:
        yield hosts


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The training command, the same for everyone."""
    folder = tmp_path_factory.mktemp("runs")
    return [*STEPS, f"data.sources.a={commands.make_store(folder / 'store', 1)}",
            f"runs_dir={folder}"]  # fmt: skip


@pytest.fixture(scope="module")
def one_host(words: list[str]) -> dict[int, float]:
    """Losses of the same command on this machine alone."""
    log = Path(words[-1].partition("=")[2]) / "one.log"
    command = commands.Command(["train", *commands.TINY, *words, "name=one"], log, ranks=2)
    assert command.wait() == 0, command.output
    return commands.losses(log.parent / "one")


def run_of(words: list[str], name: str) -> Path:
    return Path(words[-1].partition("=")[2]) / name


def test_torchrun_over_two_hosts(
    hosts: Hosts, words: list[str], one_host: dict[int, float]
) -> None:
    target = ["target=torchrun", "cluster.num_nodes=2", f"launch.head={ADDRESSES[0]}:29400"]
    nodes = [
        subprocess.Popen(
            hosts.command(node, [*LAUNCH, *target, f"launch.node={node}",
                                 f"launch.address={ADDRESSES[node]}", *words, "name=torchrun"]),
            cwd=commands.REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for node in range(2)
    ]  # fmt: skip
    said = [node.communicate(timeout=200)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert commands.losses(run_of(words, "torchrun")) == one_host


def test_deepspeed_over_a_hostfile(
    hosts: Hosts, words: list[str], one_host: dict[int, float]
) -> None:
    pytest.importorskip("deepspeed", reason="pip install 'llmtrain[deepspeed]'")
    file = hosts.ssh.with_name("hostfile")
    file.write_text("".join(f"{address} slots=1\n" for address in ADDRESSES))
    target = ["target=deepspeed", f"launch.hostfile={file}", f"launch.ssh={hosts.ssh}"]
    done = subprocess.run(
        [*LAUNCH, *target, *words, "name=deepspeed"], cwd=commands.REPOSITORY,
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 hosts are ready" in done.stderr
    assert commands.losses(run_of(words, "deepspeed")) == one_host


def test_a_host_that_is_not_ready_names_itself(hosts: Hosts, words: list[str]) -> None:
    file = hosts.ssh.with_name("wrong")
    file.write_text(f"{ADDRESSES[0]} slots=1\n10.77.0.9 slots=1\n")
    target = ["target=deepspeed", f"launch.hostfile={file}", f"launch.ssh={hosts.ssh}"]
    done = subprocess.run(
        [*LAUNCH, *target, *words, "name=wrong"], cwd=commands.REPOSITORY,
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: 10.77.0.9: cannot be looked at, status 255"), done.stderr
    assert not run_of(words, "wrong").exists()
