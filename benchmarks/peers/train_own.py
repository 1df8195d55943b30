"""The project's engine in its own loop, as a side of the training benchmark.

Metrics, guard and manual garbage collection run as in a real run. With ``watch``
every answer also has the seconds inside forward, backward and optimizer: what is left of the step
is the framework's.

    python benchmarks/peers/train_own.py watch < requests.jsonl
"""

import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2]))

import torch
from train_side import Case, Meter, begin, rows_of, start_weights

from llmtrain.config.engine import EngineConfig
from llmtrain.config.model import ModelConfig
from llmtrain.config.parallel import ParallelConfig
from llmtrain.config.ramp import StepSchedule
from llmtrain.config.training import OptimizerConfig, ScheduleConfig
from llmtrain.data.batch import StepBatch
from llmtrain.engine.choose import make_engine
from llmtrain.engine.native import NativeEngine
from llmtrain.engine.protocol import StepResult
from llmtrain.optim.optimizer import optimizer_factory
from llmtrain.optim.schedule import learning_rate
from llmtrain.parallel.host_memory import keep_freed_memory
from llmtrain.parallel.mesh import World
from llmtrain.run.progress import Progress
from llmtrain.train.feed import Copies, Feed
from llmtrain.train.guard import Guard
from llmtrain.train.loop import GarbageCollection, train
from llmtrain.train.loss import pretraining_loss
from llmtrain.train.metrics import Meter as Utilization
from llmtrain.train.metrics import Metrics, Row

NUM_STEPS = 10**6


class Source:
    """Batches of the case, as the project's loader gives them."""

    def __init__(self, case: Case) -> None:
        self.case = case

    def at(self, step: int) -> StepBatch:
        rows = rows_of(self.case, step)
        return StepBatch(
            tokens=rows.tokens, targets=rows.targets, positions=rows.positions.int(),
            document_ids=rows.documents.int(), loss_weight=(rows.targets >= 0).float(),
            source_ids=torch.zeros(self.case.rows, dtype=torch.int32), num_microbatches=1,
        )  # fmt: skip


class Unsaved:
    """No checkpoint is due."""

    stalled_s = 0.0

    def due(self, progress: Progress) -> bool:
        return False

    def wait(self) -> bool:
        return True


class Dropped:
    """Takes rows of metrics."""

    def write(self, row: Row) -> None:
        self.last = row


class Watch:
    """Counts the seconds inside the calls of forward, backward and optimizer."""

    def __init__(self, engine: NativeEngine) -> None:
        self.spent = {"forward_s": 0.0, "backward_s": 0.0, "optimizer_s": 0.0}
        module, optimizer = engine._local.modules[-1], engine._optimizer
        self._wrap(module, "forward", "forward_s")
        self._wrap(optimizer, "step", "optimizer_s")
        self._wrap(torch.Tensor, "backward", "backward_s")

    def _wrap(self, owner: Any, name: str, part: str) -> None:
        inner: Callable[..., Any] = getattr(owner, name)

        def timed(*arguments: Any, **named: Any) -> Any:
            started = time.perf_counter()
            try:
                return inner(*arguments, **named)
            finally:
                self.spent[part] += time.perf_counter() - started

        setattr(owner, name, timed)

    def take(self) -> dict[str, float]:
        spent = dict(self.spent)
        self.spent.update(dict.fromkeys(spent, 0.0))
        return spent


class Hand:
    """Hook that hands every step to the meter."""

    def __init__(self, meter: Meter, watch: Watch | None) -> None:
        self._meter, self._watch = meter, watch

    def after_step(self, progress: Progress, result: StepResult) -> None:
        more = {} if self._watch is None else self._watch.take()
        self._meter.done((result.loss_sum / result.target_tokens).item(), **more)


def engine_of(case: Case, world: World, settings: EngineConfig) -> NativeEngine:
    model = ModelConfig(
        vocab_size=case.vocab_size, hidden_size=case.hidden_size,
        intermediate_size=case.intermediate_size, num_hidden_layers=case.num_layers,
        num_attention_heads=case.num_heads, num_key_value_heads=case.num_heads,
        max_position_embeddings=case.sequence_length, rms_norm_eps=case.eps,
        rope_theta=case.rope_theta, tie_word_embeddings=True,
    )  # fmt: skip
    engine = make_engine(
        model, ParallelConfig(), settings, world, seed=0,
        loss=pretraining_loss(1, settings.loss_chunk_tokens),
        optimizer_factory=optimizer_factory(OptimizerConfig(lr=case.lr)),
        grad_clip_norm=case.clip,
    )  # fmt: skip
    state = engine.state_dict()
    state.update({f"model.{name}": value for name, value in start_weights(case)})
    engine.load_state_dict(state)
    return engine


def main() -> None:
    case, meter = begin()
    settings = EngineConfig(device="cpu", precision=case.precision, compile=case.compile)
    tokens = case.rows * case.sequence_length
    steps = StepSchedule(case.sequence_length, tokens, (), ())
    progress = Progress(num_steps=NUM_STEPS, steps=steps)
    with World(ParallelConfig(), settings) as world, GarbageCollection() as collection:
        torch.set_num_threads(case.threads)
        engine = engine_of(case, world, settings)
        constant = ScheduleConfig(kind="constant")
        schedule = learning_rate(OptimizerConfig(lr=case.lr), constant, NUM_STEPS * tokens)
        batches = Feed(Source(case), Copies(world.device))
        config = engine._local.modules[-1].transformer.config
        metrics = Metrics(
            [Dropped()], Utilization.of(config, world.device, 1),
            schedule=schedule, source_names=("all",), batches=batches,
            batch_hash=lambda step: "", every_steps=10,
        )  # fmt: skip
        watch = Watch(engine) if "watch" in sys.argv else None
        guard = Guard(agree=lambda asked: asked, stop_asked=lambda: False, device=world.device)
        keep_freed_memory(world.device)
        train(
            engine, batches, progress=progress, schedule=schedule, guard=guard,
            checkpoints=Unsaved(), hooks=[collection, metrics, Hand(meter, watch)],
        )  # fmt: skip


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    main()
