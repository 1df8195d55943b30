"""The one table of a model's parameters, read by optimizer groups, sharding, checkpoints, reports.

Invariant: the table comes from the model itself, built without memory on the meta device, so it
cannot disagree with it; each stored tensor appears once, aliases carry the name they are tied to.

    table = parameter_table(config)
    decayed = [p.name for p in table if p.decay]
"""

import math
from dataclasses import dataclass

import torch

from llmtrain.config.model import ModelConfig
from llmtrain.model.mup import width_multiplier
from llmtrain.model.transformer import Transformer


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterInfo:
    """One parameter under its global name."""

    name: str
    """Hugging Face name, the same on every pipeline stage."""
    shape: tuple[int, ...]
    """Full shape, before any sharding."""
    trainable: bool
    """Whether the optimizer updates it."""
    decay: bool
    """Whether weight decay applies: matrices yes, norms and biases no."""
    width_multiplier: float = 1.0
    """muP: how many times wider its input is than at the base; 1 where its rate stays."""
    tied_to: str | None = None
    """Name of the parameter that stores this one's values; null for a stored parameter."""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def parameter_table(config: ModelConfig) -> tuple[ParameterInfo, ...]:
    """List the parameters of the whole model in the model's order; tied aliases come last."""
    with torch.device("meta"):
        model = Transformer(config)
    table = [
        ParameterInfo(
            name=name,
            shape=tuple(parameter.shape),
            trainable=parameter.requires_grad,
            decay=parameter.dim() >= 2,
            width_multiplier=width_multiplier(name, config) if parameter.dim() >= 2 else 1.0,
        )
        for name, parameter in model.named_parameters()
    ]
    if config.tie_word_embeddings:
        table.append(
            ParameterInfo(
                name="lm_head.weight",
                shape=(config.vocab_size, config.hidden_size),
                trainable=config.adapter is None,
                decay=True,
                tied_to="model.embed_tokens.weight",
            )
        )
    return tuple(table)


def num_parameters(config: ModelConfig, embedding: bool = True) -> int:
    """Count stored parameters; ``embedding=False`` leaves out the input embedding's rows.

    The output head always counts: it multiplies. With tied embeddings the one matrix is the head.
    """
    stored = sum(p.numel for p in parameter_table(config) if p.tied_to is None)
    if embedding or config.tie_word_embeddings:
        return stored
    return stored - config.vocab_size * config.hidden_size
