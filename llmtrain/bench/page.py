"""A record of ``llmtrain bench`` as one HTML page that loads nothing, in the report's style.

Path("bench/run.html").write_text(render(record))
"""

import html
from collections.abc import Iterable
from typing import Any

from llmtrain.bench.table import milliseconds, number, reached
from llmtrain.config.load import to_yaml
from llmtrain.report.bars import bar, bar_group
from llmtrain.report.markup import card, document, folded, short, table

Row = dict[str, Any]

_MEASURED, _FLOOR = "var(--c0)", "var(--lost)"


def render(record: Row) -> str:
    """Return the page."""
    plots: dict[str, Row] = {}
    if record["part"] == "step":
        top = _tiles(record)
        cards = [_parts(record), _steps(record, plots), _phases(record), _machine(record)]
    else:
        top = _rate_tiles(record)
        cards = [*_kernels(record["kernels"]), _absent(record["kernels"]), _machine(record)]
    body = "\n".join([_header(record), top, '<div class="cards">', *cards, "</div>"])
    return document(f"{record['name']} · llmtrain bench", body, plots)


def _header(record: Row) -> str:
    machine, rates = record["machine"], record["rates"]
    facts = [
        machine["device"],
        f"torch {machine['torch']}",
        f"copies {number(rates['copy_gb_per_s'])} GB/s",
        f"multiplies {rates['matmul_precision']} matrices at "
        f"{number(rates['matmul_tflops'])} TFLOP/s",
    ]
    name, line = html.escape(record["name"]), html.escape(" · ".join(facts))
    return f"<header><h1>{name}</h1><p>{line}</p></header>"


def _tiles(record: Row) -> str:
    """The numbers a reader wants first."""
    share = f"{record['share_of_matmul_rate']:.1%}"
    if record["mfu"] is None:
        used = ("Of the matrix rate", share, "model operations over the measured rate")
    else:
        note = f"{record['mfu_causal']:.1%} with half of the attention"
        used = ("MFU", f"{record['mfu']:.1%}", note)
    spread = record["step_s"]
    tiles = [
        ("Throughput", short(record["tokens_per_s"]), "tokens per second, median step"),
        used,
        ("Step", f"{milliseconds(spread['median'])} ms",
         f"quartiles {milliseconds(spread['lower_quartile'])} to "
         f"{milliseconds(spread['upper_quartile'])} ms"),
        ("Peak memory", f"{max(record['peak_memory_bytes']) / 2**30:.2f} GiB",
         "in the timed steps, on the fullest rank"),
    ]  # fmt: skip
    return _tile_row(tiles)


def _rate_tiles(record: Row) -> str:
    """What the kernels are held against, and what they work on."""
    rates, config = record["rates"], record["config"]
    training = config["training"]
    return _tile_row([
        ("Copy rate", f"{number(rates['copy_gb_per_s'])} GB/s", "read and written, measured"),
        ("Matrix rate", f"{number(rates['matmul_tflops'])} TFLOP/s", "best product, measured"),
        ("Precision", config["engine"]["precision"], "of inputs and results"),
        ("Rows", f"{training['micro_batch_size']} x {training['sequence_length']:,}",
         f"tokens, documents {config['documents']}"),
    ])  # fmt: skip


def _tile_row(tiles: list[tuple[str, str, str]]) -> str:
    cells = (
        f'<div class="tile"><span>{label}</span><b>{value}</b><small>{note}</small></div>'
        for label, value, note in tiles
    )
    return f'<div class="tiles">{"".join(cells)}</div>'


def _parts(record: Row) -> str:
    """Time by part beside what the roofline allows."""
    if not record["parts"]:
        return ""
    longest = max(part["s"] for part in record["parts"].values())
    bars, rows = [], []
    for name, part in record["parts"].items():
        seconds, floor = part["s"], part["roofline_s"]
        value = f"{milliseconds(seconds)} ms, {part['share']:.1%}"
        lines = [bar([(seconds / longest, _MEASURED)], f"{name}: {value}")]
        shown = ["–", "–"]
        if floor is not None:
            shown = [milliseconds(floor), reached(floor, seconds)]
            tip = f"{name}: the rates of this machine allow {milliseconds(floor)} ms"
            lines.append(bar([(min(1.0, floor / longest), _FLOOR)], tip))
        bars.append(bar_group(name, value, lines))
        rows.append([name, milliseconds(seconds), f"{part['share']:.1%}", *shown])
    listing = table(["part", "ms", "of the step", "roofline ms", "of the roofline"], rows)
    note = (
        "Profiled steps (blue), and the least time that the measured rates of this machine allow "
        "for the operations and bytes of the part (grey)."
    )
    body = f'<div class="bars">{"".join(bars)}</div>{folded(listing)}'
    return card("Time by part", note, body, wide=True)


def _steps(record: Row, plots: dict[str, Row]) -> str:
    points = [[i, float(f"{s * 1e3:.6g}")] for i, s in enumerate(record["steps_s"], start=1)]
    series = {"name": "milliseconds", "color": 0, "points": points, "faint": False, "dots": True}
    plots["steps"] = {"series": [series], "zero": True, "unit": " ms", "label": "Step times"}
    note = f"Milliseconds of each of {len(points)} timed steps."
    return card("Steps", note, '<div class="plot" id="steps"></div>')


def _phases(record: Row) -> str:
    if not record["parts"]:
        return ""
    whole = record["profiled_step_s"]
    found = {**record["phases"], "framework overhead": record["overhead_s"]}
    bars = [
        bar_group(
            name,
            f"{milliseconds(seconds)} ms, {seconds / whole:.1%}",
            [bar([(seconds / whole, _MEASURED)], f"{name}: {milliseconds(seconds)} ms")],
        )
        for name, seconds in found.items()
    ]
    note = "Overhead: the step without forward, backward and optimizer; clip and metrics in it."
    return card("Phases", note, f'<div class="bars">{"".join(bars)}</div>')


def _kernels(rows: list[Row]) -> list[str]:
    """One card per kernel: every backend's forward and backward against the roofline."""
    found = []
    for kernel in dict.fromkeys(row["kernel"] for row in rows if row["reason"] is None):
        bars, cells = [], []
        for row in rows:
            if row["kernel"] != kernel or row["reason"] is not None:
                continue
            rate = (f"{number(row['tflops'])} TFLOP/s" if "tflops" in row
                    else f"{number(row['gb_per_s'])} GB/s")  # fmt: skip
            label = f"{row['backend']}, {row['pass']}"
            share = row["share_of_roofline"]
            line = bar([(min(1.0, share), _MEASURED)], f"{label}: {share:.1%} of the roofline")
            bars.append(bar_group(label, f"{rate}, {share:.0%}", [line]))
            cells.append([row["backend"], row["pass"], milliseconds(row["s"]["median"]), rate,
                          f"{share:.1%}", f"{row['error']:.1e}"])  # fmt: skip
        listing = table(["backend", "pass", "ms", "rate", "of the roofline", "error"], cells)
        note = "The whole width is what the machine's measured rate allows."
        body = f'<div class="bars">{"".join(bars)}</div>{folded(listing)}'
        found.append(card(kernel, note, body))
    return found


def _absent(rows: list[Row]) -> str:
    found = [
        (f"{r['kernel']} {r['backend']}", r["reason"]) for r in rows if r["reason"] is not None
    ]
    if not found:
        return ""
    return card("Without figures", "What is not timed here, and why.", _listing(found), wide=True)


def _machine(record: Row) -> str:
    machine = dict(record["machine"])
    packages = machine.pop("packages")
    found = {**machine, **packages, "config hash": record["config_hash"]}
    settings = f'<pre class="config">{html.escape(to_yaml(record["config"]))}</pre>'
    body = _listing(found.items()) + folded(settings, "config")
    return card("Measured on and with", "", body, wide=True)


def _listing(pairs: Iterable[tuple[str, object]]) -> str:
    """Names and what they stand for, one a line."""
    lines = [f"{name.replace('_', ' '):<22}{value}" for name, value in pairs]
    return f'<pre class="config">{html.escape(chr(10).join(lines))}</pre>'
