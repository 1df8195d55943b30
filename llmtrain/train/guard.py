"""When a step must not count, when a run goes back and when it stops; alike on every rank.

Every step leaves its loss, its gradient norm and what they are measured against on the device; the
host judges them together, at logging steps and before a save. They are sums over all ranks, so
every rank comes to the same verdict without asking. Only for a stop signal, which one rank may have
and another not, the ranks agree at step boundaries; a peer that does not answer means that it died,
and the run then ends without saving and without another collective.

Invariant: verdicts depend on the steps alone, not on when the host looks at them, and nothing is
saved that was not looked at; ``to_plain`` in a checkpoint makes a resumed run decide alike.

    with stop_signals() as asked:
        guard = Guard(config.guard, agree=world.agree, stop_asked=asked, device=device)
"""

import logging
import math
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor

from llmtrain.config.guard import GuardConfig
from llmtrain.engine.protocol import StepLimits, StepResult
from llmtrain.run.directory import ExitReason
from llmtrain.run.progress import Progress
from llmtrain.train.events import Kind
from llmtrain.train.spikes import SpikeWindow

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""Preemption by a launcher, by Slurm (``--signal=USR1@...``), and Ctrl-C."""

logger = logging.getLogger(__name__)


class Tell(Protocol):
    """Takes events, as ``Events.write`` does."""

    def __call__(self, kind: Kind, text: str, step: int | None = None) -> None:
        """Take an event of a step."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollback:
    """A run has to go back."""

    first: int
    """First step of the trouble: the checkpoint to go back to lies before it."""
    last: int | None
    """Last step whose batch is to be left out; None where the same batches come again."""
    why: str
    """What happened, for people."""


@dataclass(frozen=True, slots=True)
class _Seen:
    """What the host judges a step by."""

    step: int
    loss: float
    grad_norm: float
    middle: tuple[float, float]
    deviation: tuple[float, float]
    applied: bool

    @classmethod
    def of(cls, step: int, numbers: list[float]) -> "_Seen":
        loss, grad_norm, *window, applied = numbers
        return cls(
            step, loss, grad_norm, (window[0], window[1]), (window[2], window[3]), applied != 0
        )

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)

    def spikes(self, zscore: float) -> list[str]:
        """Say of loss and gradient norm how far each lies above what it may be."""
        values = ("loss", self.loss), ("gradient norm", self.grad_norm)
        return [
            f"{name} {value:.4g} is {(value - middle) / deviation:.1f} deviations above the median "
            f"of the steps before, {middle:.4g}"
            for (name, value), middle, deviation in zip(
                values, self.middle, self.deviation, strict=True
            )
            if value > middle + zscore * deviation
        ]


class Guard:
    """Watches spikes, skipped updates and stop requests."""

    def __init__(
        self,
        config: GuardConfig | None = None,
        *,
        agree: Callable[[bool], bool],
        stop_asked: Callable[[], bool],
        device: torch.device,
        check_every_steps: int = 10,
        tell: Tell | None = None,
        trace: str = "llmtrain trace run=RUN",
        saved: Mapping[str, Any] | None = None,
    ) -> None:
        """Stop when any rank's ``stop_asked`` is true, as ``agree`` finds out, or by ``config``.

        The host waits for the device every ``check_every_steps`` and before saves; ``agree`` raises
        RuntimeError when a peer does not answer in time. ``tell`` is given events, in which
        ``trace`` is the command that names documents; ``saved`` is what ``to_plain`` gave, if any.
        """
        self._config = config or GuardConfig()
        self._agree = agree
        self._stop_asked = stop_asked
        self._check_every_steps = check_every_steps
        self._tell = tell
        self._trace = trace
        self._window = SpikeWindow(device, self._config.spike_window_steps)
        self._seen: list[tuple[int, Tensor]] = []
        self._in_a_row = 0
        self._spiking = False
        self._skipped: list[int] = []
        off = torch.tensor(math.inf, device=device)
        self.limits = StepLimits(max_loss=off, max_grad_norm=off)
        """Largest loss and gradient norm of the next step; inf where spikes are not skipped."""
        self.rolled_back_to: list[int] = []
        """Step of the checkpoint of every time the run has gone back."""
        self.reason: ExitReason | None = None
        """Why the run must stop or go back; none while it may go on."""
        self.why = ""
        """The sentence for it, where the guard itself stopped the run."""
        self.rollback: Rollback | None = None
        """Where it must go back to; with ``ExitReason.ROLLED_BACK``."""
        self.sound_step: int | None = None
        """Last step whose state is trusted; with ``ExitReason.CORRUPTED``."""
        if saved:
            self._load(saved)
        self._limit()

    def to_plain(self) -> dict[str, Any]:
        """Return what a checkpoint keeps; waits for the device."""
        return {
            "window": self._window.to_plain(),
            "skipped_in_a_row": self._in_a_row,
            "spiking": self._spiking,
            "rolled_back_to": self.rolled_back_to,
        }

    def observe(self, progress: Progress, result: StepResult) -> None:
        """Take a step; judge it, and those before, where that is due."""
        loss = result.loss_sum / result.target_tokens
        values = torch.stack([loss, result.grad_norm.to(loss.dtype)]).double()
        window, applied = self._window, result.applied
        parts = [values, window.middle, window.deviation, applied.double().reshape(1)]
        self._seen.append((progress.step, torch.cat(parts)))
        window.add(values, keep=applied)
        self._limit()
        if progress.step % self._check_every_steps == 0 or progress.finished:
            self.look()

    def look(self) -> bool:
        """Judge the steps since the last look; whether their outcome may be saved and gone on from.

        Waits for the device; every rank finds the same.
        """
        seen, self._seen = self._seen, []
        rows = torch.stack([numbers for _, numbers in seen]).tolist() if seen else []
        for (step, _), numbers in zip(seen, rows, strict=True):
            if self._sound:
                self._judge(_Seen.of(step, numbers))
        if self._skipped:
            self._say("skipped_step", _said_skipped(self._skipped), self._skipped[-1])
        self._skipped = []
        return self._sound

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

    def stop(self, why: str) -> None:
        """End the run as one that went wrong."""
        self.reason, self.why = ExitReason.DIVERGED, why
        logger.error("%s", why)

    def distrust(self, why: str, sound_step: int) -> None:
        """Go on from what was saved up to ``sound_step``, or stop; called by all ranks alike."""
        logger.error("%s", why)
        if self._tell is not None:
            self._tell("corruption", why)
        if self._config.on_corruption == "rollback":
            self._go_back(sound_step + 1, None, why)
            return
        self.reason = ExitReason.CORRUPTED
        self.sound_step = sound_step
        self.why = (
            f"{why}; checkpoints after step {sound_step} were set aside; look at that machine, "
            "leave it out, and the same command goes on from the newest one before"
        )

    @property
    def _sound(self) -> bool:
        return self.reason in (None, ExitReason.PREEMPTED)

    def _limit(self) -> None:
        """Have the engine skip the next step if it spikes."""
        if "skip" in self._config.on_spike and self._config.spike_zscore is not None:
            most = self._window.middle + self._config.spike_zscore * self._window.deviation
            self.limits = StepLimits(max_loss=most[0], max_grad_norm=most[1])

    def _judge(self, seen: _Seen) -> None:
        zscore, policy = self._config.spike_zscore, self._config.on_spike
        above = seen.spikes(zscore) if seen.finite and zscore is not None else []
        if "skip" in policy and seen.applied:
            above = []  # the engine has compared what it had before it was rounded
        self._in_a_row = 0 if seen.applied else self._in_a_row + 1
        if not seen.applied:
            self._skipped.append(seen.step)
        if above and not self._spiking:
            self._say("spike", "; ".join(above), seen.step)
        self._spiking = bool(above)
        what = "; ".join(above) or "loss or gradient norm was not finite"
        if (above or not seen.applied) and policy == ("rollback",):
            self._go_back(seen.step, seen.step, f"step {seen.step}: {what}")
        elif self._in_a_row >= self._config.max_skipped_in_a_row:
            self._too_many(seen.step)

    def _too_many(self, step: int) -> None:
        """Go on from too many skipped updates in a row."""
        why = f"{self._in_a_row} updates in a row were skipped up to step {step}"
        if "rollback" in self._config.on_spike:
            self._go_back(step - self._in_a_row + 1, step, why)
            return
        self.stop(
            f"{why} because loss or gradient norm spiked or was not finite, expected fewer than "
            f"{self._config.max_skipped_in_a_row} (guard.max_skipped_in_a_row); lower optimizer.lr "
            "or optimizer.grad_clip_norm and start again from an older checkpoint"
        )

    def _go_back(self, first: int, last: int | None, why: str) -> None:
        times, most = len(self.rolled_back_to), self._config.max_rollbacks
        if times >= most:
            self.stop(
                f"{why}; the run has gone back {times} times, to steps "
                f"{', '.join(map(str, self.rolled_back_to))}, and guard.max_rollbacks={most} "
                "allows no more: look at the documents that events.jsonl names, lower "
                "optimizer.lr or optimizer.grad_clip_norm, or raise it"
            )
            return
        self.reason = ExitReason.ROLLED_BACK
        self.rollback = Rollback(first=first, last=last, why=why)

    def _say(self, kind: Kind, text: str, step: int) -> None:
        logger.warning("step %d: %s", step, text)
        if self._tell is not None:
            self._tell(kind, f"{text}; {self._trace} step={step} names the documents", step)

    def _load(self, saved: Mapping[str, Any]) -> None:
        self._window.load(saved["window"])
        self._in_a_row = int(saved["skipped_in_a_row"])
        self._spiking = bool(saved["spiking"])
        self.rolled_back_to = [int(step) for step in saved["rolled_back_to"]]


def _said_skipped(steps: list[int]) -> str:
    """Say of which steps the updates were not made."""
    if len(steps) == 1:
        return "the update of 1 step was skipped: loss or gradient norm spiked or was not finite"
    return (
        f"the updates of {len(steps)} steps from {steps[0]} to {steps[-1]} were skipped: loss or "
        "gradient norm spiked or was not finite"
    )


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
