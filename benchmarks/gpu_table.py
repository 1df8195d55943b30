"""The figures of benchmarks/gpu.py as one Markdown page, with the bars they are held against."""

from collections.abc import Iterator
from typing import Any

Row = dict[str, Any]
Figures = dict[str, dict[str, Row]]

MFU_BAR = 0.60
FP8_BAR = 1.25
COPY_BAR = 0.85
MEMORY_BOUND = ("rms_norm", "add_rms_norm", "rotate", "swiglu")


def table(figures: Figures) -> str:
    """Render everything that was measured."""
    parts = [*_machine(figures), *_steps(figures), *_bars(figures), *_kernels(figures["kernels"])]
    return "\n".join([*parts, *_missing(figures)])


def _measured(rows: dict[str, Row]) -> dict[str, Row]:
    return {name: row for name, row in rows.items() if "reason" not in row}


def _machine(figures: Figures) -> Iterator[str]:
    records = [*_measured(figures["step"]).values(), *_measured(figures["kernels"]).values()]
    if not records:
        return
    machine, rates = records[0]["machine"], records[0]["rates"]
    yield (
        f"{machine['device']}, torch {machine['torch']}, commit {machine['commit']}: copies "
        f"{rates['copy_gb_per_s']:,.0f} GB/s, multiplies {rates['matmul_precision']} matrices at "
        f"{rates['matmul_tflops']:,.3g} TFLOP/s (measured)."
    )
    yield ""


def _steps(figures: Figures) -> Iterator[str]:
    yield "| case | side | tokens/s | MFU | causal half | step ms | memory GiB |"
    yield "|---|---|---|---|---|---|---|"
    peers = _measured(figures["peers"])
    for name, row in _measured(figures["step"]).items():
        mfu, causal = (f"{row[key]:.1%}" if row[key] is not None else "–"
                       for key in ("mfu", "mfu_causal"))  # fmt: skip
        memory = max(row["peak_memory_bytes"]) / 2**30
        yield (
            f"| {name} | llmtrain | {row['tokens_per_s']:,.0f} | {mfu} | {causal} | "
            f"{row['step_s']['median'] * 1e3:,.0f} | {memory:.1f} |"
        )
        for other, peer in peers.items():
            if other.rpartition("-")[0] != name:
                continue
            ratio = peer["tokens_per_s"] / row["tokens_per_s"]
            shown = [f"{row[key] * ratio:.1%}" if row[key] is not None else "–"
                     for key in ("mfu", "mfu_causal")]  # fmt: skip
            held = peer["peak_memory_bytes"]
            yield (
                f"| | {peer['package']} {peer['version']} | {peer['tokens_per_s']:,.0f} | "
                f"{shown[0]} | {shown[1]} | {peer['step_s'] * 1e3:,.0f} | "
                f"{'–' if held is None else f'{held / 2**30:.1f}'} |"
            )
    yield ""


def _bars(figures: Figures) -> Iterator[str]:
    """What was to be reached, and what was."""
    steps, peers = _measured(figures["step"]), _measured(figures["peers"])
    if all(row["mfu"] is None for row in steps.values()):
        return  # a trial on a machine without a GPU
    wanted = steps.get("3b-4096-bf16")
    if wanted is not None:
        yield _bar("MFU of 3b at 4,096 in bf16", wanted["mfu"], MFU_BAR)
    for name, row in steps.items():
        rates = [p["tokens_per_s"] for n, p in peers.items() if n.rpartition("-")[0] == name]
        if rates:
            yield _bar(f"{name} over the best peer", row["tokens_per_s"] / max(rates), 1.0)
        half = steps.get(name.replace("fp8", "bf16"))
        if name.endswith("fp8") and half is not None:
            ratio = row["tokens_per_s"] / half["tokens_per_s"]
            yield _bar(f"{name} over bf16", ratio, FP8_BAR)
    for name, record in _measured(figures["kernels"]).items():
        shares = [
            row["share_of_roofline"] for row in record["kernels"]
            if row["backend"] == "triton" and row["kernel"] in MEMORY_BOUND and not row["reason"]
        ]  # fmt: skip
        if shares:
            yield _bar(f"{name}: slowest of norm, rope, swiglu, of the copy rate",
                       min(shares), COPY_BAR)  # fmt: skip
    yield ""


def _bar(what: str, value: float, bar: float) -> str:
    return f"- {what}: {value:.3g}, bar {bar:g}: {'met' if value >= bar else 'missed'}"


def _kernels(records: dict[str, Row]) -> Iterator[str]:
    if not _measured(records):
        return
    yield "| case | kernel | backend | pass | ms | rate | of the roofline | error |"
    yield "|---|---|---|---|---|---|---|---|"
    for name, record in _measured(records).items():
        for row in record["kernels"]:
            if row["reason"] is not None:
                continue
            rate = (f"{row['tflops']:,.3g} TFLOP/s" if "tflops" in row
                    else f"{row['gb_per_s']:,.0f} GB/s")  # fmt: skip
            yield (
                f"| {name} | {row['kernel']} | {row['backend']} | {row['pass']} | "
                f"{row['s']['median'] * 1e3:.3g} | {rate} | {row['share_of_roofline']:.0%} | "
                f"{row['error']:.0e} |"
            )
    yield ""


def _missing(figures: Figures) -> Iterator[str]:
    """What has no figures, with the reason."""
    absent = dict[str, str]()
    for kind, rows in figures.items():
        for name, row in rows.items():
            if "reason" in row:
                absent[f"{kind} {name}"] = row["reason"]
            for one in row.get("kernels", []) if "reason" not in row else []:
                if one["reason"] is not None:
                    absent[f"{one['kernel']} {one['backend']}"] = one["reason"]
    if absent:
        yield "Without figures:"
        yield ""
        yield from (f"- {what}: {reason}" for what, reason in absent.items())
