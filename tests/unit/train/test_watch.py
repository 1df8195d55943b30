"""Norms by layer, attention logits and the ranks' own numbers, against plain definitions."""

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from llmtrain.config.ramp import StepSchedule
from llmtrain.data.batch import StepBatch
from llmtrain.data.synthetic import synthetic_batch
from llmtrain.engine.protocol import StepResult
from llmtrain.model.layers import Attention
from llmtrain.ops.attention.spec import AttentionSpec
from llmtrain.parallel.place import Place
from llmtrain.run.progress import Progress
from llmtrain.train import attention_logits
from llmtrain.train.attention_logits import AttentionLogits, largest_logit
from llmtrain.train.feed import Copies, Feed
from llmtrain.train.norms import layer_norms, layers_of
from llmtrain.train.ranks import RankWatch, gpu_load
from tests.distributed.layouts import MODELS, SHAPE, Layout, native, zero
from tests.distributed.rig import Rig, rig
from tests.world import RankPool

CPU = torch.device("cpu")
LAYOUTS = [
    native("fsdp2", dp_shard=2),
    native("pp2 tied", pp=2, model="tied"),
    native("tp2", tp=2),
    native("cp2 ring", cp=2, cp_method="ring"),
    zero(0, " dp2", dp_shard=2),
    zero(3, " dp2", dp_shard=2),
]


@dataclass
class Seen:
    """What rank 0 was told of two steps."""

    grad_norms: dict[str, float | None]
    logits: dict[str, float | None]
    fields: list[dict[str, Any]]
    sums: list[int]
    """Sums over all ranks that each step made for it."""
    by_hand: dict[str, dict[str, float | None]]


class Source:
    def __init__(self, made: Rig) -> None:
        self.rig = made

    def at(self, step: int) -> StepBatch:
        return self.rig.batch(step)


def watched(place: Place, layout: Layout) -> Seen:
    """Two steps of a layout, the second one logged."""
    with rig(place, layout.config) as made:
        layers = layers_of(layout.config.model)
        batches = Feed(Source(made), Copies(CPU))
        told: dict[str, Any] = {}
        logits = AttentionLogits(
            made.world, made.engine, every_steps=2, compiled=False,
            report=lambda fields, took_s: told.update(fields),
        )  # fmt: skip
        source = logits.watching(batches)
        watch = RankWatch(made.world, made.engine, batches, every_steps=2, layers=layers)
        progress = Progress(num_steps=9, steps=StepSchedule(32, 256))
        add, sums = made.world.sum, [0]
        fields = []

        def counting(values: Tensor, axis: str | None = None) -> Tensor:
            sums[-1] += 1
            return add(values, axis)

        for step in range(2):
            result = made.engine.train_step(source.at(step), 1e-3, limits_of(made))
            progress.advance()
            made.world.sum = counting  # type: ignore[method-assign]
            watch.after_step(progress, result)
            made.world.sum = add  # type: ignore[method-assign]
            sums.append(0)
            logits.after_step(progress, result)
            fields.append(watch.fields())
        squares = result.gradient_squares
        assert squares is not None
        gradients, weights = made.engine.gradients(), made.engine.full_parameters()
        return Seen(
            grad_norms=layer_norms(layers, squares.tolist()),
            logits=told.get("attention_logit_max", {}),
            fields=fields, sums=sums[:2],
            by_hand={
                "gradients": layer_norms(layers, squares_of(gradients)),
                "weights": layer_norms(layers, squares_of(weights)),
            },
        )  # fmt: skip


def limits_of(made: Rig) -> Any:
    from llmtrain.engine.step import no_limits

    return no_limits(made.world.device)


def squares_of(tensors: dict[str, Tensor]) -> list[float]:
    return [tensor.double().square().sum().item() for tensor in tensors.values()]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_every_layout_says_of_its_layers_what_one_process_says(
    layout: Layout, ranks: RankPool, deepspeed_ranks: RankPool
) -> None:
    pool = ranks if layout.engine.kind == "native" else deepspeed_ranks
    seen, *others = pool.run(watched, layout, size=layout.size)
    alone = pool.run(watched, layout.reference, size=1)[0]
    assert list(seen.grad_norms) == ["embed", "0", "1", "head"]
    assert seen.grad_norms == pytest.approx(seen.by_hand["gradients"], rel=1e-4)
    assert seen.grad_norms == pytest.approx(alone.grad_norms, rel=1e-3)
    assert seen.fields[0] == {}
    assert seen.fields[1]["layer_weight_norm"] == pytest.approx(seen.by_hand["weights"], rel=1e-5)
    assert seen.logits == pytest.approx(alone.logits, rel=1e-4)
    assert set(seen.logits) == {"0", "1"}
    times = seen.fields[1]["rank_step_time_s"]
    assert 0 < times["min"] <= times["median"] <= times["max"]
    assert times["slowest_rank"] in range(layout.size)
    assert [other.fields for other in others] == [[{}, {}]] * (layout.size - 1)
    assert [one.sums for one in (seen, *others)] == [[0, 1]] * layout.size
    assert "rank_step_time_s" not in alone.fields[1]


class Slow:
    """A rank whose own work takes so much of its processor."""

    def __init__(self, busy_s: float) -> None:
        self.busy = busy_s
        self.waited_s = 0.0
        self.asked_s = 0.0

    def busy_s(self) -> float:
        return self.asked_s + self.busy


def slow_second_rank(place: Place, layout: Layout) -> dict[str, Any]:
    with rig(place, layout.config) as made:
        batches: Any = Slow(0.3 if place.rank == 1 else 0.1)
        watch = RankWatch(made.world, made.engine, batches, every_steps=1, layers=None)
        progress = Progress(num_steps=9, steps=StepSchedule(32, 256), step=1)
        watch.after_step(progress, made.step(0))
        return watch.fields()


def test_the_slowest_rank_is_named(ranks: RankPool) -> None:
    fields, _ = ranks.run(slow_second_rank, native("dp2", dp_shard=2), size=2)
    assert fields == {
        "rank_step_time_s": {
            "min": pytest.approx(0.1), "median": pytest.approx(0.2), "max": pytest.approx(0.3),
            "slowest_rank": 1,
        }
    }  # fmt: skip


class Alone:
    """A world of one rank."""

    def group(self, axis: str) -> None:
        return None


@pytest.mark.parametrize("window", [None, 3])
def test_the_largest_logit_is_that_of_what_a_query_sees(
    window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 12, heads, 4, generator=generator) for heads in (4, 2))
    k[:, 5] *= 50.0  # seen by few
    positions = torch.tensor([[*range(5), *range(7)], [*range(12)]])
    documents = torch.tensor([[0] * 5 + [1] * 7, [0] * 12])
    spec = AttentionSpec.within(positions, documents, window)
    world: Any = Alone()

    def by_hand(queries: list[int]) -> float:
        best = -math.inf
        for row in range(2):
            for query in queries:
                for head in range(4):
                    for key in range(query + 1):
                        near = window is None or query - key < window
                        if documents[row, query] == documents[row, key] and near:
                            dot = torch.dot(q[row, query, head], k[row, key, head // 2]).item()
                            best = max(best, dot / 2.0)
        return best

    assert largest_logit(q, k, spec, world).item() == pytest.approx(by_hand(list(range(12))))
    monkeypatch.setattr(attention_logits, "SAMPLED_QUERIES", 3)
    assert largest_logit(q, k, spec, world).item() == pytest.approx(by_hand([0, 5, 11]))


def test_attention_is_as_before_when_a_forward_fails() -> None:
    class Failing:
        def __init__(self) -> None:
            self.attention = attention

        def stages(self) -> list[torch.nn.Module]:
            return [self.attention]

        def eval_step(self, batch: StepBatch) -> StepResult:
            assert self.attention.attention is not plain
            assert batch.row_ids is None  # whose losses would be written twice
            raise RuntimeError("no memory")

    from llmtrain.ops.attention.sdpa import sdpa_attention
    from llmtrain.ops.kernels import TORCH_KERNELS

    plain, batch = sdpa_attention, synthetic_batch(SHAPE, seed=0, step=0)
    attention = Attention(MODELS["base"], 0, plain, TORCH_KERNELS)
    logits = AttentionLogits(Alone(), Failing(), every_steps=1, compiled=False, report=None)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="no memory"):
        logits._largest(replace(batch, row_ids=torch.arange(SHAPE.rows)))
    assert attention.attention is plain


def test_norms_that_are_not_finite_are_null() -> None:
    tied = replace(MODELS["tied"], num_hidden_layers=1)
    layers = layers_of(tied)
    assert layers[0] == "embed"
    assert layers[-1] == "head"
    squares = [4.0] * len(layers)
    squares[1] = math.nan
    norms = layer_norms(layers, squares)
    assert norms["0"] is None
    assert norms["embed"] == 2.0
    assert list(norms) == ["embed", "0", "head"]
    assert SHAPE.vocab_size == tied.vocab_size


class NVMLError(Exception):
    """As pynvml's, which is no RuntimeError."""

    __module__ = "pynvml"


@pytest.mark.parametrize(
    ("answer", "watts"),
    [(700_000, 700.0), (ImportError("no pynvml"), 0.0), (NVMLError("not supported"), 0.0)],
)
def test_power_is_absent_where_nobody_tells(
    answer: Any, watts: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def power_draw(device: torch.device) -> int:
        if isinstance(answer, Exception):
            raise answer
        return int(answer)

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * 2**30, 8 * 2**30))
    monkeypatch.setattr(torch.cuda, "power_draw", power_draw)
    assert gpu_load(torch.device("cuda", 0)) == (watts, 5.0 * 2**30)
    assert gpu_load(CPU) == (0.0, 0.0)


def test_an_error_of_the_gpu_itself_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def power_draw(device: torch.device) -> int:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 1))
    monkeypatch.setattr(torch.cuda, "power_draw", power_draw)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        gpu_load(torch.device("cuda", 0))
