"""What ``llmtrain trace`` takes: a run, and a step of it or a document."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from llmtrain.config.fields import below
from llmtrain.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class TraceConfig:
    """One call of ``llmtrain trace``."""

    run: str
    """Run folder; nothing is trained and no checkpoint is read."""
    step: int | None = None
    """Step whose batch is told, from 1 as in the log; or give url or doc."""
    url: str | None = None
    """Address of a document whose steps are told."""
    doc: str | None = None
    """Id of such a document, or its beginning."""
    attempt: int | None = None
    """Start of the run, as in events.jsonl, whose batches are told; null means those that count.

    They differ where the guard went back at the end of that start, or of a later one.
    """
    planned: bool = False
    """Look at the steps up to the planned end of the run, not only at those it has done."""
    rank: int | None = None
    """Only the rows of this data-parallel rank; null means all."""
    dp_size: int | None = None
    """Data-parallel ranks the rows are shared among; null means those of the run's last start."""
    losses: bool = False
    """Sort the documents of the step by the loss they had; without step, list the steps kept.

    monitor.document_loss_steps chooses the steps whose losses a run keeps.
    """
    text: bool = False
    """Show the text of the tokens."""
    rules: bool = True
    """Ask the folder of the data pipeline what its rules changed, where it is still there."""
    verify: bool = False
    """Open the raw records, extract them again and compare the text with the tokens."""
    data: str | None = None
    """Folder that llmtrain-data wrote; null looks beside the run's stores."""
    raw: str | tuple[str, ...] = ()
    """Paths, folders or globs of raw files that are no longer where they were read."""
    sources: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)
    """Source name -> where its token store, or several, are now; others are where the run says."""
    tokenizer: str | None = None
    """Tokenizer folder; null means the run's."""
    json: str | None = None
    """File for the same as JSON lines; - prints them and no table."""

    def __post_init__(self) -> None:
        """Refuse what names no batch and no document, or both."""
        problems = below(self, 1, "step", "dp_size", "attempt") + below(self, 0, "rank")
        given = [name for name in ("step", "url", "doc") if getattr(self, name) is not None]
        problems += [
            f"{name} is empty; give its value" for name in given if getattr(self, name) == ""
        ]
        if self.losses and given not in ([], ["step"]):
            problems.append(f"losses=true takes step=N or nothing, found {' and '.join(given)}")
        elif not self.losses and len(given) != 1:
            found = " and ".join(given) or "none of them"
            problems.append(f"give one of step=N, url=ADDRESS and doc=ID, found {found}")
        if problems:
            raise ConfigError(problems)
