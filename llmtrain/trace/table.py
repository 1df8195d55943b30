"""What a trace reads like on a terminal: rows and their documents, or a document and its steps.

sys.stdout.write(of_step(run, 11, rows, seen, answers, with_text=False, verified=True))
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from math import isfinite

from llmtrain.data.document_loss import DocumentLoss
from llmtrain.data.trace import Rows
from llmtrain.trace.documents import DocumentKey, KnownDocument, Seen
from llmtrain.trace.proof import Answer, verdict
from llmtrain.trace.run import TracedRun

_HEAD = ("inputs", "document", "its tokens", "final text", "extracted text", "address")
_LOSS_HEAD: tuple[str, ...] = (
    "loss",
    "targets",
    "document",
    "source",
    "row",
    "inputs",
    "its tokens",
    "address",
)


def of_step(
    run: TracedRun,
    step: int,
    shape: Rows,
    seen: Sequence[Seen],
    answers: Mapping[DocumentKey, Answer],
    *,
    with_text: bool,
    verified: bool,
) -> str:
    """Return the documents of some rows of 0-based step ``step``."""
    documents = {one.document.key for one in seen}
    lines = [
        f"{run.directory.path}: step {step + 1:,} of {run.num_steps:,}, {shape.num_rows:,} rows of "
        f"{shape.sequence_length:,} tokens{_among(run)}; {len(documents):,} documents in "
        f"{len({one.stretch.row for one in seen}):,} rows"
    ]
    if run.config.data.fim is not None:
        lines.append("  fill-in-the-middle rearranged some; spans are in the documents' own order")
    cells = [_cells(one) for one in seen]
    widths = [max(len(row[i]) for row in (_HEAD, *cells)) for i in range(len(_HEAD))]
    lines += ["", "  " + _aligned(_HEAD, widths)]
    for row, group in groupby(zip(seen, cells, strict=True), lambda pair: pair[0].stretch.row):
        members = list(group)
        lines.append(_row_line(row, shape, [one for one, _ in members]))
        for one, own in members:
            lines.append("  " + _aligned(own, widths))
            answer = answers.get(one.document.key)
            lines += [f"      {line}" for line in _below(one, answer, with_text, verified)]
    return "\n".join(lines) + "\n" + (_tally(seen, answers) if verified else "")


def of_losses(
    run: TracedRun,
    losses: Sequence[DocumentLoss],
    means: Sequence[float] | None,
    seen: Sequence[Seen],
    answers: Mapping[DocumentKey, Answer],
    *,
    with_text: bool,
    verified: bool,
) -> str:
    """Return documents with their losses in nats, of one step, or of several with their means."""
    head = _LOSS_HEAD
    cells = [_loss_cells(loss, one) for loss, one in zip(losses, seen, strict=True)]
    if means is None:
        step = seen[0].stretch.step + 1 if seen else 0
        title = f"step {step:,} of {run.num_steps:,}, {len(seen):,} documents by loss"
    else:
        title = f"the worst document of each of {len(seen):,} steps whose losses were kept"
        head = ("step", "mean loss", *head)
        cells = [
            (f"{one.stretch.step + 1:,}", _loss(mean), *row)
            for one, mean, row in zip(seen, means, cells, strict=True)
        ]
    lines = [f"{run.directory.path}: {title}", ""]
    widths = [max(len(row[i]) for row in (head, *cells)) for i in range(len(head))]
    lines.append(_aligned(head, widths))
    for one, row in zip(seen, cells, strict=True):
        lines.append(_aligned(row, widths))
        below = _below(one, answers.get(one.document.key), with_text, verified)
        lines += [f"    {line}" for line in below]
    return "\n".join(lines) + "\n" + (_tally(seen, answers) if verified else "")


def of_document(
    run: TracedRun,
    document: KnownDocument,
    seen: Sequence[Seen],
    answer: Answer | None,
    *,
    steps: int,
    with_text: bool,
    verified: bool,
) -> str:
    """Return the steps, of the first ``steps``, that saw a document."""
    lines = [f"{_name(document)}  {document.record.url if document.record else ''}".rstrip()]
    lines.append(f"  {_facts(document)}")
    lines += [f"  {line}" for line in _changes(answer)]
    times = f"in {len({one.stretch.step for one in seen}):,} of {steps:,} steps"
    lines.append(f"  {times}{_among(run)}")
    head = ("step", "row", "inputs", "its tokens", "epoch", "window", "rank", "micro-batch")
    rows = [_step_cells(one) for one in seen]
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines += [f"  {_aligned(head, widths)}"] if rows else []
    for one, row in zip(seen, rows, strict=True):
        lines.append(f"  {_aligned(row, widths)}")
        lines += [f"      {line}" for line in _proof_and_text(one, answer, with_text, verified)]
    return "\n".join(lines) + "\n"


def _among(run: TracedRun) -> str:
    if run.dp_size is None:
        return ""
    ranks = "one data-parallel rank" if run.dp_size == 1 else f"{run.dp_size} data-parallel ranks"
    return f" on {ranks}"


def _row_line(row: int, shape: Rows, members: Sequence[Seen]) -> str:
    """Say of a row where it came from and who had it."""
    first = members[0]
    line = f"row {row}: {first.document.source}, epoch {first.stretch.epoch + 1}, window "
    line += f"{first.stretch.window:,}"
    if first.rank is not None:
        line += f", rank {first.rank}, micro-batch {first.micro_batch}"
    covered = sum(one.stretch.inputs[1] - one.stretch.inputs[0] for one in members)
    padding = shape.sequence_length - covered
    return f"{line}, padding {padding:,}" if padding else line


def _cells(seen: Seen) -> tuple[str, ...]:
    record = seen.document.record
    return (
        _span(seen.stretch.inputs), _name(seen.document),
        f"{_span(seen.stretch.tokens)} of {seen.document.num_tokens:,}",
        "" if seen.characters is None else _span(seen.characters), _extracted(seen),
        record.url if record else "",
    )  # fmt: skip


def _loss_cells(loss: DocumentLoss, seen: Seen) -> tuple[str, ...]:
    stretch, record = seen.stretch, seen.document.record
    return (
        _loss(loss.loss), f"{loss.targets:,.0f}", _name(seen.document), loss.source,
        str(stretch.row), _span(stretch.inputs),
        f"{_span(stretch.tokens)} of {seen.document.num_tokens:,}", record.url if record else "",
    )  # fmt: skip


def _loss(loss: float | None) -> str:
    return "not finite" if loss is None or not isfinite(loss) else f"{loss:.4f}"


def _step_cells(seen: Seen) -> tuple[str, ...]:
    stretch = seen.stretch
    return (
        f"{stretch.step + 1:,}", str(stretch.row), _span(stretch.inputs),
        f"{_span(stretch.tokens)} of {seen.document.num_tokens:,}", str(stretch.epoch + 1),
        f"{stretch.window:,}", "" if seen.rank is None else str(seen.rank),
        "" if seen.micro_batch is None else str(seen.micro_batch),
    )  # fmt: skip


def _name(document: KnownDocument) -> str:
    if document.record is None:
        return f"{document.source} {document.key.document:,}"
    return document.record.id


def _span(span: tuple[int, int]) -> str:
    return f"{span[0]:,}-{span[1]:,}"


def _extracted(seen: Seen) -> str:
    """From where to where in the extracted text, in how many runs."""
    if not seen.runs:
        return ""
    (_, start, _), (_, last, length) = seen.runs[0], seen.runs[-1]
    runs = f" in {len(seen.runs)} runs" if len(seen.runs) > 1 else ""
    inserted = f", {seen.num_inserted:,} inserted" if seen.num_inserted else ""
    return f"{_span((start, last + length))}{runs}{inserted}"


def _below(seen: Seen, answer: Answer | None, with_text: bool, verified: bool) -> Iterable[str]:
    """Lines below a document: rules, proof, text."""
    labels = _labels(seen.document)
    told = [*([", ".join(labels)] if labels else []), *_changes(answer)]
    return [*([("; ".join(told))] if told else []),
            *_proof_and_text(seen, answer, with_text, verified)]  # fmt: skip


def _proof_and_text(
    seen: Seen, answer: Answer | None, with_text: bool, verified: bool
) -> Iterable[str]:
    if verified:
        problem = verdict(seen, answer)
        record = seen.document.record
        if not problem and record is not None and answer is not None:
            place = f"{answer.file} at {record.member_offset:,} (+{record.member_length:,})"
            yield f"proven by {place}"
        else:
            yield f"NOT PROVEN: {problem}"
    if with_text:
        yield from (f"| {line}".rstrip() for line in (seen.text or "").splitlines())


def _labels(document: KnownDocument) -> list[str]:
    """What the store itself says of a document."""
    record = document.record
    if record is None:
        return []
    labels = [f"language {record.language}"] if record.language else []
    if record.cluster and record.cluster != record.id:
        labels.append(f"cluster {record.cluster}")
    return labels


def _facts(document: KnownDocument) -> str:
    """Source, size and origin of a document."""
    record = document.record
    facts = [document.source, f"document {document.key.document:,}"]
    facts.append(f"{document.num_tokens:,} tokens")
    if record is not None:
        made = f"{record.extractor_name} {record.extractor_version}".strip()
        facts += [f"{record.text_bytes:,} bytes of text by {made}", *_labels(document)]
    return ", ".join(facts)


def _changes(answer: Answer | None) -> list[str]:
    """What every rule deleted, and the size of a cluster of several."""
    lines = []
    for change in answer.changes if answer is not None else ():
        if deleted := change["deleted"]:
            by_rule = [
                f"{rule.rpartition('.')[2]} {n:,}" for rule, n in deleted.items() if "." in rule
            ]
            rules = f" ({', '.join(by_rule)})" if by_rule else ""
            lines.append(f"{change['step']} deleted {sum(deleted.values()):,} characters{rules}")
        size = int(change["labels"].get("cluster_size", 1))
        if size > 1:
            lines.append(f"{change['step']} kept it of a cluster of {size:,}")
    return lines


def _tally(seen: Sequence[Seen], answers: Mapping[DocumentKey, Answer]) -> str:
    """How many stretches are proven."""
    good = sum(not verdict(one, answers.get(one.document.key)) for one in seen)
    return f"\n{good:,} of {len(seen):,} spans proven\n"


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)).rstrip()
