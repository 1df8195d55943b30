"""What watching a run costs: processor time of its hooks beside that of the steps, in one run.

Everything is on: W&B offline, TensorBoard, norms by layer, hang and spike detection, and attention
logits at every tenth step. A row is made at every step; figures for fewer rows follow from it.

    python benchmarks/watching.py --steps 41
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from llmtrain import build, logs
from llmtrain.config.load import load
from llmtrain.config.run import RunConfig
from llmtrain.engine.protocol import StepResult
from llmtrain.run.progress import Progress
from llmtrain.train import loop
from tests.end_to_end.commands import make_store

LOGITS_EVERY = 10
MODEL = (
    "model=llama_demo", "model.vocab_size=64", "model.num_hidden_layers=8",
    "model.hidden_size=128", "model.intermediate_size=352", "model.num_attention_heads=4",
    "model.num_key_value_heads=2", "training.sequence_length=128",
    "training.global_batch_tokens=1024", "training.micro_batch_size=4", "engine.device=cpu",
)  # fmt: skip
ON = (
    "monitor.wandb=offline", "monitor.tensorboard=true", "monitor.log_every_steps=1",
    f"monitor.attention_logits_every_steps={LOGITS_EVERY}", "monitor.progress_bar=false",
)  # fmt: skip


class Timed:
    """A hook and the processor time of each of its calls."""

    def __init__(self, hook: loop.Hook) -> None:
        self.hook = hook
        self.took_s: list[float] = []

    def after_step(self, progress: Progress, result: StepResult) -> None:
        started = time.process_time()
        self.hook.after_step(progress, result)
        self.took_s.append(time.process_time() - started)


class Ends:
    """The last hook: processor time at the end of every step."""

    def __init__(self) -> None:
        self.at_s: list[float] = []

    def after_step(self, progress: Progress, result: StepResult) -> None:
        self.at_s.append(time.process_time())


def run(folder: Path, num_steps: int) -> tuple[dict[str, list[float]], list[float]]:
    """Seconds of each hook and of each step but the first."""
    make_store(folder / "web", seed=0, num_documents=600)
    hooked: list[Timed] = []
    ends, train = Ends(), loop.train

    def timed(*parts: Any, hooks: Sequence[loop.Hook], **rest: Any) -> Any:
        hooked.extend(map(Timed, hooks))
        return train(*parts, hooks=[*hooked, ends], **rest)

    loop.train = timed
    words = (*MODEL, *ON, f"training.num_tokens={num_steps * 1024}", "name=watched",
             f"runs_dir={folder}", f"data.sources.web={folder}/web")  # fmt: skip
    build.train(load("train", words, RunConfig))
    loop.train = train
    logs.close()
    steps = [after - before for before, after in zip(ends.at_s, ends.at_s[1:], strict=False)]
    return {type(one.hook).__name__: one.took_s[1:] for one in hooked}, steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=41)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        hooks, steps = run(Path(folder), asked.steps)
    row_s = statistics.median(map(sum, zip(hooks["RankWatch"], hooks["Metrics"], strict=True)))
    logits_s = statistics.median(sorted(hooks["AttentionLogits"])[-(asked.steps // LOGITS_EVERY) :])
    watched = zip(hooks["RankWatch"], hooks["Metrics"], hooks["AttentionLogits"], strict=True)
    bare_s = statistics.median(
        step - sum(parts) for step, parts in zip(steps, watched, strict=True)
    )
    print(f"a step without what watches it   {bare_s * 1e3:8.2f} ms of processor time")
    print(f"a row, everything on             {row_s * 1e3:8.2f} ms")
    print(f"attention logits of a step       {logits_s * 1e3:8.2f} ms")
    for rows in (1, 10):
        print(f"step, with a row every {rows:2} steps   {1 + row_s / rows / bare_s:8.4f} of it")
    print(
        f"and logits every 100 steps       {1 + (row_s / 10 + logits_s / 100) / bare_s:8.4f} of it"
    )


if __name__ == "__main__":
    main()
