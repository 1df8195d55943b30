"""The exceptions a user can meet; a message says what was found, expected, and what to change.

The command line prints the message alone and exits with their status: these are never tracebacks.
Anything else that escapes is a fault of ours (status 1).
"""

from typing import ClassVar


class LLMTrainError(Exception):
    """An input or a configuration is wrong; the message is one the user can act on."""

    status: ClassVar[int] = 2
    """Exit status of a command that ends with it."""


class ConfigError(LLMTrainError):
    """The configuration is wrong; holds every problem found, not only the first."""

    def __init__(self, problems: str | list[str]) -> None:
        """Take one sentence per problem."""
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class DataError(LLMTrainError):
    """A token store, a document shard or a raw file is missing, damaged or of another kind."""


class CheckpointError(LLMTrainError):
    """A checkpoint is missing, damaged or belongs to another run."""


class LayoutError(LLMTrainError):
    """The requested layout does not fit the model, the batch or the number of processes."""


class OutOfMemoryError(LLMTrainError):
    """A device has no room for what the run asks for; the message says what would lower it."""

    status = 4
