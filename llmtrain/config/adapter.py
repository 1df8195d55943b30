"""Low-rank adapters beside the matrices of a model that itself stays as it is."""

import math
from dataclasses import dataclass
from typing import Literal

from llmtrain.config.fields import below, not_positive
from llmtrain.errors import ConfigError

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The matrices of a block, in its order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterConfig:
    """LoRA (arXiv:2106.09685): W x becomes W x + scale B A x, and only A and B are trained."""

    rank: int = 16
    """Rows r of A [r, I] and columns of B [O, r]."""
    alpha: float = 32.0
    """What B A x is multiplied by, times the rank."""
    use_rslora: bool = False
    """Divide ``alpha`` by sqrt(rank), not by rank (arXiv:2312.03732)."""
    targets: tuple[str, ...] = TARGETS
    """Matrices of every block that have an adapter, out of the seven there are."""
    quantize_base: Literal["nf4"] | None = None
    """Keep the matrices of the blocks in 4 bits (QLoRA, arXiv:2305.14314); null keeps them whole.

    ``nf4`` is bitsandbytes' 4-bit NormalFloat in blocks of 64 values.
    """

    def __post_init__(self) -> None:
        """Refuse ranks below one and matrices that blocks do not have."""
        problems = below(self, 1, "rank") + not_positive(self, "alpha")
        unknown = [name for name in self.targets if name not in TARGETS]
        if unknown or not self.targets or len(set(self.targets)) < len(self.targets):
            problems.append(
                f"targets=[{','.join(self.targets)}] must name matrices of a block, each once; "
                f"use some of {', '.join(TARGETS)}"
            )
        if problems:
            raise ConfigError(problems)

    @property
    def scale(self) -> float:
        """What B A x is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)
