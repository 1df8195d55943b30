"""muP: what depends on the width and what does not, and activations that keep their size."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llmtrain.config.model import ModelConfig
from llmtrain.config.training import OptimizerConfig
from llmtrain.engine.protocol import LR_MULTIPLIER
from llmtrain.engine.state import gated_step
from llmtrain.engine.step import set_learning_rate
from llmtrain.errors import ConfigError
from llmtrain.model.init import initialize_model, standard_deviation
from llmtrain.model.mup import output_multiplier
from llmtrain.model.parameters import parameter_table
from llmtrain.model.transformer import Transformer
from llmtrain.optim.optimizer import optimizer_factory
from llmtrain.parallel.matrices import run_alone

WIDTHS = (32, 64, 256)
BASE = WIDTHS[0]


def model_of(width: int, mup: bool, tied: bool = False) -> ModelConfig:
    return ModelConfig(
        vocab_size=64,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=width // 16,
        num_key_value_heads=max(1, width // 32),
        head_dim=16,
        tie_word_embeddings=tied,
        mup_base_width=BASE if mup else None,
    )


def optimizer_of(
    model: Transformer, config: ModelConfig, kind: str = "adamw"
) -> torch.optim.Optimizer:
    table = {info.name: info for info in parameter_table(config)}
    rows = [(table[name], parameter) for name, parameter in model.named_parameters()]
    return optimizer_factory(OptimizerConfig(kind=kind, weight_decay=0.1))(rows, run_alone)


def moves(kind: str, mup: bool, tied: bool, lr: float = 0.004, steps: int = 4) -> list[list[float]]:
    """How far logits and the residual stream move in a few steps, root mean square, by width."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, 64, (4, 33), generator=generator)
    positions = torch.arange(32).expand(4, 32)
    found = []
    for width in WIDTHS:
        config = model_of(width, mup, tied)
        model = Transformer(config)
        initialize_model(model, config, seed=1)
        optimizer = optimizer_of(model, config, kind)
        stream = list[Tensor]()
        norm = model.model.norm
        assert norm is not None
        norm.register_forward_hook(lambda _, args, out, to=stream: to.append(args[0]))
        logits = [model.logits(model(tokens[:, :-1], positions))]
        for _ in range(steps):
            torch.autograd.backward(
                F.cross_entropy(logits[-1].flatten(0, 1), tokens[:, 1:].flatten())
            )
            set_learning_rate(optimizer, lr)
            gated_step(optimizer, skip=torch.zeros(()), divisor=None)
            model.zero_grad()
            logits.append(model.logits(model(tokens[:, :-1], positions)))
        moved = [x[-1].detach() - x[0].detach() for x in (logits, stream)]
        found.append([float(x.square().mean().sqrt()) for x in moved])
    return found


@pytest.mark.parametrize(
    ("kind", "tied"), [("adamw", False), ("adamw", True), ("lion", False), ("muon", False)]
)
def test_updates_move_activations_alike_at_every_width(kind: str, tied: bool) -> None:
    for mup in (True, False):
        first, *_, last = moves(kind, mup, tied)
        growth = [b / a for a, b in zip(first, last, strict=True)]
        if mup:
            assert all(1 / 1.6 < ratio < 1.6 for ratio in growth), growth
        else:
            assert growth[0] > 3.0, growth


def test_spread_of_start_values() -> None:
    plain, wide = model_of(128, mup=False), model_of(128, mup=True)
    assert wide.width_multiplier == 4.0
    for info in parameter_table(wide):
        ratio = standard_deviation(info.name, wide) / standard_deviation(info.name, plain)
        assert ratio == (0.5 if ".layers." in info.name else 1.0)


@pytest.mark.parametrize(("kind", "share"), [("adamw", 0.25), ("lion", 0.25), ("muon", 0.5)])
def test_rates_fall_with_the_width_and_what_a_step_decays_stays(kind: str, share: float) -> None:
    config = model_of(128, mup=True)
    model = Transformer(config)
    optimizer = optimizer_of(model, config, kind)
    set_learning_rate(optimizer, 0.5)
    names = {parameter: name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            in_block = parameter.dim() == 2 and ".layers." in names[parameter]
            assert group[LR_MULTIPLIER] == (share if in_block else 1.0)
            assert group["lr"] == 0.5 * group[LR_MULTIPLIER]
            decayed = 0.05 if parameter.dim() == 2 else 0.0
            assert group["lr"] * group["weight_decay"] == pytest.approx(decayed)


@pytest.mark.parametrize("tied", [False, True])
def test_at_the_base_nothing_changes(tied: bool) -> None:
    plain, base = model_of(BASE, False, tied), model_of(BASE, True, tied)
    assert parameter_table(plain) == parameter_table(base)
    tokens, positions = torch.arange(8)[None], torch.arange(8)[None]
    logits = []
    for config in (plain, base):
        model = Transformer(config)
        initialize_model(model, config, seed=1)
        logits.append(model.logits(model(tokens, positions)))
    assert torch.equal(*logits)


@pytest.mark.parametrize("tied", [False, True])
def test_the_multiplier_folds_into_the_last_norm(tied: bool) -> None:
    config = model_of(48, True, tied)
    model, folded = Transformer(config), Transformer(replace(config, mup_base_width=None))
    initialize_model(model, config, seed=1)
    weights = model.state_dict()
    weights["model.norm.weight"] = weights["model.norm.weight"] * output_multiplier(config)
    folded.load_state_dict(weights)
    tokens, positions = torch.arange(8)[None], torch.arange(8)[None]
    want = model.logits(model(tokens, positions))
    torch.testing.assert_close(folded.logits(folded(tokens, positions)), want)
    assert want.abs().max() > 0


def test_a_base_below_one_is_refused() -> None:
    with pytest.raises(ConfigError, match="mup_base_width=0"):
        replace(model_of(32, True), mup_base_width=0)
