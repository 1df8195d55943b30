"""What a run does about spikes and about updates that cannot be made."""

from dataclasses import dataclass
from typing import Literal

from llmtrain.config.fields import below, not_positive
from llmtrain.errors import ConfigError

ESCALATIONS = (("observe",), ("skip",), ("rollback",), ("skip", "rollback"))
"""Orders that make sense."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GuardConfig:
    """What a run does about spikes and about updates that cannot be made."""

    on_spike: tuple[Literal["observe", "skip", "rollback"], ...] = ("observe",)
    """What is done about a spike, mildest first; each is followed by an event that names the step.

    [observe] does nothing. [skip] does not apply the update of a spiking step. [rollback] goes back
    to the newest checkpoint before the spike and leaves out the batches from there to the spike.
    [skip, rollback] goes back once max_skipped_in_a_row updates in a row were skipped.
    """
    spike_zscore: float | None = 6.0
    """Robust deviations above the median at which loss or gradient norm spike; null finds none."""
    spike_window_steps: int = 50
    """Applied steps that median and deviation are of; nothing spikes before the tenth."""
    max_skipped_in_a_row: int = 20
    """Skipped updates in a row that stop the run, or roll it back where on_spike says so.

    An update whose loss or gradient norm is not finite is skipped whatever on_spike says.
    """
    max_rollbacks: int = 3
    """Times a run may go back, counted over all its starts; what would be one more stops it."""
    recheck_every_steps: int | None = None
    """Steps between searches for silent corruption; null never searches.

    State that several ranks hold must have the same bits on all, and the gradients of the first
    micro-batch, computed twice block by block, must agree: about 2 steps divided by the number of
    micro-batches. Best a divisor of checkpoint.every_steps, so that what is saved was looked at.
    """
    on_corruption: Literal["stop", "rollback"] = "stop"
    """What is done where the search finds something, which the log and an event name.

    stop: the run ends, and checkpoints since the last sound search are set aside. rollback: the run
    goes back to the newest before that and makes the same steps again.
    """

    @property
    def may_go_back(self) -> bool:
        """Whether the run may need a checkpoint to go back to."""
        looks = self.recheck_every_steps is not None
        return "rollback" in self.on_spike or (looks and self.on_corruption == "rollback")

    def __post_init__(self) -> None:
        """Refuse counts below 1, other orders, and actions that nothing would set off."""
        problems = below(self, 1, "max_skipped_in_a_row", "max_rollbacks", "recheck_every_steps")
        problems += below(self, 10, "spike_window_steps") + not_positive(self, "spike_zscore")
        if self.on_spike not in ESCALATIONS:
            orders = ", ".join(_written(order) for order in ESCALATIONS)
            problems.append(f"on_spike={_written(self.on_spike)} is not known; use one of {orders}")
        elif self.spike_zscore is None and "skip" in self.on_spike:
            problems.append(
                f"spike_zscore=null finds no spikes for on_spike={_written(self.on_spike)}; set "
                "it, or use on_spike=[observe] or [rollback] (updates that are not finite)"
            )
        if problems:
            raise ConfigError(problems)


def _written(order: tuple[str, ...]) -> str:
    return f"[{','.join(order)}]"
