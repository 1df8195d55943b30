"""When a step must not count and when a run must stop; what it decides is the same on every rank.

A signal only sets a local flag; the ranks agree on it at step boundaries, so that all of them save
the same step. A peer that does not answer means that it died: the run then ends without saving and
without another collective.

    with stop_signals() as asked:
        guard = Guard(agree=world.agree, stop_asked=asked, device=device)
"""

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import torch

from llmtrain.engine.protocol import StepLimits, StepResult
from llmtrain.train.progress import Progress
from llmtrain.train.rundir import ExitReason

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""Preemption by a launcher, by Slurm (``--signal=USR1@...``), and Ctrl-C."""

logger = logging.getLogger(__name__)


class Guard:
    """Watches skipped updates and stop requests at step boundaries."""

    def __init__(
        self,
        *,
        agree: Callable[[bool], bool],
        stop_asked: Callable[[], bool],
        device: torch.device,
        check_every_steps: int = 10,
        max_skipped_in_a_row: int = 20,
    ) -> None:
        """Stop when any rank's ``stop_asked`` is true, as ``agree`` finds out, or on divergence.

        The host waits for the device every ``check_every_steps`` only; ``agree`` raises
        RuntimeError when a peer does not answer in time.
        """
        self._agree = agree
        self._stop_asked = stop_asked
        self._check_every_steps = check_every_steps
        self._max_skipped = max_skipped_in_a_row
        off = torch.tensor(float("inf"), device=device)
        self.limits = StepLimits(max_loss=off, max_grad_norm=off)
        """Largest loss and gradient norm of the next step; only finiteness is asked for now."""
        self.reason: ExitReason | None = None
        """Why the run must stop; none while it may go on."""
        self._in_a_row = torch.zeros((), dtype=torch.int64, device=device)
        self._longest = self._in_a_row

    def observe(self, progress: Progress, result: StepResult) -> None:
        """Count updates that were skipped one after the other, on the device."""
        self._in_a_row = torch.where(result.applied, 0, self._in_a_row + 1)
        self._longest = torch.maximum(self._longest, self._in_a_row)
        if progress.step % self._check_every_steps and not progress.finished:
            return
        skipped = int(self._longest)
        self._longest = self._in_a_row
        if skipped >= self._max_skipped:
            self.reason = ExitReason.DIVERGED
            logger.error(
                "%d updates in a row were skipped up to step %d because the loss or the gradient "
                "norm was not finite, expected fewer than %d; lower optimizer.lr or "
                "optimizer.grad_clip_norm and start again from an older checkpoint",
                skipped, progress.step, self._max_skipped,
            )  # fmt: skip
        elif skipped:
            logger.warning("%d updates in a row skipped up to step %d", skipped, progress.step)

    def stop_requested(self) -> bool:
        """Whether every rank stops here; sets ``reason``. Called by all ranks at each boundary."""
        if self.reason is None:
            try:
                if self._agree(self._stop_asked()):
                    self.reason = ExitReason.PREEMPTED
            except RuntimeError as error:
                self.reason = ExitReason.PEER_LOST
                logger.error("a rank does not answer, stopping without saving: %s", error)
        return self.reason is not None


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Turn the first stop signal into a flag and give its reader; a second Ctrl-C interrupts.

    Handlers are put back on exit. Outside the main thread nothing is installed.
    """
    asked = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        asked.set()
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return
    before = {number: signal.signal(number, on_signal) for number in STOP_SIGNALS}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
