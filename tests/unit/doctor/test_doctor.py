"""What the doctor finds: each verdict from a machine with the fault, and that it never fails."""

import errno
import json
import os
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from llmtrain.cli import main
from llmtrain.config.doctor import DoctorConfig
from llmtrain.doctor import command, gpus, machine, network, software, storage
from llmtrain.doctor.finding import Finding, Question, ask

GIB = 1024**3
TOPOLOGY = """\
\x1b[4m\tGPU0\tGPU1\tGPU2\tmlx5_0\tCPU Affinity\x1b[0m
GPU0\t X \tNV18\tSYS\tPIX\t0-31
GPU1\tNV18\t X \tSYS\tSYS\t0-31
GPU2\tSYS\tSYS\t X \tSYS\t32-63
mlx5_0\tPIX\tSYS\tSYS\t X
"""


def smi(folder: Path, rows: list[str], topology: str = "", before: str = "") -> None:
    """An nvidia-smi that prints what the real one would."""
    (folder / "rows").write_text("".join(f"{row}\n" for row in rows))
    (folder / "topo").write_text(topology)
    program = folder / "nvidia-smi"
    program.write_text(
        f'#!/bin/sh\n{before}\ncase $1 in --query*) cat "{folder}/rows";; '
        f'topo) cat "{folder}/topo";; esac\n'
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in front of PATH."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tmp_path


def h200(
    index: int, used: int = 4, mig: str = "Disabled", errors: str = "0", heat: int = 40
) -> str:
    return f"{index}, NVIDIA H200, 143771, {used}, 580.95.05, {mig}, {errors}, {heat}"


def test_gpus_are_read_and_judged(path: Path) -> None:
    rows = [h200(0), h200(1, used=9000), h200(2, mig="Enabled"), h200(3, errors="2")]
    smi(path, [*rows, h200(4, heat=90), h200(5, errors="[N/A]")])
    found = gpus.listed(10)
    assert found[0].memory_bytes == 143771 * 1024**2
    lines = list(gpus.described(found))
    assert [line.verdict for line in lines] == ["ok", "warn", "warn", "bad", "warn", "ok"]
    assert lines[0] == Finding(name="GPU 0", value="NVIDIA H200, 140.4 GiB, 40 °C")
    assert "8.8 GiB in use" in lines[1].value
    assert "2 uncorrected memory errors" in lines[3].value
    assert [line.value for line in gpus.driver(found)] == ["580.95.05"]


def test_a_slow_kind_among_the_gpus_is_named(path: Path) -> None:
    smi(path, [h200(0), "1, Tesla T4, 15360, 4, 580.95.05, [N/A], 0, 40"])
    *_, last = gpus.described(gpus.listed(10))
    assert (last.verdict, last.value) == ("warn", "1 x NVIDIA H200, 1 x Tesla T4")


def test_pairs_without_nvlink_are_counted(path: Path) -> None:
    smi(path, [h200(0), h200(1), h200(2)], TOPOLOGY)
    assert gpus.links_of(TOPOLOGY) == ["NV18", "SYS", "SYS"]
    (line,) = gpus.topology(gpus.listed(10), 10)
    assert line.verdict == "warn"
    assert line.value == "2 pairs across NUMA nodes (SYS), 1 pairs by NVLink (NV18)"
    assert list(gpus.topology(gpus.listed(10)[:2], 10)) != []
    assert list(gpus.topology(gpus.listed(10)[:1], 10)) == []


def test_a_driver_that_fails_or_hangs_is_a_line(path: Path) -> None:
    smi(path, [], before="echo 'No devices were found'; exit 6")
    ((_, line), *_) = command.examine(DoctorConfig(quick=True, runs_dir=str(path)))
    assert line.verdict == "warn"
    assert "No devices were found" in line.value
    smi(path, [], before="exec sleep 30")
    start = time.monotonic()
    with pytest.raises(subprocess.TimeoutExpired):
        gpus.listed(0.2)
    assert time.monotonic() - start < 10


def test_a_question_that_raises_or_hangs_leaves_the_others() -> None:
    def raises() -> Iterator[Finding]:
        yield Finding(name="first", value="known")
        raise KeyError("second")

    def hangs() -> Iterator[Finding]:
        time.sleep(5)
        yield Finding(name="late", value="")

    asked = [Question("a", "breaks", raises), Question("b", "hangs", hangs)]
    asked += [Question("c", "works", lambda: [Finding(name="works", value="yes")])]
    found = ask(asked, timeout_s=0.2)
    assert [(section, f.name, f.verdict) for section, f in found] == [
        ("a", "first", "ok"), ("a", "breaks", "warn"), ("b", "hangs", "warn"), ("c", "works", "ok"),
    ]  # fmt: skip
    assert found[1][1].value == "could not be found out (KeyError: 'second')"
    assert found[2][1].value == "no answer within 0.2 s"


def test_a_verdict_says_what_to_do() -> None:
    with pytest.raises(ValueError, match="x is bad, its advice is ''"):
        Finding(name="x", value="", verdict="bad")


def test_cores_and_memory_are_measured_against_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.setattr(machine.os, "cpu_count", lambda: 96)
    content = {
        "/proc/meminfo": "MemTotal: 1048576 kB\nMemAvailable: 1048576 kB\n",
        "/sys/fs/cgroup/cpu.max": "1600000 100000",
    }
    monkeypatch.setattr(machine, "_read", lambda path: content.get(path, ""))
    (line,) = machine.cores(num_gpus=8)
    assert (line.verdict, line.value) == ("warn", "16 cores of 96")
    assert next(iter(machine.cores(num_gpus=4))).verdict == "ok"
    (line,) = machine.memory(gpu_bytes=0)
    assert (line.verdict, line.value) == ("warn", "1.0 GiB free of 1.0")
    content["/proc/meminfo"] = "MemTotal: 104857600 kB\nMemAvailable: 104857600 kB\n"
    assert "640 GiB of the GPUs" in next(iter(machine.memory(640 * GIB))).advice
    content |= {
        "/sys/fs/cgroup/memory.max": str(8 * GIB),
        "/sys/fs/cgroup/memory.current": str(GIB),
    }
    (line,) = machine.memory(gpu_bytes=0)
    assert (line.verdict, line.value) == ("ok", "7.0 GiB free of 8.0")


def test_limits_that_training_runs_into(monkeypatch: pytest.MonkeyPatch) -> None:
    resource = machine.resource
    have = {
        resource.RLIMIT_NOFILE: (1024, 1024),
        resource.RLIMIT_NPROC: (resource.RLIM_INFINITY, resource.RLIM_INFINITY),
        resource.RLIMIT_MEMLOCK: (65536, 65536),
    }
    monkeypatch.setattr(resource, "getrlimit", have.__getitem__)
    files, processes, locked = machine.limits(infiniband=True)
    assert (files.verdict, processes.verdict, locked.verdict) == ("warn", "ok", "bad")
    assert "limits.conf" in files.advice
    have[resource.RLIMIT_NOFILE] = (1024, 65536)
    files, _, locked = machine.limits(infiniband=False)
    assert "ulimit -n 4096" in files.advice
    assert locked.verdict == "ok"


def test_a_small_shared_memory_and_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert next(iter(storage.shared_memory(tmp_path / "none"))).verdict == "bad"
    monkeypatch.setattr(storage, "_space", lambda _: (64 * 1024**2, 64 * 1024**2))
    (line,) = storage.shared_memory(tmp_path)
    assert (line.verdict, line.value) == ("warn", "0.06 GiB free of 0.06")
    assert "--shm-size" in line.advice


def test_the_disk_is_tried_and_left_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "_SLOW_BYTES_PER_S", 0.0)
    monkeypatch.setattr(storage, "_SLOW_SYNC_S", 1e9)
    monkeypatch.setattr(storage, "_LITTLE_BYTES", 0)
    monkeypatch.chdir(tmp_path)
    found = list(storage.disk(Path("a/b")))
    assert [f.verdict for f in found] == ["ok", "ok", "ok"]
    assert "to be made in" in found[0].value
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(storage, "_SLOW_BYTES_PER_S", 1e15)
    monkeypatch.setattr(storage, "_LITTLE_BYTES", GIB)
    monkeypatch.setattr(storage, "_space", lambda _: (GIB, GIB // 2))
    assert [f.verdict for f in storage.disk(tmp_path)] == ["bad", "warn", "ok"]

    def full(**_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(storage.tempfile, "NamedTemporaryFile", full)
    assert [f.verdict for f in storage.disk(tmp_path)] == ["bad", "bad"]


def test_infiniband_ports_are_listed(tmp_path: Path) -> None:
    for name, state in (("mlx5_0", "4: ACTIVE"), ("mlx5_1", "1: DOWN")):
        port = tmp_path / name / "ports" / "1"
        port.mkdir(parents=True)
        (port / "state").write_text(f"{state}\n")
        (port / "rate").write_text("400 Gb/sec (4X NDR)\n")
        (port / "link_layer").write_text("InfiniBand\n")
    active, down = network.infiniband(tmp_path)
    assert (active.verdict, down.verdict) == ("ok", "warn")
    assert active.value == "InfiniBand, 400 Gb/sec (4X NDR), 4: ACTIVE"
    assert "NCCL_IB_HCA=^mlx5_1" in down.advice
    assert [f.verdict for f in network.infiniband(tmp_path / "none")] == ["ok"]


def test_a_name_without_an_address_is_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "nobody.invalid")
    (line,) = network.hostname()
    assert (line.verdict, "/etc/hosts" in line.advice) == ("bad", True)


def test_a_taken_port_is_noticed() -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        assert network.taken(port) == "Address already in use"
    assert network.taken(port) is None


def test_versions_are_held_against_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    have = {"torch": "2.10.0", "deepspeed": "0.18.4", "numpy": "2.1"}

    def version(name: str) -> str:
        if name == "wandb":
            raise PackageNotFoundError(name)
        return have.get(name, "1000")

    monkeypatch.setattr(software, "version", version)
    found = {f.name: f for f in software.versions()}
    assert found["torch"].verdict == "bad"
    assert found["torch"].value.startswith("2.10.0, supported is >=2.")
    assert found["torch"].advice.startswith("pip install 'torch>=")
    assert found["deepspeed"].verdict == "warn"
    assert found["wandb"].value == "not installed, optional: pip install 'llmtrain[wandb]'"
    assert found["wandb"].verdict == "ok"
    assert found["hydra-core"].verdict == "bad"
    assert "numpy" not in found


def test_requirements_of_an_installation_are_those_of_the_checkout(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    of_checkout = software.requirements()
    lines = [
        f'{each.name}{each.specifier}; extra == "{extra}"' if extra else str(each)
        for pairs in of_checkout.values()
        for extra, each in pairs
    ]
    monkeypatch.setattr(software.llmtrain, "__file__", str(tmp_path / "llmtrain" / "__init__.py"))
    monkeypatch.setattr(software, "requires", lambda _: [*lines, 'pytest>=9; extra == "dev"'])
    found = software.requirements()
    assert {n: [e for e, _ in p] for n, p in found.items()} == {
        n: [e for e, _ in p] for n, p in of_checkout.items()
    }


def test_json_says_what_the_table_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["doctor", "quick=true", f"runs_dir={tmp_path}"]
    status = main([*words, "json=true"])
    whole = json.loads(capsys.readouterr().out)
    assert status == (1 if whole["verdict"] == "bad" else 0)
    assert main(words) == status
    table = capsys.readouterr().out
    assert all(f"{each['verdict']:<5} {each['name']}" in table for each in whole["findings"])
    assert {"packages", "machine", "network", "GPUs"} == {f["section"] for f in whole["findings"]}


def test_something_bad_fails_and_a_warning_does_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for verdict, status in (("warn", 0), ("bad", 1)):
        finding = Finding(name="x", value="y", verdict=verdict, advice="do z")  # type: ignore[arg-type]
        found = [("a", finding), ("a", Finding(name="w", value=""))]
        monkeypatch.setattr(command, "examine", lambda _, found=found: found)
        assert main(["doctor"]) == status
        assert "-> do z" in capsys.readouterr().out


def test_the_quick_form_takes_less_than_a_second_and_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys, json, time; from llmtrain.cli import main; main(sys.argv[1:]);"
        "print(json.dumps(['torch' in sys.modules, time.process_time()]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "doctor", "quick=true", f"runs_dir={tmp_path}"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    with_torch, seconds = json.loads(done.stdout.splitlines()[-1])
    assert not with_torch
    assert seconds < 1.0


def test_torch_is_asked_for_everything_it_can_do() -> None:
    found = {f.name: f for _, f in command.examine(DoctorConfig(timeout_s=60))}
    assert {"CUDA", "NCCL", "fp8", "torch.compile", "attention sdpa"} <= set(found)
    assert [f.value for f in found.values() if "could not be found out" in f.value] == []
