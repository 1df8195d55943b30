"""A record of ``llmtrain bench`` as text.

print(render(json.loads(Path("bench/run.json").read_text())))
"""

from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]


def render(record: Row) -> str:
    """Lay out the machine, then the figures of the part that was measured."""
    machine, rates = record["machine"], record["rates"]
    head = [
        f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}",
        f"copies {rates['copy_gb_per_s']:,.1f} GB/s, multiplies {rates['matmul_precision']} "
        f"matrices at {number(rates['matmul_tflops'])} TFLOP/s (measured)",
        "",
    ]
    body = step(record) if record["part"] == "step" else kernels(record["kernels"])
    return "\n".join([*head, *body])


def step(record: Row) -> list[str]:
    """Figures of a training step and its time by part."""
    spread, ranks = record["step_s"], record["ranks"]
    rows = [
        ("tokens/s", f"{record['tokens_per_s']:,.0f}"),
        ("step", f"{milliseconds(spread['median'])} ms, median of {len(record['steps_s'])}; "
                 f"quartiles {milliseconds(spread['lower_quartile'])} "
                 f"to {milliseconds(spread['upper_quartile'])} ms"),
        ("MFU", mfu(record)),
        ("model", f"{number(record['model_tflops'])} TFLOP/s, "
                  f"{record['share_of_matmul_rate']:.1%} of the measured matrix rate"),
        ("peak memory", f"{max(record['peak_memory_bytes']) / 2**30:.2f} GiB"
                        + (f" (worst of {ranks} ranks)" if ranks > 1 else "")),
        ("first step", f"{record['first_step_s']:.2f} s, compiling {record['compile_s']:.2f} s of "
                       f"the warm-up, {record['graphs']} graphs; {record['recompilations']} later"),
    ]  # fmt: skip
    lines = [f"{name:<12}{value}" for name, value in rows]
    return [*lines, "", *parts(record)] if record["parts"] else lines


def parts(record: Row) -> list[str]:
    """Time by part of the profiled steps, and the overhead."""
    whole = record["profiled_step_s"]
    cells = [["part", "ms", "%", "roofline ms", "of roofline"]]
    for name, part in record["parts"].items():
        floor = part["roofline_s"]
        shown = ["", ""] if floor is None else [milliseconds(floor), reached(floor, part["s"])]
        cells.append([name, milliseconds(part["s"]), f"{part['share']:.1%}", *shown])
    floor = record["roofline_step_s"]
    cells.append(
        ["step", milliseconds(whole), "100.0%", milliseconds(floor), reached(floor, whole)]
    )
    phases = ", ".join(f"{n} {milliseconds(s)} ms" for n, s in record["phases"].items())
    slower = whole / record["step_s"]["median"] - 1
    return [
        *columns(cells),
        "",
        f"{phases}; framework overhead {milliseconds(record['overhead_s'])} ms, "
        f"{record['overhead_share']:.1%} of the step",
        f"time by part is of profiled steps, {slower:+.1%} against the timed ones",
    ]


def kernels(rows: list[Row]) -> list[str]:
    """Backends and kernels, one a line; what cannot run, with the reason."""
    cells = [["kernel", "backend", "pass", "ms", "rate", "of roofline", "error"]]
    for row in rows:
        if row["reason"] is not None:
            continue
        tera = "tflops" in row
        rate = f"{number(row['tflops'])} TFLOP/s" if tera else f"{row['gb_per_s']:,.1f} GB/s"
        cells.append([
            row["kernel"], row["backend"], row["pass"], milliseconds(row["s"]["median"]), rate,
            f"{row['share_of_roofline']:.1%}", f"{row['error']:.1e}",
        ])  # fmt: skip
    absent = [
        f"{row['kernel']} {row['backend']}: {row['reason']}"
        for row in rows if row["reason"] is not None
    ]  # fmt: skip
    return [*columns(cells, left=3), *(["", *absent] if absent else [])]


def columns(cells: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Line up rows of text, the first ``left`` columns to the left."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        fields = [
            cell.ljust(width) if index < left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(fields).rstrip())
    return lines


def mfu(record: Row) -> str:
    """MFU by both conventions, or why there is none."""
    if record["mfu"] is None:
        return "unknown: no peak is known of this device; set monitor.peak_tflops"
    return (
        f"{record['mfu']:.1%} ({record['mfu_convention']}), "
        f"{record['mfu_causal']:.1%} counting half of the attention"
    )


def reached(floor_s: float, seconds: float) -> str:
    """Share of what the roofline allows."""
    return f"{floor_s / seconds:.0%}" if seconds else ""


def milliseconds(seconds: float) -> str:
    """Milliseconds with three digits that count."""
    value = seconds * 1e3
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}" if value < 1 else f"{value:.1f}"


def number(value: float) -> str:
    """Three digits that count."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
