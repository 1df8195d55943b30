"""DeepSpeed as a guest in this process: found, quiet, on our process groups, and gone after close.

Invariant: DeepSpeed starts no process group and compiles nothing; what it logs or prints goes where
our log lines go, and nothing of one engine's groups is left when the next one is made.

    deepspeed = attach(timeout_s=600.0)
    with redirected_output():
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)
    detach(engine)
"""

import importlib
import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from datetime import timedelta
from functools import partial
from typing import Any

import torch.distributed as dist
from torch.optim import Optimizer

from llmtrain.errors import ConfigError

logger = logging.getLogger(__name__)

_SHARED_MEMORY_OP = "deepspeed_shm_comm"


class _Forward(logging.Handler):
    """Hands DeepSpeed's lines to our logger, so that they follow the run's handlers."""

    def emit(self, record: logging.LogRecord) -> None:
        """Log one line of DeepSpeed."""
        logger.log(record.levelno, "DeepSpeed: %s", record.getMessage())


def attach(timeout_s: float) -> Any:
    """Import DeepSpeed and put it on the process groups that World made.

    Args:
        timeout_s: seconds a collective may wait in the groups that DeepSpeed adds to them.

    Raises:
        ConfigError: the package is not installed.
    """
    try:
        deepspeed = importlib.import_module("deepspeed")
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"engine.kind=deepspeed needs the package {error.name}, which is not installed; "
            "run pip install 'llmtrain[deepspeed]' or use engine.kind=native"
        ) from error
    _redirect_log(importlib.import_module("deepspeed.utils.logging").logger)
    # Its all-reduce through shared memory is compiled at first use (over a minute) and belongs to
    # one world for the life of the process; gloo is what every other engine here uses.
    deepspeed.ops.__compatible_ops__[_SHARED_MEMORY_OP] = False
    _import_optimizers()
    _forget_groups()  # of an engine that failed before it could be closed
    deepspeed.init_distributed(dist_init_required=False)
    backend = importlib.import_module("deepspeed.comm.comm").cdb
    _use_current_names(backend)
    backend.new_group = partial(dist.new_group, timeout=timedelta(seconds=timeout_s))
    _restart_counters()
    return deepspeed


def detach(engine: Any) -> None:
    """Remove ``engine``'s hooks and DeepSpeed's memory of the process groups; no collective."""
    engine.destroy()
    _forget_groups()


def vouch_for(optimizer: Optimizer) -> None:
    """Name ``optimizer`` among those tested with ZeRO; DeepSpeed warns of any other."""
    tested = importlib.import_module("deepspeed.runtime.zero.utils").ZERO_SUPPORTED_OPTIMIZERS
    if type(optimizer) not in tested:
        tested.append(type(optimizer))


@contextmanager
def redirected_output() -> Iterator[None]:
    """Log at debug level what DeepSpeed prints while it sets up."""
    printed = io.StringIO()
    try:
        with redirect_stdout(printed):
            yield
    finally:
        for line in printed.getvalue().splitlines():
            logger.debug("DeepSpeed: %s", line)


def _redirect_log(theirs: logging.Logger) -> None:
    """Replace the handler with which DeepSpeed prints on stdout."""
    if not any(isinstance(handler, _Forward) for handler in theirs.handlers):
        theirs.handlers[:] = [_Forward()]


def _import_optimizers() -> None:
    """Import its Muon, which ZeRO asks for, without the compilation it would prepare.

    That loads torch's inductor, seconds of processor time in every rank, and nothing here calls it.
    """
    compiler: Any = importlib.import_module("deepspeed.runtime.compiler")
    compile_functions = compiler.compile
    compiler.compile = lambda: lambda function: function
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        compiler.compile = compile_functions


def _forget_groups() -> None:
    """Drop DeepSpeed's references to process groups; World ends the groups themselves."""
    comm: Any = importlib.import_module("deepspeed.comm.comm")
    comm.cdb = None
    importlib.import_module("deepspeed.utils.groups")._release_process_group_references()


def _use_current_names(backend: Any) -> None:
    """Give DeepSpeed the collectives under the names torch has now; the old ones warn."""
    if hasattr(dist, "all_gather_single"):  # since torch 2.13
        backend.all_gather_function = dist.all_gather_single
        backend.reduce_scatter_function = dist.reduce_scatter_single


def _restart_counters() -> None:
    """Number modules and parameters from 0 again: ZeRO 3 compares the numbers between ranks.

    They count for the life of the process, and processes differ in how many engines they made.
    """
    offload = importlib.import_module("deepspeed.runtime.zero.parameter_offload")
    (count,) = offload.DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__
    count[0] = 0
    partition = importlib.import_module("deepspeed.runtime.zero.partition_parameters")
    partition.Init.param_id = 0
