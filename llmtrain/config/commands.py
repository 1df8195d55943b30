"""What ``llmtrain parity`` and ``llmtrain report`` take."""

from dataclasses import dataclass

from llmtrain.config.fields import below, not_positive
from llmtrain.config.run import RunConfig
from llmtrain.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class ParityConfig(RunConfig):
    """``llmtrain parity``: the layout of a run against one device.

    It takes a whole training command line and reads model, parallel, engine, training and
    optimizer of it: batches are made from the seed, the rate is ``optimizer.lr``, nothing is kept.
    The device runs the native engine, whatever ``engine.kind`` says.
    """

    tolerance: float = 5e-6
    """Largest relative error of the loss and of any gradient that still passes."""
    steps: int = 1
    """Optimizer steps whose losses are compared; gradients are those of the first."""

    def __post_init__(self) -> None:
        """Refuse a tolerance that passes nothing and an empty comparison."""
        if problems := not_positive(self, "tolerance") + below(self, 1, "steps"):
            raise ConfigError(problems)


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportConfig:
    """``llmtrain report``: one self-contained HTML page of a run, of several, or of a sweep."""

    run: str | tuple[str, ...]
    """Folder of a run or of a sweep, or several run folders to set beside each other."""
    data: str | None = None
    """Output folder of the data pipeline, for the funnel; null looks beside the run's stores."""
    out: str | None = None
    """File to write; null: report.html in the folder, compare.html beside the first of several."""
