"""fp8 products against fp64 of the same operands, which maps are converted, and what is refused."""

import inspect
import logging
import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from llmtrain.config.engine import EngineConfig
from llmtrain.config.model import ModelConfig
from llmtrain.errors import ConfigError
from llmtrain.model.layers import Linear
from llmtrain.model.transformer import Transformer
from llmtrain.parallel import float8
from llmtrain.parallel.float8 import Float8Product, convert_blocks

MODEL = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=1,
    attention_bias=True,
)
"""Keys and values have 8 outputs, which float8 does not take."""

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ENGINE = EngineConfig(precision="bf16", fp8="rowwise", device="cpu")


def random(*shape: int, seed: int) -> Tensor:
    """Values whose sizes vary by row a hundredfold, as activations do."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*shape, generator=generator)
    return (values * 10 ** torch.rand(*shape[:-1], 1, generator=generator)).bfloat16()


def error(found: Tensor | None, want: Tensor) -> float:
    assert found is not None
    return ((found.double() - want).norm() / want.norm()).item()


# e4m3 has 3 bits of mantissa, e5m2 2: a cast errs by at most 2^-4 or 2^-3 of a value, and by less
# than 0.6 of that in the mean square; a product has two operands, whose errors are independent.
E4M3, E5M2 = 0.6 * 2.0**-4, 0.6 * 2.0**-3
BOUNDS = {"rowwise": (E4M3, E4M3), "tensorwise": (E4M3, E5M2)}
"""Errors of a cast of inputs and weights, and of gradients, by recipe."""


@pytest.mark.parametrize("recipe", list(BOUNDS))
@pytest.mark.parametrize("seed", range(10))
def test_products_are_those_of_fp64_within_the_format(recipe: str, seed: int) -> None:
    sizes = torch.randint(1, 9, (3,), generator=torch.Generator().manual_seed(seed))
    tokens, size_in, size_out = (16 * sizes).tolist()
    x = random(2, tokens, size_in, seed=seed).requires_grad_()
    weight = random(size_out, size_in, seed=seed + 100).requires_grad_()
    bias = random(size_out, seed=seed + 200).requires_grad_()
    gradient = random(2, tokens, size_out, seed=seed + 300)
    out = Float8Product.of(recipe, emulate=True, gathered=False)(x, weight, bias)
    out.backward(gradient)

    exact = x.detach().double(), weight.detach().double(), gradient.double()
    product = exact[0] @ exact[1].T
    cast, cast_gradient = BOUNDS[recipe]
    forward, backward = 2**0.5 * cast, (cast**2 + cast_gradient**2) ** 0.5
    assert error(out - bias, product) < forward + 2.0**-8  # and the bias is rounded to bf16
    assert error(x.grad, exact[2] @ exact[1]) < backward
    flat = exact[2].flatten(0, 1), exact[0].flatten(0, 1)
    assert error(weight.grad, flat[0].T @ flat[1]) < backward
    assert error(bias.grad, gradient.double().sum((0, 1))) < 2.0**-7
    assert error(out - bias, product) > 2.0**-8, "products were not in fp8"
    assert out.dtype == torch.bfloat16


def converted(model: ModelConfig, engine: EngineConfig = ENGINE) -> Transformer:
    with torch.device("meta"):
        transformer = Transformer(model)
    convert_blocks(transformer, engine, CPU, gathered=False)
    return transformer


def test_maps_that_fit_are_converted_and_the_others_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with torch.device("meta"):
        before = dict(Transformer(MODEL).named_parameters())
    caplog.set_level(logging.INFO)
    transformer = converted(MODEL)
    maps = {name: m for name, m in transformer.named_modules() if isinstance(m, Linear)}
    left = [name.split(".")[-1] for name, m in maps.items() if m.product is None]
    assert left == ["k_proj", "v_proj", "k_proj", "v_proj", "lm_head"]
    assert all(type(m) is Linear for m in maps.values())
    after = dict(transformer.named_parameters())
    assert list(after) == list(before)
    assert all(type(p) is torch.nn.Parameter for p in after.values())
    (line,) = [r.message for r in caplog.records if r.name == float8.__name__]
    assert line == (
        "fp8 rowwise: 10 matrices of the blocks, emulated in fp32; in bf16: embedding, norms, "
        "head, 2 self_attn.k_proj [8, 32], 2 self_attn.v_proj [8, 32] (sizes are no multiples of "
        "16)"
    )


def test_a_model_that_none_of_it_fits_is_refused() -> None:
    small = replace(MODEL, hidden_size=24, intermediate_size=36, num_attention_heads=3)
    with pytest.raises(ConfigError, match="finds no matrix with sizes that are multiples of 16, "):
        converted(small)


def test_none_changes_nothing() -> None:
    transformer = converted(MODEL, replace(ENGINE, fp8="none"))
    assert all(m.product is None for m in transformer.modules() if isinstance(m, Linear))


def test_a_missing_package_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(float8.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"needs the torchao package: pip install 'torchao>=0.18'"
    ):
        converted(MODEL)


def test_importing_torchao_hides_two_kinds_of_lines_and_no_others(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def said() -> list[str]:
        caplog.clear()
        logging.getLogger("torchao").warning("Failed to load _C.so: no such GPU")
        logging.getLogger("torchao").warning("this recipe is deprecated")
        logging.getLogger("torch.utils._pytree").warning("%s is an Enum subclass and", "Kind")
        return [record.getMessage() for record in caplog.records]

    with float8._quiet_import():
        assert said() == ["this recipe is deprecated"]
    assert "Failed to load _C.so: no such GPU" in said()


def test_a_gpu_without_float8_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for found, reason in (((8, 6), "capability 8.9 .* found 8.6"), ((9, 0), None)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=found: found)
        said = float8.unavailable(CUDA)
        assert said is None if reason is None else re.search(reason, said or "")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"fp8": "rowwise"},
            "fp8=rowwise found with precision=fp32: .* use precision=bf16 or fp8=",
        ),
        ({"master_dtype": "bf16"}, "master_dtype=bf16 found with precision=fp32"),
        (
            {"precision": "bf16", "fp8": "rowwise", "fp8_all_gather": True},
            "use fp8=tensorwise or fp8_all_gather=false",
        ),
    ],
)
def test_settings_without_effect_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineConfig(**fields)  # type: ignore[arg-type]


def test_what_is_taken_from_torchao_is_there() -> None:
    """None of these is in its public interface: other versions may name them otherwise."""
    from torchao.float8.float8_linear import matmul_with_hp_or_float8_args
    from torchao.float8.float8_utils import amax_to_scale
    from torchao.float8.fsdp_utils import WeightWithDynamicFloat8CastTensor

    expected = {
        matmul_with_hp_or_float8_args.forward: [
            "ctx", "input_hp", "weight_hp_t", "linear_mm_config", "config",
        ],
        WeightWithDynamicFloat8CastTensor.__init__: [
            "self", "tensor", "linear_mm_config", "dtype", "precomputed_scale",
        ],
        amax_to_scale: ["amax", "float8_dtype", "round_scales_to_power_of_2"],
    }  # fmt: skip
    for function, names in expected.items():
        assert list(inspect.signature(function).parameters) == names
