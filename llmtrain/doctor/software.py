"""Packages against what pyproject.toml supports; what torch can do on this machine.

The functions that import torch do so when they are called, so that the quick form never does.

    for finding in versions(): ...
"""

import tomllib
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import TYPE_CHECKING

from packaging.requirements import Requirement

import llmtrain
from llmtrain.doctor.finding import Finding

if TYPE_CHECKING:
    import torch

SHOWN = ("torch", "deepspeed", "flash-attn", "triton", "torchao", "wandb", "hydra-core")
"""Packages that have a line even where all is well."""
_ABSENT = "not installed"


def requirements() -> dict[str, list[tuple[str | None, Requirement]]]:
    """Package name -> (extra or None, what is asked of it), of this checkout or installation."""
    project = Path(llmtrain.__file__).parents[1] / "pyproject.toml"
    found: dict[str, list[tuple[str | None, Requirement]]] = {}
    if project.is_file():
        table = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
        groups = {None: table["dependencies"], **table["optional-dependencies"]}
        pairs = [(extra, Requirement(line)) for extra, lines in groups.items() for line in lines]
    else:
        pairs = [_of_metadata(line) for line in requires("llmtrain") or []]
    for extra, requirement in pairs:
        if extra != "dev":
            found.setdefault(requirement.name, []).append((extra, requirement))
    return found


def _of_metadata(line: str) -> tuple[str | None, Requirement]:
    """One line of an installed package: the extra stands in its marker."""
    requirement = Requirement(line)
    _, _, extra = str(requirement.marker or "").rpartition('extra == "')
    return extra.partition('"')[0] or None, requirement


def versions() -> Iterator[Finding]:
    """Installed versions: those of SHOWN, and every other that is missing or out of range."""
    required = requirements()
    for name in SHOWN:
        yield _version(name, required.get(name, []))
    others = [_version(name, required[name]) for name in sorted(set(required) - set(SHOWN))]
    yield from (finding for finding in others if finding.verdict != "ok")
    absent = [finding.name for finding in others if finding.value.startswith(_ABSENT)]
    well = sum(finding.verdict == "ok" for finding in others) - len(absent)
    without = f"; without the optional {', '.join(absent)}" if absent else ""
    yield Finding(name="other packages", value=f"{well} as required{without}")


def _version(name: str, required: list[tuple[str | None, Requirement]]) -> Finding:
    """One package."""
    extras = [extra for extra, _ in required if extra is not None]
    core = len(extras) < len(required)
    ranges = ", ".join(sorted({str(each.specifier) for _, each in required if each.specifier}))
    try:
        found = version(name)
    except PackageNotFoundError:
        if core:
            advice = f"pip install '{name}{ranges}'"
            return Finding(name=name, value="missing", verdict="bad", advice=advice)
        how = f"pip install 'llmtrain[{extras[0]}]'" if extras else f"pip install {name}"
        return Finding(name=name, value=f"{_ABSENT}, optional: {how}")
    wrong = [each for _, each in required if not each.specifier.contains(found, prereleases=True)]
    if wrong:
        return Finding(
            name=name, value=f"{found}, supported is {ranges}", verdict="bad" if core else "warn",
            advice=f"pip install '{name}{ranges}'",
        )  # fmt: skip
    return Finding(name=name, value=f"{found} ({ranges} is supported)" if ranges else found)


def build_of_torch(num_gpus: int) -> Iterator[Finding]:
    """CUDA, the GPUs torch sees, and NCCL."""
    import torch

    built, seen = torch.version.cuda, torch.cuda.device_count()
    value = "built without CUDA" if built is None else f"built for CUDA {built}, sees {seen} GPUs"
    if num_gpus and built is None:
        advice = f"{num_gpus} GPUs stay idle: install a CUDA build of torch {torch.__version__}"
        yield Finding(name="CUDA", value=value, verdict="bad", advice=advice)
    elif num_gpus and not seen:
        advice = "the driver is too old for this build (see nvidia-smi), or CUDA_VISIBLE_DEVICES= "
        yield Finding(name="CUDA", value=value, verdict="bad", advice=f"{advice}hides the GPUs")
    elif seen < num_gpus:
        advice = f"nvidia-smi lists {num_gpus}; CUDA_VISIBLE_DEVICES hides the others"
        yield Finding(name="CUDA", value=value, verdict="warn", advice=advice)
    else:
        yield Finding(name="CUDA", value=value)
    yield _collectives(num_gpus)


def _collectives(num_gpus: int) -> Finding:
    import torch

    if torch.version.cuda is not None:
        number = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
        return Finding(name="NCCL", value=number)
    if num_gpus:
        advice = "several GPUs cannot talk: install a build of torch with NCCL"
        return Finding(name="NCCL", value="not in torch", verdict="bad", advice=advice)
    return Finding(name="NCCL", value="not in torch; without GPUs gloo does its work")


def attention(device: "torch.device") -> Iterator[Finding]:
    """Every attention backend, and why it cannot be used here."""
    from llmtrain.ops.attention.choose import ATTENTION

    yield from _choices("attention", {n: b.available for n, b in ATTENTION.items()}, device)


def kernels(device: "torch.device") -> Iterator[Finding]:
    """Every set of fused kernels, and why it cannot be used here."""
    from llmtrain.ops.kernels import KERNELS

    yield from _choices("kernels", {n: b.available for n, b in KERNELS.items()}, device)


def _choices(
    what: str,
    available: "dict[str, Callable[[torch.device], str | None]]",
    device: "torch.device",
) -> Iterator[Finding]:
    reasons = {name: ask(device) for name, ask in available.items()}
    for name, reason in reasons.items():
        value = f"available on {device.type}" if reason is None else f"no: {reason}"
        yield Finding(name=f"{what} {name}", value=value)


def fp8(device: "torch.device") -> Iterator[Finding]:
    """Whether matrices can be multiplied in 8 bits."""
    if device.type != "cuda":
        yield Finding(name="fp8", value=f"no: needs an NVIDIA GPU, found {device.type}")
        return
    from llmtrain.parallel.float8 import unavailable

    reason = unavailable(device)
    yield Finding(name="fp8", value="available on cuda" if reason is None else f"no: {reason}")


def compiler(device: "torch.device") -> Iterator[Finding]:
    """What torch.compile needs."""
    from llmtrain.parallel.compile import missing_compiler

    reason = missing_compiler(device)
    if reason is None:
        yield Finding(name="torch.compile", value=f"has its compiler on {device.type}")
        return
    _, _, advice = reason.partition(": ")
    yield Finding(
        name="torch.compile", value=reason.partition(":")[0], verdict="warn",
        advice=f"engine.compile=true would be refused: {advice}",
    )  # fmt: skip
