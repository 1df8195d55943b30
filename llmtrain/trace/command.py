"""``llmtrain trace``: the documents in the batch of a step, or the steps that saw a document.

llmtrain trace run=runs/demo step=12 text=true verify=true
llmtrain trace run=runs/demo url=https://docs.example/a planned=true
llmtrain trace run=runs/demo step=12 losses=true
"""

import json
import sys
from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path

from llmtrain.config.trace import TraceConfig
from llmtrain.data.document_loss import DocumentLoss, kept_steps
from llmtrain.data.trace import Rows, Stretch, rows_of, sightings, step_content
from llmtrain.errors import ConfigError, DataError
from llmtrain.trace import table
from llmtrain.trace.documents import DocumentKey, Seen, documents_of, look, plain
from llmtrain.trace.find import find
from llmtrain.trace.losses import Ranked, mean_of, worst_of
from llmtrain.trace.proof import Answer, ask, verdict
from llmtrain.trace.run import TracedRun, open_run

UNPROVEN = 1
"""Exit status where ``verify=true`` found something that is not as it was."""


def main(config: TraceConfig) -> int:
    """Print what is asked for.

    Raises:
        ConfigError: the run, the step or the rank does not exist.
        DataError: the document, a store or the data pipeline does not.
    """
    run = open_run(config)
    if run.tokenizer is None and (config.text or config.verify):
        raise ConfigError(
            f"text=true and verify=true need a tokenizer, and {run.directory.config_yaml} has "
            "tokenizer.path=null; give tokenizer=DIR"
        )
    if config.step is not None:
        return _trace_step(run, config, config.step - 1)
    if config.losses:
        return _trace_kept(run, config)
    return _trace_documents(run, config)


def _trace_step(run: TracedRun, config: TraceConfig, step: int) -> int:
    _check_step(run, config, step)
    shape = rows_of(run.plan, step)
    rows = range(shape.num_rows)
    if config.rank is not None:
        rows = _rows_of_rank(run, config.rank, shape)
    if config.losses:
        return _trace_losses(run, config, worst_of(run, step, rows), None)
    seen = look(run, step_content(run.plan, step, rows))
    answers = ask(run, seen, config)
    if config.json != "-":
        sys.stdout.write(table.of_step(
            run, step, shape, seen, answers, with_text=config.text, verified=config.verify
        ))  # fmt: skip
    return _finish(config, seen, answers)


def _trace_kept(run: TracedRun, config: TraceConfig) -> int:
    """Tell the worst document of every step whose losses were kept."""
    path = run.directory.path
    steps = [step - 1 for step in kept_steps(path) if run.first < step <= run.done]
    if not steps:
        raise DataError(
            f"{path} keeps the losses of no step it has done; monitor.document_loss_steps=[N] and "
            "monitor.document_loss_every_steps=N choose the steps whose losses are kept"
        )
    ranked = [worst_of(run, step) for step in steps]
    means = [mean_of(one) for one in ranked]
    return _trace_losses(run, config, [one[0] for one in ranked], means)


def _trace_losses(
    run: TracedRun, config: TraceConfig, ranked: Ranked, means: Sequence[float] | None
) -> int:
    """Tell documents with their losses; ``means`` are those of their steps."""
    losses = [loss for loss, _ in ranked]
    seen = look(run, [stretch for _, stretch in ranked])
    answers = ask(run, seen, config)
    if config.json != "-":
        sys.stdout.write(table.of_losses(
            run, losses, means, seen, answers, with_text=config.text, verified=config.verify
        ))  # fmt: skip
    return _finish(config, seen, answers, losses, means)


def _trace_documents(run: TracedRun, config: TraceConfig) -> int:
    keys = find(run, url=config.url, doc=config.doc)
    known = documents_of(run, keys)
    last = run.decided(run.num_steps if config.planned else run.done)
    found: list[Seen] = []
    of_key: dict[DocumentKey, list[Seen]] = {}
    for key in keys:
        stretches = sightings(run.plan, key.source, key.document, before_step=last)
        of_key[key] = look(run, [s for s in stretches if _is_asked(run, s, config)])
        found += of_key[key]
    answers = ask(run, found, config)
    if config.json != "-":
        for key in keys:
            sys.stdout.write(table.of_document(
                run, known[key], of_key[key], answers.get(key), steps=last,
                with_text=config.text, verified=config.verify,
            ))  # fmt: skip
    return _finish(config, found, answers)


def _finish(
    config: TraceConfig,
    seen: Sequence[Seen],
    answers: Mapping[DocumentKey, Answer],
    losses: Sequence[DocumentLoss] = (),
    means: Sequence[float] | None = None,
) -> int:
    """Write the JSON lines; return the exit status."""
    problems = [verdict(s, answers.get(s.document.key)) if config.verify else "" for s in seen]
    if config.json is not None:
        lines = []
        for i, (one, problem) in enumerate(zip(seen, problems, strict=True)):
            fields = plain(one, with_text=config.text)
            if losses:
                fields |= {"targets": losses[i].targets, "loss": losses[i].loss}
            if means is not None:
                fields["mean_loss"] = means[i] if isfinite(means[i]) else None
            answer = answers.get(one.document.key, Answer())
            if config.rules:
                fields["rules"] = [dict(change) for change in answer.changes]
            if config.verify:
                fields |= {"proven": not problem, "problem": problem, "file": answer.file}
            lines.append(json.dumps(fields, ensure_ascii=False) + "\n")
        _write(config.json, "".join(lines))
    return UNPROVEN if any(problems) else 0


def _write(path: str, text: str) -> None:
    if path == "-":
        sys.stdout.write(text)
        return
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"json={path} cannot be written: {error.strerror}; use another"
        ) from error


def _check_step(run: TracedRun, config: TraceConfig, step: int) -> None:
    last = run.num_steps if config.planned else run.done
    if step >= last:
        more = "" if config.planned or step >= run.num_steps else "; planned=true looks ahead"
        raise ConfigError(
            f"step={step + 1} is beyond the run: {run.directory.path} has done {run.done:,} of "
            f"{run.num_steps:,} steps{more}"
        )
    if step < run.first:
        raise ConfigError(
            f"step={step + 1} was trained on other data: the run went on with a changed corpus "
            f"after step {run.first} (journal.json says what changed); ask for a later step"
        )
    if not run.plan.knows(step):
        raise ConfigError(
            f"step={step + 1} is not decided yet: the adaptive mixture chooses its sources as the "
            "run goes; ask for an earlier step"
        )


def _rows_of_rank(run: TracedRun, rank: int, shape: Rows) -> range:
    """Rows of a data-parallel rank: consecutive ones; the last ranks may have fewer, or none."""
    share = run.rows_per_rank(shape)
    if run.dp_size is None or share is None:
        raise ConfigError(
            f"rank={rank}: nothing says how many data-parallel ranks {run.directory.path} has; "
            "give dp_size=N"
        )
    if rank >= run.dp_size:
        raise ConfigError(
            f"rank={rank} does not exist: the run's data-parallel ranks are 0 to {run.dp_size - 1}"
        )
    first, end = (min(edge * share, shape.num_rows) for edge in (rank, rank + 1))
    return range(first, end)


def _is_asked(run: TracedRun, stretch: Stretch, config: TraceConfig) -> bool:
    """Whether a stretch is of the corpus of today, and of the rank that is asked for."""
    if stretch.step < run.first:
        return False
    if config.rank is None:
        return True
    return stretch.row in _rows_of_rank(run, config.rank, rows_of(run.plan, stretch.step))
