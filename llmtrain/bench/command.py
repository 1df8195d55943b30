"""``llmtrain bench``: measures, prints a table, writes NAME.json and NAME.html.

Invariant: what is printed and drawn is in the JSON file, which says on what and with which command
it was measured. Under a launcher every rank runs the steps and rank 0 writes.

    llmtrain bench model=llama3_2_1b engine.precision=bf16 training.sequence_length=4096
    llmtrain bench part=kernels model=llama3_2_1b engine.precision=bf16
    torchrun --nproc-per-node 2 -m llmtrain bench parallel.dp_shard=2
"""

import logging
import math
import statistics
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from llmtrain import logs
from llmtrain.bench import page, table
from llmtrain.bench.counts import least_work, visible_pairs
from llmtrain.bench.machine import facts
from llmtrain.bench.rates import Rates, measure_rates, spread
from llmtrain.bench.step import StepMeasurement, measure_steps
from llmtrain.config.bench import BenchConfig
from llmtrain.config.load import config_hash, to_plain
from llmtrain.errors import ConfigError
from llmtrain.parallel.mesh import World
from llmtrain.parallel.precision import COMPUTE_DTYPES
from llmtrain.planner.flops import convention, flops_per_token
from llmtrain.run.directory import write_json
from llmtrain.train.metrics import Meter

logger = logging.getLogger(__name__)

Row = dict[str, Any]


def main(config: BenchConfig) -> int:
    """Measure what ``config.part`` names; 0 when the figures are written.

    Raises:
        ConfigError: the folder for them cannot be written.
    """
    folder, name = Path(config.out).expanduser(), name_of(config)
    _check_writable(folder)
    with World(config.parallel, config.engine) as world:
        logs.setup(None, world.rank)
        dtype = COMPUTE_DTYPES[config.engine.precision]
        rates = measure_rates(world.device, dtype, config.rate_seconds) if not world.rank else None
        world.barrier()
        if config.part == "kernels":
            from llmtrain.bench.kernels import measure_kernels

            found: Row | None = None
            if rates is not None:
                found = {"kernels": measure_kernels(config, world.device, rates)}
        else:
            measured = measure_steps(config, world, name)
            peaks = world.collect(measured.memory_bytes)
            found = None if rates is None else step_figures(config, world, measured, rates, peaks)
        if rates is None or found is None:
            return 0
        record = {
            "part": config.part,
            "name": name,
            "machine": facts(world.device),
            "config_hash": config_hash(config),
            "config": _in_json(to_plain(config)),
            "rates": {"copy_gb_per_s": rates.copy_bytes_per_s / 1e9,
                      "matmul_tflops": rates.matmul_flops_per_s / 1e12,
                      "matmul_precision": config.engine.precision},
            **found,
        }  # fmt: skip
    sys.stdout.write(table.render(record) + "\n")
    write_json(folder / f"{name}.json", record)
    _write(folder / f"{name}.html", page.render(record))
    logger.info("figures: %s, drawn: %s", folder / f"{name}.json", folder / f"{name}.html")
    return 0


def name_of(config: BenchConfig) -> str:
    """Name of the files: ``config.name``, or model, length and precision."""
    if config.name is not None:
        return config.name
    model, engine = config.model, config.engine
    words = [
        f"{model.num_hidden_layers}x{model.hidden_size}", str(config.training.sequence_length),
        engine.precision if engine.fp8 == "none" else f"fp8-{engine.fp8}",
    ]  # fmt: skip
    return "-".join([config.part, *words])


def step_figures(
    config: BenchConfig,
    world: World,
    measured: StepMeasurement,
    rates: Rates,
    peaks: list[int] | None,
) -> Row:
    """Make the figures of a step out of what rank 0 measured and of the peaks of all ranks."""
    training, step_s = config.training, statistics.median(measured.step_s)
    tokens = training.global_batch_tokens
    meter = Meter.of(config.model, world.device, world.world_size, config.monitor.peak_tflops)
    used = meter.utilization({training.sequence_length: tokens}, step_s)
    operations = flops_per_token(config.model, training.sequence_length) * tokens / step_s
    compute = rates.matmul_flops_per_s * world.world_size
    return {
        "ranks": world.world_size,
        "tokens_per_step": tokens,
        "tokens_per_s": tokens / step_s,
        "step_s": spread(measured.step_s),
        "steps_s": measured.step_s,
        "mfu": used["mfu"],
        "mfu_causal": used["mfu_causal"],
        "mfu_convention": convention(config.model),
        "model_tflops": operations / 1e12,
        "share_of_matmul_rate": operations / compute,
        "peak_memory_bytes": peaks or [measured.memory_bytes],
        "memory_between_steps_bytes": measured.state_bytes,
        "first_step_s": measured.first_step_s,
        "compile_s": measured.compile_s,
        "graphs": measured.graphs,
        "recompilations": measured.recompilations,
        "data_wait_s": measured.data_wait_s,
        "trace": None if measured.trace is None else str(measured.trace),
        **_by_part(config, measured, rates, world.world_size),
    }


def _by_part(config: BenchConfig, measured: StepMeasurement, rates: Rates, ranks: int) -> Row:
    """Time by part beside the least that the machine's rates allow, and by phase."""
    found = measured.attribution
    if found is None:
        return {"parts": {}, "phases": {}, "profiled_step_s": None, "overhead_s": None}
    rows = config.training.global_batch_size
    length = config.training.sequence_length
    seen = visible_pairs(measured.lengths, config.model.sliding_window)
    batches = sum(n * c for n, c in measured.lengths.items()) / (rows * length)
    work = least_work(config, seen / batches, rows * length)
    floors = {name: rates.floor_s(w.flops, w.bytes_moved) / ranks for name, w in work.items()}
    return {
        "profiled_step_s": found.step_s,
        "parts": {
            name: {"s": seconds, "share": seconds / found.step_s, "roofline_s": floors.get(name)}
            for name, seconds in found.parts.items()
        },
        "phases": found.phases,
        "overhead_s": found.overhead_s,
        "overhead_share": found.overhead_s / found.step_s,
        "hidden_communication_s": found.hidden_communication_s,
        "roofline_step_s": sum(floors.values()),
    }


def _check_writable(folder: Path) -> None:
    """Refuse a folder that cannot be made or written; nothing stays where nothing is measured."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with TemporaryDirectory(dir=there):
            pass
    except OSError as error:
        raise ConfigError(
            f"out={folder} cannot be written: {error.strerror}; use another"
        ) from error


def _in_json(value: Any) -> Any:
    """Spell numbers that JSON does not have as a command line does."""
    if isinstance(value, dict):
        return {key: _in_json(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_in_json(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _write(path: Path, text: str) -> None:
    """Write aside and rename."""
    beside = path.with_name(f".tmp-{path.name}")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)
