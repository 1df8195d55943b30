"""Every implementation of the fused kernels against fp64; Triton's through its interpreter too.

The interpreter has to be on before Triton is imported and stays on, so it has its own process.
"""

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import pytest
import torch

from llmtrain.errors import ConfigError
from llmtrain.ops.kernels import KERNELS, TORCH_KERNELS, select_kernels
from tests.unit.ops import kernel_checks as checks

Call = Callable[..., Any]
CPU = torch.device("cpu")
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Call]:
    """Run functions in a process that interprets Triton kernels."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            loaded = pool.submit(checks.imported_by_plain_kernels).result()
        assert loaded == [], "who does not choose Triton must not pay for its import"

        def call(function: Call, *args: Any) -> Any:
            return pool.submit(function, *args).result()

        yield call


@pytest.mark.parametrize("name", checks.CASES)
def test_plain_kernels_are_what_they_are_defined_as(name: str) -> None:
    assert checks.check(name, "cpu", "torch") == (56, [])


def test_the_plain_step_of_the_loss_is_what_it_is_defined_as() -> None:
    assert checks.check_cross_entropy("cpu", "torch") == (56, [])


@pytest.mark.parametrize("name", checks.CASES)
def test_triton_kernels_are_what_they_are_defined_as(name: str, interpreter: Call) -> None:
    assert interpreter(checks.check, name, "cpu", "triton") == (56, [])


def test_tritons_step_of_the_loss_is_what_it_is_defined_as(interpreter: Call) -> None:
    assert interpreter(checks.check_cross_entropy, "cpu", "triton") == (56, [])


def test_a_model_with_triton_kernels_is_the_plain_model(interpreter: Call) -> None:
    errors = interpreter(checks.check_model, "cpu", "triton")
    assert len(errors) > 20
    assert max(errors.values()) <= 1e-5, errors


def test_the_interpreter_makes_them_available(interpreter: Call) -> None:
    assert interpreter(checks.interpreted) is None


@pytest.mark.gpu
@NO_GPU
@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("name", checks.CASES)
def test_kernels_on_a_gpu(name: str, kernels: str) -> None:
    assert checks.check(name, "cuda", kernels) == (56, [])


@pytest.mark.gpu
@NO_GPU
@pytest.mark.parametrize("kernels", KERNELS)
def test_the_step_of_the_loss_on_a_gpu(kernels: str) -> None:
    assert checks.check_cross_entropy("cuda", kernels) == (56, [])


@pytest.mark.gpu
@NO_GPU
def test_a_model_on_a_gpu() -> None:
    assert max(checks.check_model("cuda", "triton").values()) <= 1e-4


def test_a_cpu_takes_the_plain_kernels_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert select_kernels("auto", CPU) is TORCH_KERNELS
    assert "kernels: torch on cpu (triton: " in caplog.text


def test_what_cannot_run_or_is_unknown_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"engine.kernels=triton cannot run on cpu: .*use auto"):
        select_kernels("triton", CPU)
    with pytest.raises(ConfigError, match=r"engine.kernels=liger is unknown; use one of auto, tri"):
        select_kernels("liger", CPU)
