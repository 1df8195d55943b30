"""Offloaded activations: the same bits, little on the device, nothing left behind."""

import gc
import weakref

import pytest
import torch
from torch import Tensor

from llmtrain.config.model import ModelConfig
from llmtrain.config.parallel import ParallelConfig
from llmtrain.model.init import initialize_model
from llmtrain.model.transformer import Transformer
from llmtrain.parallel import offload
from llmtrain.parallel.compile import compile_blocks
from llmtrain.parallel.offload import offload_blocks
from llmtrain.parallel.recompute import apply_recompute

MODEL = ModelConfig(
    vocab_size=31,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=4,
    num_attention_heads=2,
    num_key_value_heads=1,
)
CPU = torch.device("cpu")
LENGTH = 10
HIDDEN_BYTES = 2 * LENGTH * MODEL.hidden_size * 4


def model(recompute: str = "none") -> Transformer:
    made = Transformer(MODEL)
    initialize_model(made, MODEL, seed=0)
    apply_recompute(made, ParallelConfig(recompute=recompute), torch.float32, CPU)
    return made


def forward(of: Transformer) -> Tensor:
    tokens = torch.arange(2 * LENGTH).reshape(2, LENGTH)
    positions = torch.arange(LENGTH, dtype=torch.int32).repeat(2, 1)
    return of.logits(of(tokens, positions, positions // 5)).logsumexp(-1).sum()


def gradients(of: Transformer, passes: int = 1) -> dict[str, Tensor]:
    of.zero_grad()
    for _ in range(passes):
        forward(of).backward()
    return {name: p.grad.clone() for name, p in of.named_parameters() if p.grad is not None}


class Copies:
    """Bytes that went to the host and came back."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left = self.returned = 0
        new = offload._Offload._new

        def counted(own: offload._Offload, like: Tensor, on_host: bool) -> Tensor:
            if on_host:
                self.left += like.nbytes
            else:
                self.returned += like.nbytes
            return new(own, like, on_host)

        monkeypatch.setattr(offload._Offload, "_new", counted)


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> Copies:
    return Copies(monkeypatch)


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_the_same_bits_over_several_micro_batches(recompute: str, copies: Copies) -> None:
    offloaded = model(recompute)
    offload_blocks(offloaded, CPU, min_bytes=1)
    want, got = gradients(model(), passes=2), gradients(offloaded, passes=2)
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert copies.left == copies.returned > 0
    if recompute == "full":  # of every block but the last its input, in each of two passes
        assert copies.left == 2 * 3 * HIDDEN_BYTES


def test_parameters_masks_angles_and_small_tensors_stay(copies: Copies) -> None:
    offloaded = model()
    offload_blocks(offloaded, CPU, min_bytes=HIDDEN_BYTES)
    sizes: list[tuple[int, ...]] = []
    goes = offload._Offload._goes

    def noted(own: offload._Offload, saved: offload._Saved, stays: set[int]) -> bool:
        found = goes(own, saved, stays)
        if found and saved.device is not None:
            sizes.append(tuple(saved.device.shape))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(offload._Offload, "_goes", noted)
        forward(offloaded)
    assert copies.left > 0
    weights = {tuple(p.shape) for p in offloaded.parameters()}
    weights |= {shape[::-1] for shape in weights}
    assert not weights & set(sizes)
    assert (2, 1, LENGTH, LENGTH) not in sizes


def test_the_device_holds_two_blocks_at_a_time_in_the_backward() -> None:
    """The block whose backward runs and the one before it, whatever the depth."""
    offloaded = model()
    offload_blocks(offloaded, CPU, min_bytes=1)
    held: list[int] = []
    begin = offload._Offload._begin

    def noted(own: offload._Offload, visit: offload._Visit) -> None:
        begin(own, visit)
        number = 0
        one = own._last
        while one is not None:
            number += any(s.device is not None and s.host is not None for s in one.saved.values())
            one = one.before
        held.append(number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(offload._Offload, "_begin", noted)
        forward(offloaded).backward()
    assert held == [1, 2, 2, 1]  # the last block never left the device


def test_nothing_is_kept_when_the_graph_is_gone() -> None:
    """Without the garbage collector, which a run switches off."""
    offloaded = model()
    offload_blocks(offloaded, CPU, min_bytes=1)
    alive: list[weakref.ref[offload._Saved]] = []
    made = offload._Saved.__init__

    def noted(self: offload._Saved, visit: offload._Visit, tensor: Tensor) -> None:
        made(self, visit, tensor)
        alive.append(weakref.ref(self))

    gc.collect()
    gc.disable()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(offload._Saved, "__init__", noted)
            forward(offloaded).backward()
            forward(offloaded)  # a graph without a backward
        assert alive
        assert all(saved() is None for saved in alive)
    finally:
        gc.enable()


def test_a_graph_that_is_kept_runs_backward_twice() -> None:
    offloaded, plain = model(), model()
    offload_blocks(offloaded, CPU, min_bytes=1)
    for one in (offloaded, plain):
        loss = forward(one)
        loss.backward(retain_graph=True)
        loss.backward()
    for got, want in zip(offloaded.parameters(), plain.parameters(), strict=True):
        assert got.grad is not None
        assert want.grad is not None
        assert torch.equal(got.grad, want.grad)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_blocks_offload_what_the_compiler_saves(copies: Copies) -> None:
    compiled = model()
    compile_blocks(compiled, CPU, backend="aot_eager")
    want = gradients(compiled)
    offload_blocks(compiled, CPU, min_bytes=1)
    got = gradients(compiled)
    torch._dynamo.reset()
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert copies.left == copies.returned > 0
