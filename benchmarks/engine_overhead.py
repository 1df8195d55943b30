"""What the native engine costs over a plain PyTorch loop of the same mathematics.

Both train the same model on the same batches in one process; rounds alternate, so that a busy
machine slows both alike. Prints tokens/s of each and their ratio.

    python benchmarks/engine_overhead.py            # llama_demo, 4 rows of 256 tokens per step
"""

import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from llmtrain.config.load import load
from llmtrain.config.parallel import EngineConfig, ParallelConfig
from llmtrain.config.run import RunConfig
from llmtrain.data.synthetic import BatchShape, rank_rows, synthetic_batch
from llmtrain.engine.native import NativeEngine, no_limits
from llmtrain.model.init import initialize_model
from llmtrain.model.transformer import Transformer
from llmtrain.parallel.apply import build_stage
from llmtrain.parallel.mesh import Place, World
from llmtrain.train.loss import pretraining_loss
from llmtrain.train.optimizer import optimizer_factory

ROUNDS, STEPS = 8, 5


def plain(config: RunConfig, batches: list) -> Callable[[int], None]:
    """The loop one would write by hand, with gradient accumulation and clipping."""
    model = Transformer(config.model)
    initialize_model(model, config.model, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def step(index: int) -> None:
        batch = batches[index]
        weight = batch.loss_weight.sum()
        optimizer.zero_grad()
        for part in batch.microbatches():
            hidden = model(part.tokens, part.positions, part.document_ids)
            logits = model.logits(hidden).flatten(0, 1)
            losses = F.cross_entropy(logits, part.targets.flatten(), reduction="none")
            ((losses * part.loss_weight.flatten()).sum() / weight).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def native(config: RunConfig, batches: list, world: World) -> Callable[[int], None]:
    """The engine, without data loading."""
    loss = pretraining_loss(2, config.engine.loss_chunk_tokens)
    parallel = ParallelConfig(dp_shard=1)
    stage = build_stage(config.model, parallel, config.engine, world, 0, loss)
    engine = NativeEngine(stage, optimizer_factory(config.optimizer), 1.0)
    limits = no_limits(world.device)
    return lambda index: engine.train_step(batches[index], 1e-3, limits) and None


def main(overrides: list[str]) -> None:
    """Time both in turns."""
    defaults = [
        "training.num_tokens=1e6", "training.sequence_length=256",
        "training.global_batch_tokens=1024", "training.micro_batch_size=4",
    ]  # fmt: skip
    config = load("train", ["model=llama_demo", *defaults, *overrides], RunConfig)
    training = config.training
    shape = BatchShape(
        rows=training.global_batch_size,
        sequence_length=training.sequence_length,
        vocab_size=config.model.vocab_size,
    )
    batches = [
        rank_rows(synthetic_batch(shape, 0, step), 0, 1, training.micro_batch_size)
        for step in range(STEPS)
    ]
    with World(ParallelConfig(), EngineConfig(device="cpu"), Place()) as world:
        sides = {"plain": plain(config, batches), "native": native(config, batches, world)}
        times: dict[str, list[float]] = {name: [] for name in sides}
        for number in range(ROUNDS):
            for name, step in sides.items():
                start = time.process_time()
                for index in range(STEPS):
                    step(index)
                if number:
                    times[name].append((time.process_time() - start) / STEPS)
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, median in medians.items():
        rate = training.global_batch_tokens / median
        print(f"{name}: {rate:.0f} tokens per CPU second, {median * 1e3:.1f} ms per step")
    print(f"native / plain tokens/s: {medians['plain'] / medians['native']:.3f}")


if __name__ == "__main__":
    main(sys.argv[1:])
