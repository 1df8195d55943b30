"""Context parallelism against the whole sequence on one device."""

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from llmtrain.config.engine import EngineConfig
from llmtrain.config.model import ModelConfig
from llmtrain.config.parallel import ParallelConfig
from llmtrain.data.batch import StepBatch
from llmtrain.data.synthetic import BatchShape, synthetic_batch
from llmtrain.errors import LayoutError
from llmtrain.model.init import initialize_model
from llmtrain.model.layers import Block
from llmtrain.model.transformer import Transformer
from llmtrain.ops.attention.choose import ATTENTION
from llmtrain.ops.attention.reference import reference_attention
from llmtrain.ops.attention.sdpa import sdpa_attention
from llmtrain.ops.attention.spec import AttentionFunction, AttentionSpec
from llmtrain.parallel.context import METHODS, context_attention, split_sequence, whole_sequence
from llmtrain.parallel.mesh import World
from llmtrain.parallel.place import Place
from llmtrain.parallel.recompute import recompute_block
from llmtrain.train.loss import pretraining_loss
from tests.world import RankPool

LENGTH = 48
BACKENDS = {name: ATTENTION[name].function for name in ("documents", "sdpa", "reference")}
TOLERANCE = {"fp64": 1e-12, "fp32": 5e-6, "bf16": 2e-2}
"""bf16 keeps 8 bits: 2e-2 is five roundings."""
DTYPE = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """Rows of documents and what sees what in them."""

    rows: tuple[tuple[int, ...], ...]
    heads: int = 8
    groups: int = 4
    window: int | None = None
    document_ids: bool = True
    softcap: float | None = None

    def spec(self) -> AttentionSpec:
        positions = [torch.cat([torch.arange(n) for n in row]) for row in self.rows]
        ids = [torch.arange(len(r)).repeat_interleave(torch.tensor(r)) for r in self.rows]
        return AttentionSpec.within(
            torch.stack(positions).int(),
            torch.stack(ids).int() if self.document_ids else None,
            self.window,
            self.softcap,
        )


CASES = {
    "documents": Case(((5, 1, 19, 23), (48,))),
    "short documents": Case(((3,) * 16, (1, 2, 3) * 8)),
    "one document": Case(((48,),), document_ids=False),
    "window": Case(((30, 18), (48,)), window=7),
    "window of one": Case(((48,),), window=1, document_ids=False),
    "one head for each key": Case(((20, 28),), heads=4),
    "capped scores": Case(((5, 1, 19, 23), (48,)), softcap=2.0),
}


def relative(found: Tensor, expected: Tensor) -> float:
    """Error over the norm; a gradient that is 0 (a window of one) counts as 1 long."""
    return ((found.double() - expected).norm() / max(expected.norm().item(), 1.0)).item()


def tensors(case: Case, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v and the gradient of the output, equal on all ranks."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(len(case.rows), LENGTH, n, 8) for n in (case.heads, case.groups, case.groups)]
    drawn = [torch.randn(s, generator=generator, dtype=torch.float64) for s in (*shapes, shapes[0])]
    return [t.to(dtype) for t in drawn]


def part(x: Tensor, rank: int, size: int) -> Tensor:
    chunks = x.chunk(2 * size, dim=1)
    return torch.cat((chunks[rank], chunks[2 * size - 1 - rank]), dim=1)


def attend(
    place: Place, method: str, backend: str, precision: str, names: tuple[str, ...]
) -> dict[str, dict[str, Tensor]]:
    """This rank's output, lse and gradients of every case, run twice on one spec."""
    parallel = ParallelConfig(cp=place.world_size, dp_shard=1)
    results = {}
    with World(parallel, EngineConfig(device="cpu", timeout_s=60.0), place) as world:
        group = world.group("cp")
        assert group is not None
        run = context_attention(method, BACKENDS[backend], group)
        for name in names:
            spec = CASES[name].spec()
            mine = AttentionSpec.within(
                part(spec.q_positions, world.cp_rank, place.world_size),
                part(spec.q_document_ids, world.cp_rank, place.world_size)
                if CASES[name].document_ids
                else None,
                spec.sliding_window,
                spec.softcap,
                extent=(24, 48) if world.cp_rank % 2 else None,  # known to the host or not
            )
            q, k, v, dout = (
                part(t, world.cp_rank, place.world_size)
                for t in tensors(CASES[name], DTYPE[precision])
            )
            leaves = [t.requires_grad_() for t in (q, k, v)]
            with torch.no_grad():
                first, _ = run(*leaves, mine)
            out, lse = run(*leaves, mine)
            assert torch.equal(first, out)
            dq, dk, dv = torch.autograd.grad(out, leaves, dout)
            results[name] = {"out": out.detach(), "dq": dq, "dk": dk, "dv": dv}
            if lse is not None:
                results[name]["lse"] = lse.detach().transpose(1, 2)
    return results


def expected(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    q, k, v, dout = (t.double() for t in tensors(case, dtype))
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out, lse = reference_attention(*leaves, case.spec())
    assert lse is not None
    dq, dk, dv = torch.autograd.grad(out, leaves, dout)
    return {"out": out, "lse": lse.transpose(1, 2), "dq": dq, "dk": dk, "dv": dv}


@pytest.mark.parametrize(
    ("backend", "precision", "size"),
    [
        ("documents", "fp64", 2), ("documents", "fp64", 4), ("documents", "bf16", 4),
        ("sdpa", "fp64", 2), ("sdpa", "fp32", 4), ("sdpa", "bf16", 2),
    ],
)  # fmt: skip
@pytest.mark.parametrize("method", METHODS)
def test_every_method_equals_the_whole_sequence(
    ranks: RankPool, method: str, backend: str, precision: str, size: int
) -> None:
    parts = ranks.run(attend, method, backend, precision, tuple(CASES), size=size)
    for name, case in CASES.items():
        for field, value in expected(case, DTYPE[precision]).items():
            hidden = method == "ulysses" or (backend == "sdpa" and case.softcap is None)
            if field == "lse" and method != "ring" and hidden:
                assert field not in parts[0][name]
                continue
            found = whole_sequence([p[name][field] for p in parts])
            assert relative(found, value) < TOLERANCE[precision], (name, field)


def test_the_ring_takes_the_blocks_of_the_chosen_backend(ranks: RankPool) -> None:
    parts = ranks.run(attend, "ring", "reference", "fp32", ("documents",), size=2)
    for field, value in expected(CASES["documents"], torch.float32).items():
        found = whole_sequence([p["documents"][field] for p in parts])
        assert relative(found, value) < 1e-7, field


MODEL = ModelConfig(
    vocab_size=67, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
    num_attention_heads=8, num_key_value_heads=4, qk_norm=True, sliding_window=11,
)  # fmt: skip
SHAPE = BatchShape(rows=3, sequence_length=LENGTH, vocab_size=MODEL.vocab_size)


def run_model(batch: StepBatch, attention: AttentionFunction, recompute: bool) -> list[Tensor]:
    """Loss, its sum per source and the gradient of every parameter."""
    model = Transformer(MODEL, attention=attention).double()
    initialize_model(model, MODEL, seed=2)
    if recompute:
        for block in model.model.layers.values():
            assert isinstance(block, Block)
            recompute_block(block, "full")
    hidden = model(batch.tokens, batch.positions, batch.document_ids)
    loss, sums = pretraining_loss(SHAPE.num_sources, chunk_tokens=16)(hidden, model.head, batch)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return [loss.detach(), sums["source_loss_sum"], *gradients]


def train(place: Place, method: str, recompute: bool) -> list[Tensor]:
    """The sums over ranks of what ``run_model`` gives."""
    size = place.world_size
    parallel = ParallelConfig(cp=size, dp_shard=1)
    with World(parallel, EngineConfig(device="cpu", timeout_s=60.0), place) as world:
        group = world.group("cp")
        assert group is not None
        batch = split_sequence(synthetic_batch(SHAPE, seed=1, step=0), world.cp_rank, size)
        attention = context_attention(method, sdpa_attention, group)
        return [world.sum(t, "cp") for t in run_model(batch, attention, recompute)]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_a_model_gives_the_loss_and_gradients_of_one_device(
    ranks: RankPool, method: str, recompute: bool
) -> None:
    whole = run_model(synthetic_batch(SHAPE, seed=1, step=0), reference_attention, recompute=False)
    for found in ranks.run(train, method, recompute, size=4 if recompute else 2):
        for value, wanted in zip(found, whole, strict=True):
            assert relative(value, wanted) < TOLERANCE["fp64"]


def kept_by_the_ring(place: Place) -> int:
    """Number of elements that autograd keeps of one attention."""
    parallel = ParallelConfig(cp=place.world_size, dp_shard=1)
    kept = []
    with World(parallel, EngineConfig(device="cpu", timeout_s=60.0), place) as world:
        group = world.group("cp")
        assert group is not None
        run = context_attention("ring", sdpa_attention, group)
        case = CASES["documents"]
        q, k, v = (t[:, :24].requires_grad_() for t in tensors(case, torch.float32)[:3])
        spec = case.spec()
        mine = AttentionSpec.within(spec.q_positions[:, :24], spec.q_document_ids[:, :24])
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: kept.append(t.numel()), lambda _: None
        ):
            run(q, k, v, mine)
    return sum(kept)


def test_the_ring_keeps_nothing_quadratic(ranks: RankPool) -> None:
    case = CASES["documents"]
    tokens = len(case.rows) * LENGTH // 2
    q_and_out, k_and_v = 2 * tokens * case.heads * 8, 2 * tokens * case.groups * 8
    expected = q_and_out + k_and_v + tokens * case.heads
    assert ranks.run(kept_by_the_ring, size=2) == [expected, expected]


def refusals(place: Place) -> list[str]:
    """What the methods say about layouts and calls they cannot do."""
    parallel = ParallelConfig(cp=place.world_size, dp_shard=1)
    q, k = torch.zeros(1, 4, 6, 8), torch.zeros(1, 4, 3, 8)
    spec = AttentionSpec.within(torch.zeros(1, 4, dtype=torch.int32), None)
    cached = replace(spec, kv_positions=torch.zeros(1, 9, dtype=torch.int32))
    messages = []
    with World(parallel, EngineConfig(device="cpu", timeout_s=60.0), place) as world:
        group = world.group("cp")
        assert group is not None
        for method, asked in (("ulysses", spec), ("ring", cached), ("rings", spec)):
            with pytest.raises(LayoutError) as refused:
                context_attention(method, sdpa_attention, group)(q, k, k, asked)
            messages.append(str(refused.value))
        world.barrier()  # nobody leaves while a peer still connects
    return messages


def test_what_a_method_cannot_do_is_refused(ranks: RankPool) -> None:
    for heads, cache, name in ranks.run(refusals, size=2):
        assert "cp=2 does not divide the 6 query and 3 key heads" in heads
        assert "keys from a cache" in cache
        assert "cp_method=rings is unknown; use one of all_gather, ulysses, ring" in name


@given(st.integers(1, 6), st.integers(1, 4))
def test_splitting_is_a_permutation_with_an_inverse(size: int, chunk: int) -> None:
    shape = BatchShape(rows=2, sequence_length=2 * size * chunk, vocab_size=9)
    batch = synthetic_batch(shape, seed=0, step=0)
    parts = [split_sequence(batch, rank, size) for rank in range(size)]
    for name in ("tokens", "targets", "positions", "document_ids", "loss_weight"):
        fields = [getattr(part, name) for part in parts]
        assert {f.shape for f in fields} == {(2, 2 * chunk)}
        joined = fields[0] if size == 1 else whole_sequence(fields)
        assert torch.equal(joined, getattr(batch, name))
    for one in parts:
        assert torch.equal(one.source_ids, batch.source_ids)
        assert one.num_microbatches == batch.num_microbatches


def test_every_rank_sees_as_many_pairs_of_tokens() -> None:
    row = torch.arange(LENGTH)[None]
    seen = [(part(row, rank, 4) + 1).sum().item() for rank in range(4)]
    assert len(set(seen)) == 1


def test_a_length_that_does_not_split_is_refused() -> None:
    batch = synthetic_batch(replace(SHAPE, sequence_length=20), seed=0, step=0)
    with pytest.raises(LayoutError, match=r"sequence_length=20 .* use a multiple of 8"):
        split_sequence(batch, 0, 4)
