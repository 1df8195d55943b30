"""The curves and heat maps of one run; each function returns a card, empty where nothing is known.

cards = curves.cards(record, plots)
"""

import numpy as np

from llmtrain.report.columns import Columns
from llmtrain.report.markup import number
from llmtrain.report.plot_card import Plots
from llmtrain.report.record import RunRecord
from llmtrain.report.series import Timeline, any_known, line, median, smooth, step_seconds


def cards(record: RunRecord, timeline: Timeline, plots: Plots) -> list[str]:
    """Every card of curves that the rows have numbers for, in the order of the page."""
    found = (
        loss, source_loss, throughput, step_time, learning_rate, gradient_norm, layer_gradients,
        layer_weights, attention_logits, memory, power, shares,
    )  # fmt: skip
    return [make(record, timeline, plots) for make in found]


def loss(record: RunRecord, timeline: Timeline, plots: Plots) -> str:
    """Training loss, its running mean and the held-out loss."""
    raw = record.rows.column("loss")
    series = [
        line("training", 0, timeline.points(raw), faint=True),
        line("running mean", 0, timeline.points(smooth(raw))),
    ]
    for name in record.rows.names("validation_loss"):
        points = timeline.points(record.rows.inside("validation_loss", name))
        dots = len(points) <= 60
        series.append(line(f"held out: {name}", record.color(name), points, dots=dots))
    note = "Nats per target token; each point is the mean since the one before."
    return plots.lines("loss", "Loss", note, series, wide=True)


def source_loss(record: RunRecord, timeline: Timeline, plots: Plots) -> str:
    """Training loss per source."""
    series = [
        line(name, record.color(name),
             timeline.points(smooth(record.rows.inside("source_loss", name))))
        for name in record.rows.names("source_loss")
    ]  # fmt: skip
    if not any(one["points"] for one in series):
        return ""
    note = "Running mean of each source."
    return plots.lines("source-loss", "Loss per source", note, series)


def throughput(record: RunRecord, timeline: Timeline, plots: Plots) -> str:
    """Tokens per second."""
    series = [line("tokens per second", 0, timeline.points(record.rows.column("tokens_per_s")))]
    note = "Tokens per second, wall-clock, evaluation apart."
    mfu = median(record.rows.column("mfu"))
    if mfu is not None:
        note += f" MFU {mfu:.1%} (median; {record.rows.last['mfu_convention']})."
    return plots.lines("throughput", "Throughput", note, series, zero=True, unit="/s")


def step_time(record: RunRecord, timeline: Timeline, plots: Plots) -> str:
    """Where the time of a step goes: the slowest rank, waits for data, saves."""
    rows = record.rows
    saves = rows.column("checkpoint_s")
    lines = [
        ("step", 0, rows.column("step_time_s")),
        ("slowest rank", 1, rows.inside("rank_step_time_s", "max")),
        ("fastest rank", 2, rows.inside("rank_step_time_s", "min")),
        ("wait for data", 3, rows.column("data_wait_s")),
        ("saving", 4, np.where(saves == 0, np.nan, saves)),
    ]
    series = [
        line(name, color, timeline.points(values), dots=name == "saving", line=name != "saving")
        for name, color, values in lines
        if any_known(values)
    ]
    total = max(record.trained_s(), 1e-9)
    note = f"Seconds per step; {_waited(rows) / total:.1%} of the time waited for data"
    if saved := float(np.nansum(saves)):
        note += f", {saved / total:.1%} stood still for saves (dots: seconds of each)"
    slowest = rows.inside("rank_step_time_s", "slowest_rank")
    counts = np.bincount(slowest[~np.isnan(slowest)].astype(np.int64))
    if len(counts):
        share = counts.max() / counts.sum()
        note += f". Rank {counts.argmax()} was the slowest in {share:.0%} of the rows"
    return plots.lines("step-time", "Step time", f"{note}.", series, zero=True, unit=" s")


def _waited(rows: Columns) -> float:
    """Seconds the steps waited for data: a row holds the mean of its steps."""
    step_s = np.nan_to_num(rows.column("step_time_s")).clip(min=1e-9)
    return float((step_seconds(rows) * np.nan_to_num(rows.column("data_wait_s")) / step_s).sum())


def learning_rate(record: RunRecord, timeline: Timeline, plots: Plots) -> str:
    """Learning rate."""
    series = [line("learning rate", 0, timeline.points(record.rows.column("lr")))]
    kind = record.config.schedule.kind
    note = f"{kind} over tokens, peak {number(record.config.optimizer.lr)}."
    return plots.lines("lr", "Learning rate", note[0].upper() + note[1:], series, zero=True)


def gradient_norm(record: RunRecord, timeline: Timeline, plots: Plots) -> str:
    """Gradient norm before the clip."""
    series = [line("gradient norm", 0, timeline.points(record.rows.column("grad_norm")))]
    skipped = int(np.nansum(record.rows.column("skipped_steps")))
    clip = record.config.optimizer.grad_clip_norm
    note = f"Global, before clipping to {number(clip)}; {skipped:,} steps skipped."
    return plots.lines("norm", "Gradient norm", note, series)


def layer_gradients(record: RunRecord, timeline: Timeline, plots: Plots) -> str:
    """Gradient norm of every layer."""
    note = "Norm of each layer's gradient, the embedding at the bottom, the head at the top."
    title = "Gradient norm by layer"
    return plots.heat("layer-grad", title, note, record.rows, "layer_grad_norm", "norm")


def layer_weights(record: RunRecord, timeline: Timeline, plots: Plots) -> str:
    """Norm of every layer's weights."""
    note = "Norm of each layer's parameters."
    title = "Weight norm by layer"
    return plots.heat("layer-weight", title, note, record.rows, "layer_weight_norm", "norm")


def attention_logits(record: RunRecord, timeline: Timeline, plots: Plots) -> str:
    """Largest attention logit of every layer."""
    note = "Largest logit in each layer's attention; growth without end foretells divergence."
    title = "Attention-logit maxima"
    return plots.heat("logits", title, note, record.rows, "attention_logit_max", "logit")


def memory(record: RunRecord, timeline: Timeline, plots: Plots) -> str:
    """Memory, on the GPU where there is one."""
    lines = [
        ("on the device", 1, record.rows.column("gpu_memory_bytes")),
        ("most allocated so far", 0, record.rows.column("memory_bytes")),
    ]
    series = [
        line(name, color, timeline.points(values / 2**30))
        for name, color, values in lines
        if any_known(values)
    ]
    if not series:
        return ""
    note = "GiB of this rank's device, or of its process where it trains on CPUs."
    return plots.lines("memory", "Memory", note, series, zero=True, unit=" GiB")


def power(record: RunRecord, timeline: Timeline, plots: Plots) -> str:
    """Power the GPU draws."""
    watts = record.rows.column("gpu_power_w")
    middle = median(watts)
    if middle is None:
        return ""
    series = [line("power", 0, timeline.points(watts))]
    note = f"Watts; median {number(middle)} W."
    return plots.lines("power", "GPU power", note, series, zero=True, unit=" W")


def shares(record: RunRecord, timeline: Timeline, plots: Plots) -> str:
    """Planned share of each source so far beside the share trained on."""
    rows = record.rows
    sources = rows.names("source_tokens")
    if len(sources) < 2 or not rows.names("planned_share"):
        return ""
    counts = np.array([np.nan_to_num(rows.inside("source_tokens", s)).cumsum() for s in sources])
    seen_shares = 100 * counts / counts.sum(0).clip(min=1e-9)
    series = []
    for source, seen in zip(sources, seen_shares, strict=True):
        planned = 100 * rows.inside("planned_share", source)
        color = record.color(source)
        series.append(line(source, color, timeline.points(seen, 400)))
        series.append(line(f"{source}, planned", color, timeline.points(planned, 400), dash=True))
    note = "Percent of the target tokens so far: trained on (full) and planned (dashed)."
    return plots.lines("shares", "Mixture over the run", note, series, unit=" %")
