"""muP, the maximal update parametrization: one learning rate and spread for every width.

The Adam column of arXiv:2203.03466, table 8. Where the model is m times wider than
``model.mup_base_width``, the matrices of the blocks start narrower by sqrt(m) and learn at 1 / m of
the rate, and logits are divided by m; embedding, head, norms and biases stay. The head may so be
tied. Scores keep 1 / sqrt(head_dim) instead of 1 / head_dim: widen by more heads of one size, and
the two differ by a constant. Rates are optim/optimizer.py's.

Invariant: at the base, as without muP, every number is that of the standard parametrization, bit
by bit. The division sits after the final norm, on the last stage alone, so multiplying the norm's
weight by ``output_multiplier`` gives an equal model without muP.

    config = replace(config, hidden_size=1024, mup_base_width=256)
    weights["model.norm.weight"] *= output_multiplier(config)    # for readers that know no muP
"""

from llmtrain.config.model import ModelConfig


def output_multiplier(config: ModelConfig) -> float:
    """Return what the last stage's hidden states are multiplied by before the head."""
    return 1.0 / config.width_multiplier


def width_multiplier(name: str, config: ModelConfig) -> float:
    """Return how many times wider than at the base the input of the matrix ``name`` is.

    It is 1 for embedding and head, which muP leaves alone, and for the B of an adapter, whose input
    is as wide as its rank.
    """
    widens = name.startswith("model.layers.") and not name.endswith(".lora_B.weight")
    return config.width_multiplier if widens else 1.0
