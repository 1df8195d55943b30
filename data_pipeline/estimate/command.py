"""``llmtrain-data estimate``: draw samples, run them, say what the whole will give and cost.

llmtrain-data estimate pipeline=fineweb 'input.web=crawl/*.warc.gz' num_workers=8
"""

import json
import logging
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data_pipeline.config.report import EstimateConfig
from data_pipeline.estimate.draw import NESTED, Draw, draw_samples
from data_pipeline.estimate.model import Estimate, Range, extrapolate
from data_pipeline.estimate.trial import run_trial
from data_pipeline.execute.local import Executor
from data_pipeline.read.inputs import find_raw_files
from data_pipeline.report.markup import clock, count, short, size
from data_pipeline.stages import replace_file

logger = logging.getLogger(__name__)


def estimate(config: EstimateConfig, executor: Executor) -> str:
    """Return the estimate as text; write it as JSON if asked.

    The same workers run all trials, so that only the first pays for starting them.

    Raises:
        DataError: an input is missing, or the sample is too small to say anything.
    """
    files = find_raw_files(config.input)
    with tempfile.TemporaryDirectory(prefix="llmtrain-estimate-") as name:
        scratch = Path(name)
        draw = draw_samples(
            files, config.pipeline.fields, scratch, sample_bytes=config.sample_bytes,
            read_bytes=config.read_bytes,
            max_record_bytes=config.pipeline.extract.max_record_bytes,
        )  # fmt: skip
        logger.info(
            "sample: %s, %.3f %% of all, from %d of %s",
            count(sum(file.chosen for file in draw.files), "record"), 100 * draw.share,
            len(draw.files), count(draw.num_files, "file"),
        )  # fmt: skip
        trials = []
        for i, inputs in enumerate(draw.inputs):
            trials.append(run_trial(config, inputs, scratch / f"run-{i}", executor))
            logger.info("trial %d of %d: %s raw", i + 1, len(NESTED), size(trials[-1].raw_bytes))
    found = extrapolate(draw, trials)
    if config.out is not None:
        replace_file(Path(config.out), json.dumps(_plain(draw, found, config), indent=1) + "\n")
    return render(draw, found, config)


def _plain(draw: Draw, found: Estimate, config: EstimateConfig) -> dict[str, Any]:
    return {
        "input": {"files": draw.num_files, "bytes": draw.total_bytes},
        "sample": {
            "share": draw.share, "files": len(draw.files),
            "records": sum(file.chosen for file in draw.files),
        },
        "num_workers": config.num_workers,
        **_ranges(asdict(found)),
    }  # fmt: skip


def _ranges(value: Any) -> Any:
    """Ranges as objects, all the way down; ``asdict`` keeps them as named tuples."""
    if isinstance(value, Range):
        return value._asdict()
    if isinstance(value, dict):
        return {key: _ranges(entry) for key, entry in value.items()}
    return [_ranges(entry) for entry in value] if isinstance(value, (list, tuple)) else value


_HEAD = ("step", "in", "kept", "between", "kept %", "in the sample", "text", "dropped, by reason")


def render(draw: Draw, found: Estimate, config: EstimateConfig) -> str:
    """Return the estimate as people read it."""
    rows = [_HEAD]
    for step in found.steps:
        share = 100 * step.documents_out.mid / max(1.0, step.documents_in.mid)
        top = sorted(step.dropped.items(), key=lambda item: -item[1])[:3]
        rows.append((
            f"{step.name}{'*' if step.compares else ''}", short(step.documents_in.mid),
            short(step.documents_out.mid), _between(step.documents_out, short), f"{share:.1f}",
            f"{100 * step.sample_share:.1f}", size(step.bytes_out.mid),
            ", ".join(f"{reason} {short(number)}" for reason, number in top),
        ))  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    table = [
        "  ".join(
            cell.ljust(width) if i in (0, len(row) - 1) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([
        f"{size(draw.total_bytes)} in {count(draw.num_files, 'file')}, about "
        f"{short(found.records.mid)} records; sample of {found.share:.3%} of them", "",
        table[0], "-" * max(map(len, table)), *table[1:], "", *_totals(found, config), "",
        *_caveats(draw, found),
    ]) + "\n"  # fmt: skip


def _between(value: Range, spell: Any) -> str:
    return f"{spell(value.low)} – {spell(value.high)}"


def _totals(found: Estimate, config: EstimateConfig) -> list[str]:
    seconds = Range(*(sum(values) for values in zip(*found.seconds.values(), strict=True)))
    slow = sorted(found.seconds.items(), key=lambda item: -item[1].mid)[:3]
    shares = ", ".join(f"{name} {clock(value.mid)}" for name, value in slow)
    return [
        f"time    {clock(seconds.mid)} ({_between(seconds, clock)}) with "
        f"{count(config.num_workers, 'worker')}: {shares}",
        f"disk    {size(found.disk_bytes.mid)} ({_between(found.disk_bytes, size)})",
        f"tokens  {short(found.tokens.mid)} ({_between(found.tokens, short)}), counted with a "
        f"vocabulary of {found.vocab_size:,}",
    ]


def _caveats(draw: Draw, found: Estimate) -> list[str]:
    """What the numbers do not know."""
    if draw.share >= 1.0:
        return ["The sample is the whole input: counts are exact, time is that of this run."]
    notes = []
    if any(step.compares for step in found.steps):
        notes.append(
            "* compares documents: what it drops grows with the corpus. The lower end keeps going "
            "along the line through the two largest samples, the upper end keeps the sample's "
            "share, the guess follows the power law between."
        )
    if len(draw.files) < draw.num_files:
        notes.append(
            f"{len(draw.files):,} of {draw.num_files:,} files were read; intervals take files for "
            "a random choice, so a source that changes over time may lie outside."
        )
    notes.append(
        "Time takes the machine to stay as busy as it is and work to spread over the workers; the "
        "step that joins clusters runs on one. Disk is that of the finished folder: keyed stages "
        "need room for their keys while they run. A vocabulary trained on the whole gives other "
        "numbers of tokens."
    )
    return notes
