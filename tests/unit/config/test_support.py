"""Every limit of the support matrix: its sentence, its row in the docs, and the real command."""

import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from llmtrain.cli import main
from llmtrain.config import limits
from llmtrain.config.run import RunConfig, broken_rules
from llmtrain.config.support import SUPPORT, page

REPOSITORY = Path(__file__).parents[3]

DEEPSPEED = "engine.kind=deepspeed"
RESHARD = "parallel.reshard_after_forward=true"
KEEP = "parallel.reshard_after_forward=false"
ZERO3 = "engine.deepspeed.zero_stage=3"
OVERLAPPED = "parallel.replica_sum=overlapped"

OFFLOAD = "parallel.activation_offload=true"
GRAPHS = "engine.cuda_graphs=true"
COMPILE = "engine.compile=true"
INSIDE = ["optimizer.in_backward=true", "optimizer.grad_clip_norm=.inf",
          "training.micro_batch_size=8"]  # fmt: skip
"""An update in the backward, of one micro-batch of all rows."""

BF16 = ["engine.precision=bf16"]
LORA, NF4 = "model.adapter.rank=4", "model.adapter.quantize_base=nf4"
FP8 = [*BF16, "engine.fp8=tensorwise"]

TRAPS = [
    (["parallel.schedule=dualpipev", RESHARD], "wrong without an error"),
    (["parallel.schedule=zbv", RESHARD], "reshard_after_forward=true found with parallel.schedule"),
    (["parallel.schedule=interleaved_zero_bubble", RESHARD], "use reshard_after_forward=auto"),
    ([RESHARD], "every micro-batch would gather"),
    (["parallel.schedule=dualpipev", OVERLAPPED, "parallel.dp_replicate=2"], "in two parts"),
    (["parallel.schedule=zbv", OVERLAPPED, "parallel.dp_shard=2"], "use replica_sum=auto"),
    (["parallel.schedule=zbv", "parallel.recompute=full"], "use recompute=none or schedule="),
    (["parallel.schedule=zbv", "engine.compile=true"], "use engine.compile=false or schedule="),
    (["training.global_batch_tokens=256"], "needs at least 2 micro-batches per rank, found 1"),
    (
        ["parallel.schedule=dualpipev", "training.global_batch_tokens=768"],
        "needs at least 4 micro-batches per rank, found 3",
    ),
    ([DEEPSPEED, "engine.deepspeed.zero_stage=2"], "zero_stage=2 found with parallel.pp=2"),
    ([DEEPSPEED, ZERO3], "use zero_stage of 0 or 1"),
]
"""Overrides on two stages that would hang or compute wrong numbers, and part of the sentence."""

REFUSED = [
    (
        2,
        ["parallel.cp=2", "training.objective=dpo", "data.packing=best_fit"],
        "training.objective=dpo found with parallel.cp=2",
    ),
    *((None, ["parallel.pp=2", *overrides], message) for overrides, message in TRAPS),
    (2, ["parallel.pp=3"], "parallel.pp=3 does not divide the ranks, started were 2"),
    (1, ["parallel.pp=2"], "use parallel.pp of 1 or start torchrun --nproc-per-node 2"),
    (4, ["parallel.dp_shard=3"], "parallel.dp_shard=3 makes 3 ranks, started were 4"),
    (5, ["parallel.pp=5"], "use parallel.pp x stages_per_rank of at most 4"),
    (3, ["parallel.pp=3", "parallel.schedule=interleaved_1f1b"], "3 x 2 stages per rank is more"),
    (3, ["parallel.dp_shard=3"], "8 rows, which 3 data-parallel ranks x training.micro_batch_si"),
    (1, ["training.micro_batch_size=3"], "use training.global_batch_tokens=2304"),
    (2, ["training.micro_batch_size=3"], "8 rows, which training.micro_batch_size=3 does not"),
    (4, ["parallel.dp_replicate=auto", "parallel.dp_shard=3"], "parallel.dp_shard that divides 4"),
    (4, ["parallel.pp=4", "training.micro_batch_size=4"], "needs at least 4 micro-batches"),
    (
        2,
        ["parallel.pp=2", "parallel.schedule=interleaved_1f1b", "training.micro_batch_size=8",
         "training.global_batch_tokens=14336", "parallel.dp_shard=1"],
        "found 7 micro-batches per rank, which 3 rounds do not divide",
    ),
    (2, ["parallel.pp=2", "parallel.stages_per_rank=2"], "schedule=interleaved_1f1b"),
    (
        2,
        ["parallel.pp=2", "parallel.schedule=interleaved_1f1b", "parallel.stages_per_rank=1"],
        "nothing to interleave; use stages_per_rank=auto or schedule=1f1b",
    ),
    (
        2,
        ["parallel.pp=2", "parallel.schedule=zbv", "parallel.stages_per_rank=1"],
        "use stages_per_rank=2",
    ),
    (1, ["parallel.schedule=gpipe"], "schedule=gpipe with stages_per_rank=auto has no effect"),
    (1, ["parallel.stages_per_rank=2"], "has no effect on parallel.pp=1"),
    (1, ["parallel.dp_shard=1", RESHARD], "has no effect on parallel.dp_shard=1"),
    (1, ["parallel.cpu_offload=true"], "one rank along dp_shard"),
    (2, [OVERLAPPED], "2 ranks along dp_shard: FSDP2 sums over replicas itself"),
    (2, ["parallel.pp=2", "parallel.replica_sum=after"], "has no effect on parallel.dp_replicate"),
    (
        4,
        ["parallel.pp=2", "parallel.schedule=zbv", "parallel.dp_shard=2",
         "parallel.replica_sum=after"],
        "2 ranks along dp_shard: FSDP2 sums over replicas itself",
    ),
    (4, ["parallel.tp=4"], "does not divide model.num_key_value_heads=2: every rank holds whole"),
    (2, ["parallel.tp=2", "model.intermediate_size=511"], "use tp in {1}"),
    (
        4,
        ["parallel.cp=2", "parallel.tp=2", "training.sequence_length=254",
         "training.global_batch_tokens=2032"],
        "is no multiple of 8, as parallel.cp=2 x tp=2 needs",
    ),
    (2, ["parallel.tp=2", "training.sequence_length=51", "training.global_batch_tokens=204"],
     "use sequence_length=52"),
    (4, ["parallel.cp=4", "parallel.cp_method=ulysses"], "use cp_method=all_gather or ring"),
    (4, ["parallel.cp=2", "parallel.tp=2", "parallel.cp_method=ulysses"], "2 / parallel.tp=2"),
    (1, ["parallel.cp_method=ring"], "has no effect on parallel.cp=1"),
    (1, ["parallel.recompute_budget=0.25"], "has no effect on parallel.recompute=none"),
    (1, ["engine.deepspeed.zero_stage=2"], "engine.deepspeed is set and engine.kind=native"),
    (1, [DEEPSPEED, "engine.precision=fp64"], "use engine.precision=fp32"),
    (2, [DEEPSPEED, "parallel.tp=2"], "tp=2 found with engine.kind=deepspeed"),
    (2, [DEEPSPEED, "parallel.pp=2", "parallel.schedule=gpipe"], "use schedule=1f1b or"),
    (2, [DEEPSPEED, "parallel.pp=2", "model.tie_word_embeddings=true"], "untied embeddings"),
    (
        2,
        [DEEPSPEED, "parallel.pp=2", "engine.deepspeed.config.flops_profiler.enabled=true"],
        "leave them out or use pp=1",
    ),
    (
        2,
        [DEEPSPEED, "parallel.pp=2", "engine.deepspeed.config.zero_optimization.overlap_comm=true"],
        "overlap_comm=true found with parallel.pp=2",
    ),
    (
        2,
        [DEEPSPEED, "engine.precision=bf16",
         "engine.deepspeed.config.zero_optimization.overlap_comm=true"],
        "leave the others out or use zero_stage=2",
    ),
    (2, [DEEPSPEED, "parallel.cpu_offload=true"], "parallel.cpu_offload=true found with engine"),
    (1, [DEEPSPEED, "engine.compile=true"], "use engine.compile=false"),
    (
        1,
        [DEEPSPEED, "engine.deepspeed.offload_optimizer=true", "engine.deepspeed.zero_stage=0"],
        "use zero_stage of 1 to 3",
    ),
    (1, [DEEPSPEED, "engine.deepspeed.offload_parameters=true"], "use zero_stage=3"),
    (2, [DEEPSPEED, "optimizer.kind=muon"], "use zero_stage=0 or engine.kind=native"),
    (1, [DEEPSPEED, OFFLOAD], "use engine.kind=native or parallel.recompute=full"),
    (1, [OFFLOAD, "parallel.recompute=selective"], "use recompute=full, which offloads"),
    (2, ["parallel.pp=2", "parallel.schedule=zbv", OFFLOAD], "everything would travel twice"),
    (1, ["parallel.fsdp_prefetch=2"], "parallel.fsdp_prefetch=2 has no effect on one rank"),
    (1, ["parallel.reduce_every_microbatch=true"], "found with 1 ranks along dp_shard and"),
    (4, ["parallel.pp=2", "parallel.reduce_every_microbatch=true"], "parallel.pp=2: sums over"),
    (2, [DEEPSPEED, "parallel.reduce_every_microbatch=true"], "reduce_every_microbatch=true"),
    (1, [GRAPHS], "use compile=true"),
    (1, [GRAPHS, COMPILE, "engine.device=cpu"], "the CPU launches no kernels"),
    (2, [GRAPHS, COMPILE], "2 ranks along dp_shard: a recording reads parameters"),
    (2, [GRAPHS, COMPILE, "parallel.pp=2"], "has memory for one; use cuda_graphs=false"),
    (2, [GRAPHS, COMPILE, "parallel.tp=2"], "parallel.tp=2, cp=1: blocks talk to other ranks"),
    (1, [GRAPHS, COMPILE, OFFLOAD], "nothing would be saved; use one of them"),
    (1, [*INSIDE, GRAPHS, COMPILE], "beside recordings all gradients keep their memory"),
    (1, [*INSIDE, DEEPSPEED], "DeepSpeed updates after the backward; use engine.kind=native"),
    (1, [*INSIDE, "optimizer.grad_clip_norm=0.5"], "grad_clip_norm=0.5: the global norm is"),
    (1, [*INSIDE, "optimizer.kind=muon"], "use adamw or lion"),
    (2, [*INSIDE, "training.micro_batch_size=2"], "use training.micro_batch_size=4 or more"),
    (2, [*INSIDE, "parallel.tp=2"], "in_backward=true found with parallel.tp=2, dp_replicate=1"),
    (2, [*INSIDE, "training.micro_batch_size=4", "parallel.cpu_offload=true"], "wait for every"),
    (1, [*FP8, DEEPSPEED], "DeepSpeed runs are not converted; use engine.kind=native or fp8=none"),
    (2, [*FP8, "parallel.pp=2", "parallel.schedule=zbv"], "comes in one piece"),
    (
        1,
        [*FP8, "training.sequence_length=60", "training.global_batch_tokens=2040"],
        "micro_batch_size=1 x sequence_length=60 / parallel.cp=1 tokens",
    ),
    (1, [*FP8, "engine.fp8_all_gather=true"], "use parallel.dp_shard of at least 2 or fp8_all_g"),
    (2, [*FP8, "engine.fp8_all_gather=true", "parallel.cpu_offload=true"], "where the shards lie"),
    (1, ["optimizer.state_dtype=bf16", DEEPSPEED], "use engine.kind=native, or fp32 for both"),
    (1, [*BF16, "engine.master_dtype=bf16", "optimizer.kind=lion"], "use kind=adamw or master_dt"),
    (1, ["optimizer.state_dtype=bf16", "engine.precision=fp64"], "use state_dtype=fp32 or precis"),
    (1, [LORA, DEEPSPEED], "model.adapter found with engine.kind=deepspeed"),
    (1, [*FP8, LORA], "of adapters are not converted; use fp8=none"),
    (2, [NF4], "found with 2 ranks along dp_shard and parallel.tp=1"),
    (2, [NF4, "parallel.tp=2"], "found with 1 ranks along dp_shard and parallel.tp=2"),
    (1, [NF4, COMPILE], "use compile=false or quantize_base=null"),
]  # fmt: skip
"""Processes (None: as few as the layout needs), overrides, part of the one sentence."""

ELSEWHERE = [
    (
        "0.19.2",
        ["parallel.pp=2"],
        "found DeepSpeed 0.19.2: the gradients of its pipeline are wrong",
    ),
    (None, [], "pip install 'llmtrain[deepspeed]'"),
]
"""Version of DeepSpeed on another machine, overrides, part of the one sentence."""


@pytest.mark.parametrize(("world_size", "overrides", "message"), REFUSED)
def test_each_limit_says_what_to_change(
    config: Callable[..., RunConfig], world_size: int | None, overrides: list[str], message: str
) -> None:
    (found,) = broken_rules(config(*overrides), world_size)
    assert message in found
    assert "{" not in found.replace("{1", "")


@pytest.mark.parametrize(("version", "overrides", "message"), ELSEWHERE)
def test_each_limit_of_a_machine_says_what_to_change(
    config: Callable[..., RunConfig],
    monkeypatch: pytest.MonkeyPatch,
    version: str | None,
    overrides: list[str],
    message: str,
) -> None:
    monkeypatch.setattr(limits, "deepspeed_version", lambda: version)
    (found,) = broken_rules(config(DEEPSPEED, *overrides))
    assert message in found


def test_every_limit_is_tested_above(config: Callable[..., RunConfig]) -> None:
    cases = [(world, config(*overrides)) for world, overrides, _ in REFUSED]
    untested = [
        limit.refused
        for limit in SUPPORT
        if not any(limit.message(run, world or size_of(run)) for world, run in cases)
    ]
    assert len(untested) == len(ELSEWHERE)


def size_of(run: RunConfig) -> int:
    axes = run.parallel
    shard = 1 if axes.dp_shard == "auto" else axes.dp_shard
    replicate = 1 if axes.dp_replicate == "auto" else axes.dp_replicate
    return axes.pp * replicate * axes.cp * axes.tp * shard


@pytest.mark.parametrize(
    ("world_size", "overrides"),
    [
        (2, ["parallel.pp=2", "parallel.schedule=dualpipev", KEEP]),
        (2, ["parallel.pp=2", "parallel.schedule=interleaved_1f1b", "engine.compile=true"]),
        (4, ["parallel.pp=2", "parallel.dp_replicate=2", OVERLAPPED]),
        (2, ["parallel.cp=2", "parallel.dp_shard=1", OVERLAPPED]),
        (4, ["parallel.dp_replicate=2", "parallel.cpu_offload=true"]),
        (2, ["parallel.cp=2", "parallel.cp_method=ulysses"]),
        (2, [*INSIDE, "training.micro_batch_size=4", "parallel.fsdp_prefetch=2"]),
        (4, ["parallel.dp_replicate=2", "parallel.reduce_every_microbatch=true"]),
        (1, [GRAPHS, COMPILE]),
        (2, [OFFLOAD, "parallel.recompute=full"]),
        (2, [*FP8, "engine.fp8_all_gather=true", "parallel.recompute=selective"]),
        (4, [*FP8, "parallel.pp=2", "parallel.tp=2", COMPILE]),
        (4, [*BF16, "engine.master_dtype=bf16", "optimizer.state_dtype=bf16", "parallel.tp=2"]),
        (2, [DEEPSPEED, ZERO3, "engine.deepspeed.offload_parameters=true"]),
        (4, [DEEPSPEED, "parallel.pp=2", "engine.deepspeed.zero_stage=1"]),
        (8, [LORA, COMPILE, "parallel.pp=2", "parallel.tp=2", "parallel.dp_shard=2"]),
        (8, [NF4, "parallel.pp=2", "parallel.cp=2", "parallel.dp_replicate=2"]),
    ],
)  # fmt: skip
def test_what_is_supported_is_not_refused(
    config: Callable[..., RunConfig], world_size: int, overrides: list[str]
) -> None:
    assert broken_rules(config(*overrides), world_size) == []


def test_docs_hold_the_matrix() -> None:
    written = (REPOSITORY / "docs/parallelism.md").read_text()
    assert written == page(written), "run: python -m llmtrain.config.support docs/parallelism.md"
    assert all(limit.refused in written for limit in SUPPORT)


COMMAND = [
    "parity",
    "parallel.pp=2",
    "training.sequence_length=256",
    "training.global_batch_tokens=2048",
]


@pytest.mark.parametrize(("overrides", "message"), TRAPS)
def test_the_command_refuses_each_trap_with_one_sentence(
    overrides: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def connect(*_: object, **__: object) -> None:
        raise AssertionError("a process group was made")

    monkeypatch.setattr("torch.distributed.init_process_group", connect)
    assert main([*COMMAND, *overrides]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_a_trap_is_refused_at_once_and_without_torch() -> None:
    program = (
        "import sys; from llmtrain.cli import main; status = main(sys.argv[1:]);"
        "sys.exit(100 if 'torch' in sys.modules else status)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", program, *COMMAND, *TRAPS[0][0]],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)  # CPU time: the machine may be shared
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 5
    assert re.fullmatch(r"error: .*dualpipev.*wrong without an error.*\n", done.stderr)
