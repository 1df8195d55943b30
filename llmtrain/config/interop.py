"""What ``llmtrain import`` and ``llmtrain export`` take."""

import re
from dataclasses import dataclass
from typing import Literal

from llmtrain.config.fields import below
from llmtrain.errors import ConfigError

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportConfig:
    """One call of ``llmtrain import``."""

    from_: str
    """Hugging Face folder: config.json, safetensors, tokenizer files."""
    run: str
    """Run folder to make; it holds the weights as a checkpoint of step 0."""
    dtype: Literal["auto", "bf16", "fp16", "fp32", "fp64"] = "auto"
    """Type the checkpoint keeps; auto is that of each tensor, which loses nothing."""
    vocab_multiple: int = 1
    """Rows of the embedding are filled up with zeros to a multiple of this; export cuts them."""
    adapter: str | None = None
    """PEFT folder of a LoRA of the model, taken in beside it; null takes the model alone."""
    tokenizer: str | None = None
    """New tokenizer, a folder: rows of tokens it shares are kept, others made of their pieces."""

    def __post_init__(self) -> None:
        """Refuse a multiple below one."""
        if problems := below(self, 1, "vocab_multiple"):
            raise ConfigError(problems)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportConfig:
    """One call of ``llmtrain export``."""

    run: str
    """Run folder; its newest good checkpoint is used."""
    to: str
    """Hugging Face folder to make."""
    step: int | None = None
    """Optimizer step of the checkpoint; null means the newest good one."""
    dtype: Literal["auto", "bf16", "fp16", "fp32", "fp64"] = "bf16"
    """Type of the exported numbers; auto is that of the checkpoint, fp32 in runs trained here."""
    max_shard_size: str = "5GB"
    """Most bytes of a file (a larger tensor has its own): a number with KB, MB, GB or KiB..."""
    vocab_size: int | None = None
    """Rows of the vocabulary to keep; null cuts what import filled up."""
    chat_template: str | None = None
    """File with a Jinja template to put beside the tokenizer; null keeps the tokenizer's own."""
    adapter: bool = False
    """Write the run's adapter alone, as PEFT loads it; false merges it into the model."""
    base: str | None = None
    """Folder or name of the base model, for PEFT to load beside the adapter."""

    def __post_init__(self) -> None:
        """Refuse counts below one and sizes that cannot be read."""
        problems = below(self, 1, "vocab_size")
        if self.base is not None and not self.adapter:
            problems.append(
                f"base={self.base} is for adapters alone, found adapter=false; use adapter=true or "
                "leave base out"
            )
        if not problems and _bytes_of(self.max_shard_size) is None:
            problems.append(
                f"max_shard_size={self.max_shard_size} is no size above 0; write 5GB or 512MiB"
            )
        if problems:
            raise ConfigError(problems)

    @property
    def max_shard_bytes(self) -> int:
        """The size in bytes."""
        return _bytes_of(self.max_shard_size) or 0


def _bytes_of(text: str) -> int | None:
    """Read a size; None where it is none."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B|)", text.strip().upper())
    size = int(float(found[1]) * _UNITS[found[2]]) if found else 0
    return size or None
