"""The NVIDIA GPUs of this machine as nvidia-smi tells of them, without torch.

gpus = listed(timeout_s=10)        # empty where there is no driver
for finding in described(gpus): ...
"""

import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from llmtrain.doctor.finding import Finding

MIB = 1024**2

_FIELDS = (
    "index", "name", "memory.total", "memory.used", "driver_version", "mig.mode.current",
    "ecc.errors.uncorrected.volatile.total", "temperature.gpu",
)  # fmt: skip
_BUSY = 0.02
"""Share of a GPU's memory that the driver itself may hold."""
_HOT_CELSIUS = 85


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU."""

    index: int
    """Its number."""
    name: str
    """Its product name."""
    memory_bytes: int
    """Memory in all."""
    used_bytes: int
    """Memory in use, by whomever."""
    driver: str
    """Version of the driver."""
    mig: bool
    """Whether it is cut into instances."""
    ecc_errors: int
    """Memory errors since the driver was loaded that could not be corrected."""
    celsius: int | None
    """Temperature, where it is told."""


def listed(timeout_s: float) -> list[Gpu]:
    """The GPUs nvidia-smi knows of; none where there is no such program.

    Raises:
        RuntimeError: the program is there and fails: a driver without a device, or a broken one.
        subprocess.TimeoutExpired: it hangs.
    """
    if shutil.which("nvidia-smi") is None:
        return []
    text = _ask([f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader,nounits"], timeout_s)
    return [_gpu([cell.strip() for cell in line.split(",")]) for line in text.splitlines() if line]


def _gpu(cells: Sequence[str]) -> Gpu:
    index, name, total, used, driver, mig, errors, heat = cells
    return Gpu(
        index=int(index),
        name=name,
        memory_bytes=_number(total) * MIB,
        used_bytes=_number(used) * MIB,
        driver=driver,
        mig=mig == "Enabled",
        ecc_errors=_number(errors),
        celsius=_number(heat) if heat.isdecimal() else None,
    )


def _number(cell: str) -> int:
    """A whole number; 0 for what this GPU does not tell ([N/A])."""
    return int(cell) if cell.isdecimal() else 0


def _ask(words: Sequence[str], timeout_s: float) -> str:
    done = subprocess.run(
        ["nvidia-smi", *words], capture_output=True, text=True, timeout=timeout_s, check=False
    )
    if done.returncode != 0:
        said = (done.stdout + done.stderr).strip().splitlines() or ["nothing"]
        raise RuntimeError(f"nvidia-smi says: {said[0]}")
    return done.stdout


def described(gpus: Sequence[Gpu]) -> Iterator[Finding]:
    """One line per GPU."""
    if not gpus:
        yield Finding(
            name="GPUs", value="none (no nvidia-smi); training runs on the processor over gloo"
        )
    for gpu in gpus:
        heat = "" if gpu.celsius is None else f", {gpu.celsius} °C"
        yield _judged(gpu, f"{gpu.name}, {gpu.memory_bytes / 1024**3:.1f} GiB{heat}")
    if len(kinds := Counter(gpu.name for gpu in gpus)) > 1:
        yield Finding(
            name="GPUs", value=", ".join(f"{n} x {name}" for name, n in kinds.items()),
            verdict="warn",
            advice="the slowest sets the pace; choose some with CUDA_VISIBLE_DEVICES",
        )  # fmt: skip


def _judged(gpu: Gpu, value: str) -> Finding:
    """The line of one GPU, with what is worst about it."""
    name = f"GPU {gpu.index}"
    if gpu.ecc_errors:
        return Finding(
            name=name, value=f"{value}, {gpu.ecc_errors} uncorrected memory errors", verdict="bad",
            advice=f"results may be wrong: take it out (CUDA_VISIBLE_DEVICES without {gpu.index}) "
            "and have it replaced",
        )  # fmt: skip
    if gpu.used_bytes > _BUSY * gpu.memory_bytes:
        return Finding(
            name=name, value=f"{value}, {gpu.used_bytes / 1024**3:.1f} GiB in use", verdict="warn",
            advice="something else runs there: nvidia-smi names it",
        )  # fmt: skip
    if gpu.mig:
        return Finding(
            name=name, value=f"{value}, cut into MIG instances", verdict="warn",
            advice="NCCL cannot join instances; one rank per machine, or nvidia-smi -mig 0",
        )  # fmt: skip
    if gpu.celsius is not None and gpu.celsius >= _HOT_CELSIUS:
        return Finding(
            name=name, value=value, verdict="warn",
            advice=f"at {_HOT_CELSIUS} °C and above it slows down; look at the cooling",
        )  # fmt: skip
    return Finding(name=name, value=value)


def driver(gpus: Sequence[Gpu]) -> Iterator[Finding]:
    """The driver, which all GPUs of a machine share."""
    if gpus:
        yield Finding(name="driver", value=gpus[0].driver)


def topology(gpus: Sequence[Gpu], timeout_s: float) -> Iterator[Finding]:
    """How the GPUs of this machine reach each other."""
    if len(gpus) < 2:
        return
    links = Counter(links_of(_ask(["topo", "-m"], timeout_s)))
    value = ", ".join(f"{count} pairs {_LINKS.get(re.sub('[0-9]+$', '', kind), kind)} ({kind})"
                      for kind, count in links.most_common())  # fmt: skip
    slow = [kind for kind in links if not kind.startswith("NV")]
    if slow:
        yield Finding(
            name="topology", value=value, verdict="warn",
            advice="pairs without NVLink are slow: keep parallel.tp within NVLink, or use "
            "parallel.pp and data parallelism there",
        )  # fmt: skip
    else:
        yield Finding(name="topology", value=value)


_LINKS = {
    "NV": "by NVLink", "PIX": "by one PCIe bridge", "PXB": "by several PCIe bridges",
    "PHB": "by the PCIe host bridge", "NODE": "within a NUMA node", "SYS": "across NUMA nodes",
}  # fmt: skip


def links_of(matrix: str) -> list[str]:
    """Kind of link of every pair of GPUs in what ``nvidia-smi topo -m`` prints."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", matrix)
    rows = [line.split() for line in plain.splitlines() if re.match(r"GPU\d+\s", line)]
    return [row[1 + other] for number, row in enumerate(rows) for other in range(number)]
