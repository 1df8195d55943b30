"""Whether the checkpoints a run will keep fit on its disk, before the first of them is written.

Invariant: what is known at the start is said at the start: the bytes of a checkpoint follow from
the model, and how many are there at a time from the settings.

    room.check(run.checkpoints, need=12_000_000_000, config=config.checkpoint, held=2, saves=40)
"""

import logging
from pathlib import Path
from shutil import disk_usage

from llmtrain.config.training import CheckpointConfig
from llmtrain.errors import CheckpointError

logger = logging.getLogger(__name__)


def free_bytes(directory: Path) -> int:
    """Bytes that may be written to ``directory``, which is made; raises OSError."""
    directory.mkdir(parents=True, exist_ok=True)
    return disk_usage(directory).free


def free_memory_bytes(folder: Path) -> int:
    """Bytes that may be written to ``folder`` in memory: what it takes and what the host has.

    Raises OSError.
    """
    free = free_bytes(folder)
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = next((int(n.split()[1]) for n in lines if n.startswith("MemAvailable:")), None)
    return free if available is None else min(free, available * 1024)


def most_kept(config: CheckpointConfig, num_steps: int) -> int:
    """Checkpoints there are at a time, at most: an old one is deleted after a new one is there."""
    for_good = num_steps // config.keep_every_steps if config.keep_every_steps else 0
    return config.keep_last + config.keep_best + for_good + 1


def check(
    directory: Path, *, need: int, config: CheckpointConfig, held: int, step: int, num_steps: int
) -> None:
    """Refuse a disk without room for one checkpoint, warn of one with room for fewer than stay.

    Args:
        directory: where they are written.
        need: bytes of one checkpoint.
        config: how many stay.
        held: how many are there.
        step: steps done.
        num_steps: steps of the whole run.

    Raises:
        CheckpointError: not even one fits, or the disk cannot be asked.
    """
    saves = -(-(num_steps - step) // config.every_steps)
    if saves <= 0:
        return
    try:
        free = free_bytes(directory)
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be written to: {error}") from error
    wanted = min(saves, max(1, most_kept(config, num_steps) - held))
    fit = free // need
    if fit < 1:
        raise CheckpointError(
            f"{directory} has {free:,} bytes free, one checkpoint of this model needs {need:,}; "
            "make room, or use another runs_dir"
        )
    if fit < wanted:
        logger.warning(
            "%s has %s bytes free, room for %d checkpoints of %s bytes, but %d more are to be "
            "there at a time: make room for %s bytes, or lower checkpoint.keep_last=%d",
            directory, f"{free:,}", fit, f"{need:,}", wanted, f"{wanted * need - free:,}",
            config.keep_last,
        )  # fmt: skip
