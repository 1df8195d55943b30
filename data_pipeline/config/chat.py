"""Settings of ``llmtrain-data chat``."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date
from typing import Literal

from data_pipeline.config.checks import check_positive, check_share
from llmtrain.errors import ConfigError

Kind = Literal["messages", "preferences"]
_GIVEN = {
    **dict.fromkeys(("messages", "tools"), "every row gives its own"),
    **dict.fromkeys(("documents", "add_generation_prompt"), "the command decides it"),
    **dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), "the tokenizer gives it"),
    "strftime_now": "date=YYYY-MM-DD gives it",
}
"""Variables of a template that are no setting, and where they come from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatConfig:
    """``llmtrain-data chat``: conversations or preference pairs to a token store with roles."""

    input: str | tuple[str, ...]
    """Path, glob, folder or hf:NAME, or a list of them: JSONL or Parquet, a row a conversation."""
    tokenizer: str
    """Tokenizer folder."""
    out: str
    """Folder of the store; its name is the name of the source."""
    sequence_length: int
    """Most tokens of a conversation, or of the two texts of a pair together, EOS included, and the
    windows the store is packed for: as training.sequence_length will be. What is longer is left
    out and counted."""
    kind: Kind = "messages"
    """messages: conversations, or prompts with a completion. preferences: pairs of a chosen and a
    rejected answer."""
    train_on: Literal["all", "last"] = "all"
    """Which turns of the assistant are learned: all, or the last one of each conversation."""
    chat_template: str | None = None
    """File with a chat template; null takes the tokenizer's own."""
    template_arguments: Mapping[str, str | bool] = field(default_factory=dict)
    """Further variables of the template, such as enable_thinking; messages, tools and the names of
    special tokens are there without it."""
    date: str | None = None
    """Day that a template is told as today, YYYY-MM-DD; null tells none, and a template that
    writes the date takes the one it has for this."""
    id_field: str | None = None
    """Field with a stable, unique id; null numbers the rows of each file."""
    validation_share: float = 0.0
    """Share of the conversations held out, in [0, 1), by a hash of their ids; they go to a store of
    their own, OUT/validation."""
    part_bytes: int = 256_000_000
    """Largest number of bytes of text behind one .bin file, save for a document that is larger."""
    num_workers: int = 1
    """Worker processes."""
    time_limit_s: float = 36_000.0
    """Seconds one attempt at one file may take."""

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        check_share(self.validation_share)
        check_positive(
            sequence_length=self.sequence_length, part_bytes=self.part_bytes,
            num_workers=self.num_workers, time_limit_s=self.time_limit_s,
        )  # fmt: skip
        if taken := [name for name in _GIVEN if name in self.template_arguments]:
            raise ConfigError([
                f"template_arguments.{name} is no further variable, {_GIVEN[name]}; leave it out"
                for name in taken
            ])  # fmt: skip
        if self.date is not None:
            try:
                date.fromisoformat(self.date)
            except ValueError:
                raise ConfigError(f"date={self.date} is no day; write it as 2026-01-31") from None
