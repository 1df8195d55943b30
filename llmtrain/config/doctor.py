"""What ``llmtrain doctor`` takes."""

from dataclasses import dataclass

from llmtrain.config.fields import not_positive
from llmtrain.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class DoctorConfig:
    """``llmtrain doctor``: what this machine has, and what is in the way of a run."""

    runs_dir: str = "runs"
    """Folder of the runs, whose disk is tried; it need not exist yet."""
    quick: bool = False
    """Leave out what imports torch; what is left takes less than a second."""
    timeout_s: float = 10.0
    """Seconds one question may take before it counts as unanswered."""
    json: bool = False
    """Print one JSON object and no table."""

    def __post_init__(self) -> None:
        """Refuse a time-out that nothing can meet."""
        if problems := not_positive(self, "timeout_s"):
            raise ConfigError(problems)
