"""TensorBoard: the rows of a run as event files in RUN/tensorboard.

A resumed run goes on in the same folder; what was written after the step it goes back to is purged
by the reader, which then shows one curve. TensorBoard is optional.

    with tensorboard_sink(config.monitor, run, after_step=20) as board:    # None where it is off
        board.write(row)
"""

import importlib.util
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from llmtrain.config.training import MonitorConfig
from llmtrain.errors import ConfigError
from llmtrain.run.directory import RunDirectory
from llmtrain.train.metrics import Row
from llmtrain.train.tracker import flat

logger = logging.getLogger(__name__)

INSTALL = "pip install 'tensorboard>=2.20'"


def check_tensorboard(config: MonitorConfig) -> None:
    """Raise ConfigError when TensorBoard is asked for and is not installed."""
    if config.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise ConfigError(
            f"monitor.tensorboard=true needs tensorboard, which is not installed; run {INSTALL} or "
            "use monitor.tensorboard=false"
        )


class TensorBoard:
    """A sink that writes every number of a row as a scalar of its own name."""

    def __init__(self, writer: Any) -> None:
        """Take a ``SummaryWriter``."""
        self._writer = writer

    def write(self, row: Row) -> None:
        """Write one row; it is in the file when this returns."""
        for name, number in flat(row).items():
            if name != "train_step":
                self._writer.add_scalar(name, number, row["step"], walltime=row["time"])
        self._writer.flush()


@contextmanager
def tensorboard_sink(
    config: MonitorConfig, run: RunDirectory, after_step: int
) -> Iterator[TensorBoard | None]:
    """Open the event file of this start of the run; None where TensorBoard is off.

    Raises:
        ConfigError: it is not installed.
    """
    if not config.tensorboard:
        yield None
        return
    check_tensorboard(config)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        from torch.utils.tensorboard import SummaryWriter

    purge_step = after_step + 1 if after_step or run.tensorboard.exists() else None
    try:
        writer: Any = SummaryWriter(str(run.tensorboard), purge_step=purge_step)
    except OSError as error:
        logger.warning("TensorBoard: off (%s)", error)
        yield None
        return
    try:
        yield TensorBoard(writer)
    finally:
        try:
            writer.close()
        except OSError as error:
            logger.warning("TensorBoard lacks the last rows (%s)", error.strerror)
