"""``llmtrain doctor``: what this machine has, line by line, each with a verdict and what to do.

Invariant: nothing is changed, no question hangs or ends in a traceback. Exit status 0 where nothing
is bad, 1 where something is; a warning does not fail.

    llmtrain doctor runs_dir=/shared/runs
"""

import json
import shutil
import socket
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from llmtrain.config.doctor import DoctorConfig
from llmtrain.doctor import gpus, machine, network, software, storage
from llmtrain.doctor.finding import Finding, Question, Verdict, ask

Found = list[tuple[str, Finding]]
"""(section, finding) in the order of the table."""


def main(config: DoctorConfig) -> int:
    """Print what this machine has; returns 0 where nothing is bad, 1 where something is."""
    found = examine(config)
    sys.stdout.write(as_json(found) if config.json else table(found))
    return 1 if verdict(found) == "bad" else 0


def examine(config: DoctorConfig) -> Found:
    """Every finding about this machine."""
    cards: list[gpus.Gpu] = []

    def of_gpus() -> Iterator[Finding]:
        cards.extend(gpus.listed(config.timeout_s))
        yield from gpus.described(cards)
        yield from gpus.driver(cards)
        yield from gpus.topology(cards, config.timeout_s)

    found = ask([Question("GPUs", "nvidia-smi", of_gpus)], config.timeout_s)
    found += ask(_plain(config, cards), config.timeout_s)
    return found if config.quick else found + _of_torch(config, len(cards))


def _plain(config: DoctorConfig, cards: Sequence[gpus.Gpu]) -> list[Question]:
    """What is answered without torch."""
    fast_network = any(network.INFINIBAND.glob("*"))
    gpu_bytes = sum(gpu.memory_bytes for gpu in cards)
    return [
        Question("machine", "system", machine.system),
        Question("machine", "processor", partial(machine.cores, len(cards))),
        Question("machine", "memory", partial(machine.memory, gpu_bytes)),
        Question("machine", "/dev/shm", storage.shared_memory),
        Question("machine", "disk of runs", partial(storage.disk, Path(config.runs_dir))),
        Question("machine", "limits", partial(machine.limits, fast_network)),
        Question("machine", "clock", network.clock),
        Question("network", "host name", network.hostname),
        Question("network", "InfiniBand", network.infiniband),
        Question("packages", "versions", software.versions),
    ]


def _of_torch(config: DoctorConfig, num_gpus: int) -> Found:
    """What only torch can tell; its import has as long as all the rest."""

    def of_build() -> Iterator[Finding]:
        yield from software.build_of_torch(num_gpus)

    found = ask([Question("torch", "import of torch", of_build)], 6 * config.timeout_s)
    if any(finding.name == "import of torch" for _, finding in found):
        return found
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parts = {
        "attention": software.attention,
        "kernels": software.kernels,
        "fp8": software.fp8,
        "torch.compile": software.compiler,
    }
    questions = [Question("torch", name, partial(part, device)) for name, part in parts.items()]
    return found + ask(questions, config.timeout_s)


def verdict(found: Found) -> Verdict:
    """The worst of all."""
    worst: Verdict = "ok"
    for _, finding in found:
        if finding.verdict == "bad" or worst == "ok":
            worst = finding.verdict
    return worst


def table(found: Found) -> str:
    """The findings for a person: a line each, what to do below it."""
    width = max(len(finding.name) for _, finding in found)
    columns = shutil.get_terminal_size((100, 24)).columns
    lines, last = list[str](), ""
    for section, finding in found:
        if section != last:
            lines += ["", section] if last else [section]
            last = section
        lines += _wrapped(
            f"  {finding.verdict:<5} {finding.name:<{width}}  ", finding.value, columns
        )
        if finding.advice:
            lines += _wrapped(" " * (width + 8) + "  -> ", finding.advice, columns)
    count = Counter(finding.verdict for _, finding in found)
    total = f"{count['ok']} ok, {count['warn']} to look at, {count['bad']} bad"
    return "\n".join([*lines, "", f"{socket.gethostname()}: {total}", ""])


def _wrapped(head: str, text: str, columns: int) -> list[str]:
    """Text behind a head, its further lines set in as far."""
    return textwrap.wrap(
        text, max(columns, len(head) + 30), initial_indent=head,
        subsequent_indent=" " * len(head), break_long_words=False, break_on_hyphens=False,
    ) or [head]  # fmt: skip


def as_json(found: Found) -> str:
    """The findings for a program: one object."""
    rows = [
        {
            "section": section, "name": finding.name, "value": finding.value,
            "verdict": finding.verdict, "advice": finding.advice,
        }
        for section, finding in found
    ]  # fmt: skip
    whole = {"host": socket.gethostname(), "verdict": verdict(found), "findings": rows}
    return json.dumps(whole, ensure_ascii=False) + "\n"
