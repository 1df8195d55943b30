"""How far a run is: two integers from which batches and learning rate follow."""

from dataclasses import dataclass

from llmtrain.config.ramp import StepSchedule
from llmtrain.run.directory import ExitReason


@dataclass(slots=True, kw_only=True)
class Progress:
    """Steps done and tokens seen; a skipped update counts, for its batch is gone."""

    num_steps: int
    """Steps of the whole run."""
    steps: StepSchedule
    """How many training tokens each of them has over all ranks."""
    stop_at_step: int | None = None
    """Step after which this process ends although the run does not."""
    step: int = 0
    """Steps done, 1-based after the update."""

    @property
    def tokens(self) -> int:
        """Training tokens seen."""
        return self.steps.tokens(self.step)

    @property
    def next_tokens(self) -> int:
        """Training tokens seen once the next step is done: what the schedule reads."""
        return self.steps.tokens(self.step + 1)

    def last_tokens(self, num_steps: int) -> dict[int, int]:
        """Training tokens of the last ``num_steps`` steps, by the length of their rows."""
        counts: dict[int, int] = {}
        for step in range(self.step - num_steps, self.step):
            _, units, length = self.steps.shape(step)
            counts[length] = counts.get(length, 0) + units * self.steps.unit_tokens
        return counts

    @property
    def finished(self) -> bool:
        """Whether this process has nothing left to do."""
        return self.step >= min(self.num_steps, self.stop_at_step or self.num_steps)

    @property
    def end_reason(self) -> ExitReason:
        """What to call it when nothing is left to do."""
        return ExitReason.DONE if self.step >= self.num_steps else ExitReason.STOP_AT_STEP

    def advance(self) -> None:
        """Count one step."""
        self.step += 1
