"""The support matrix: which layouts are refused, why, and what to use instead.

Invariant: what would hang, fail late or compute wrong numbers is refused here, from the
configuration alone, before a process group or even torch is there. docs/parallelism.md prints it:

    python -m llmtrain.config.support docs/parallelism.md
"""

import sys
from pathlib import Path

from llmtrain.config.adapter_limits import ADAPTERS
from llmtrain.config.deepspeed_limits import DEEPSPEED
from llmtrain.config.limits import DEFAULT, Limit
from llmtrain.config.memory_limits import MEMORY
from llmtrain.config.parallel import V_SCHEDULES
from llmtrain.config.precision_limits import PRECISION

NATIVE: tuple[Limit, ...] = (
    Limit(
        concerns="mesh",
        refused="axes that do not multiply to the number of processes",
        because="every process has one place in the mesh",
        broken=lambda f: f.layout_problem is not None,
        sentence="{f.layout_problem}",
    ),
    Limit(
        concerns="batch",
        refused="a global batch that data-parallel ranks x `micro_batch_size` do not divide; with "
        "`auto` along a data-parallel axis one that `micro_batch_size` does not divide",
        because="every rank runs the same whole number of micro-batches",
        broken=lambda f: (
            f.layout_problem is None and f.rows is not None and not f.whole_microbatches
        ),
        sentence="training.global_batch_tokens={f.t.global_batch_tokens} is {f.rows} rows, which "
        "{f.row_sharers} does not divide: {because}; use training.global_batch_tokens="
        "{f.near_batch_tokens} or another micro_batch_size",
    ),
    Limit(
        concerns="pipeline",
        refused="more stages (`pp` x `stages_per_rank`) than blocks",
        because="every stage holds at least one block",
        broken=lambda f: f.p.num_stages > f.m.num_hidden_layers,
        sentence="parallel.pp={f.p.pp} x {f.p.num_stages_per_rank} stages per rank is more stages "
        "than model.num_hidden_layers={f.m.num_hidden_layers} blocks: {because}; use parallel.pp "
        "x stages_per_rank of at most {f.m.num_hidden_layers}",
    ),
    Limit(
        concerns="pipeline",
        refused="fewer micro-batches per rank than stages of one pass: `pp`, or 2 `pp` for `zbv` "
        "and `dualpipev`",
        because="schedules hang or refuse to start unless a pass over the ranks can be filled",
        broken=lambda f: f.p.pp > 1 and f.whole_microbatches
        and f.microbatches < f.fewest_microbatches,
        sentence="parallel.schedule={f.p.schedule} on parallel.pp={f.p.pp} needs at least "
        "{f.fewest_microbatches} micro-batches per rank, found {f.microbatches} ({f.rows} rows / "
        "{f.data_ranks} data-parallel ranks / training.micro_batch_size={f.t.micro_batch_size}): "
        "{because}; use a larger training.global_batch_tokens",
    ),
    Limit(
        concerns="pipeline",
        refused="`interleaved_*` with micro-batches that do not make whole rounds of at least `pp`",
        because="they are taken in equal rounds",
        broken=lambda f: f.p.pp > 1 and f.p.schedule.startswith("interleaved")
        and f.microbatches % f.rounds != 0,
        sentence="parallel.schedule={f.p.schedule} on parallel.pp={f.p.pp} found {f.microbatches} "
        "micro-batches per rank, which {f.rounds} rounds do not divide: {because}; use a "
        "training.global_batch_tokens that gives a multiple of {f.p.pp} micro-batches",
    ),
    Limit(
        concerns="pipeline",
        refused="`gpipe` or `1f1b` with several stages per rank",
        because="these schedules run one stage on each rank",
        broken=lambda f: f.p.pp > 1 and not f.several_stages and f.p.num_stages_per_rank != 1,
        sentence="parallel.schedule={f.p.schedule} found parallel.stages_per_rank="
        "{f.p.stages_per_rank}: {because}; use stages_per_rank=auto or "
        "schedule=interleaved_1f1b",
    ),
    Limit(
        concerns="pipeline",
        refused="`interleaved_*` with one stage per rank",
        because="there is nothing to interleave",
        broken=lambda f: f.p.pp > 1 and f.p.schedule.startswith("interleaved")
        and f.p.num_stages_per_rank < 2,
        sentence="parallel.schedule={f.p.schedule} found parallel.stages_per_rank="
        "{f.p.stages_per_rank}: {because}; use stages_per_rank=auto or schedule=1f1b",
    ),
    Limit(
        concerns="pipeline",
        refused="`zbv` or `dualpipev` with other than two stages per rank",
        because="rank r holds one stage of the way down and one of the way up",
        broken=lambda f: f.p.pp > 1 and f.p.schedule in V_SCHEDULES
        and f.p.num_stages_per_rank != 2,
        sentence="parallel.schedule={f.p.schedule} found parallel.stages_per_rank="
        "{f.p.stages_per_rank}: {because}; use stages_per_rank=2",
    ),
    Limit(
        concerns="pipeline",
        refused="`schedule` or `stages_per_rank` without `pp`",
        because="there is no pipeline to order",
        broken=lambda f: f.p.pp == 1
        and (f.p.schedule, f.p.stages_per_rank) != (DEFAULT.schedule, DEFAULT.stages_per_rank),
        sentence="parallel.schedule={f.p.schedule} with stages_per_rank={f.p.stages_per_rank} has "
        "no effect on parallel.pp=1: {because}; use pp of at least 2, or leave both out",
    ),
    Limit(
        concerns="pipeline, sharding",
        refused="`reshard_after_forward=true` with `interleaved_zero_bubble`, `zbv` or `dualpipev`",
        because="the backward of weights runs after FSDP2 has freed the parameters, and gradients "
        "are lost or wrong without an error",
        broken=lambda f: f.split_backward and f.p.reshard_after_forward is True,
        sentence="parallel.reshard_after_forward=true found with parallel.schedule="
        "{f.p.schedule}: {because}; use reshard_after_forward=auto",
    ),
    Limit(
        concerns="pipeline, sharding",
        refused="`reshard_after_forward=true` with any other schedule",
        because="every micro-batch would gather the parameters of its stage anew, twice",
        broken=lambda f: f.native and f.p.pp > 1 and not f.split_backward
        and f.p.reshard_after_forward is True,
        sentence="parallel.reshard_after_forward=true found with parallel.pp={f.p.pp}: {because}; "
        "use reshard_after_forward=auto",
    ),
    Limit(
        concerns="pipeline, replicas",
        refused="`replica_sum=overlapped` with `interleaved_zero_bubble`, `zbv` or `dualpipev`",
        because="the backward comes in two parts, and hooks would sum gradients before the second",
        broken=lambda f: f.split_backward and f.p.replica_sum == "overlapped",
        sentence="parallel.replica_sum=overlapped found with parallel.schedule={f.p.schedule}: "
        "{because}; use replica_sum=auto",
    ),
    Limit(
        concerns="pipeline, compile",
        refused="`engine.compile=true` with `interleaved_zero_bubble`, `zbv` or `dualpipev`",
        because="the backward of a compiled block cannot be split",
        broken=lambda f: f.split_backward and f.e.compile,
        sentence="engine.compile=true found with parallel.schedule={f.p.schedule}: {because}; use "
        "engine.compile=false or schedule=interleaved_1f1b",
    ),
    Limit(
        concerns="pipeline, recompute",
        refused="`recompute` with `interleaved_zero_bubble`, `zbv` or `dualpipev`",
        because="the gradients of weights come from a second pass, for which every block would be "
        "computed again, once for each of its matrices",
        broken=lambda f: f.split_backward and f.p.recompute != "none",
        sentence="parallel.recompute={f.p.recompute} found with parallel.schedule={f.p.schedule}: "
        "{because}; use recompute=none or schedule=interleaved_1f1b",
    ),
    Limit(
        concerns="sharding",
        refused="`reshard_after_forward` without `dp_shard`",
        because="nothing is sharded",
        broken=lambda f: f.native and f.p.dp_shard == 1 and f.p.reshard_after_forward != "auto"
        and not (f.p.pp > 1 and f.p.reshard_after_forward is True),
        sentence="parallel.reshard_after_forward={f.p.reshard_after_forward} has no effect on "
        "parallel.dp_shard=1: {because}; use reshard_after_forward=auto or a larger dp_shard",
    ),
    Limit(
        concerns="sharding",
        refused="`cpu_offload` without `dp_shard` above 1",
        because="FSDP2 offloads shards",
        broken=lambda f: f.native and f.p.cpu_offload and not f.layout_problem and not f.sharded,
        sentence="parallel.cpu_offload=true found with one rank along dp_shard: {because}; use "
        "parallel.dp_shard of at least 2 or cpu_offload=false",
    ),
    Limit(
        concerns="replicas, sharding",
        refused="`replica_sum` with `dp_shard` above 1",
        because="FSDP2 sums over replicas itself as it reduces the shards",
        broken=lambda f: f.sharded and f.p.replica_sum != "auto"
        and not (f.split_backward and f.p.replica_sum == "overlapped"),
        sentence="parallel.replica_sum={f.p.replica_sum} found with {f.dp_shard} ranks along "
        "dp_shard: {because}; use replica_sum=auto",
    ),
    Limit(
        concerns="replicas",
        refused="`replica_sum` without replicas",
        because="no two ranks hold the same parameters",
        broken=lambda f: f.native and not f.sharded and not f.replicas
        and f.p.replica_sum != "auto"
        and not (f.split_backward and f.p.replica_sum == "overlapped"),
        sentence="parallel.replica_sum={f.p.replica_sum} has no effect on parallel.dp_replicate=1 "
        "x cp=1: {because}; use replica_sum=auto or a larger dp_replicate",
    ),
    Limit(
        concerns="tensor",
        refused="`tp` that does not divide `num_key_value_heads` (and so `num_attention_heads`)",
        because="every rank holds whole heads, and the queries of each with their keys and values",
        broken=lambda f: f.m.num_key_value_heads % f.p.tp != 0,
        sentence="parallel.tp={f.p.tp} does not divide model.num_key_value_heads="
        "{f.m.num_key_value_heads}: {because}; use tp in {f.tp_choices}",
    ),
    Limit(
        concerns="tensor",
        refused="`tp` that does not divide `intermediate_size`",
        because="every rank holds as many columns of the feed-forward",
        broken=lambda f: f.m.intermediate_size % f.p.tp != 0,
        sentence="parallel.tp={f.p.tp} does not divide model.intermediate_size="
        "{f.m.intermediate_size}: {because}; use tp in {f.tp_choices}",
    ),
    Limit(
        concerns="tensor, context",
        refused="a sequence that is no multiple of `tp`, or of 2 `cp` `tp` with `cp` above 1",
        because="causal attention is balanced over 2 chunks per context-parallel rank, and "
        "tensor-parallel ranks share each evenly between blocks",
        broken=lambda f: f.t.sequence_length % f.sequence_unit != 0,
        sentence="training.sequence_length={f.t.sequence_length} is no multiple of "
        "{f.sequence_unit}, as parallel.cp={f.p.cp} x tp={f.p.tp} needs: {because}; use "
        "sequence_length={f.near_sequence}",
    ),
    Limit(
        concerns="context",
        refused="`cp_method=ulysses` where `cp` does not divide `num_key_value_heads` / `tp`",
        because="Ulysses shares out the heads of a rank, keys and values with their queries",
        broken=lambda f: f.p.cp_method == "ulysses" and f.m.num_key_value_heads % f.p.tp == 0
        and f.key_value_heads_per_rank % f.p.cp != 0,
        sentence="parallel.cp={f.p.cp} does not divide model.num_key_value_heads="
        "{f.m.num_key_value_heads} / parallel.tp={f.p.tp}: {because}; use cp_method=all_gather or "
        "ring",
    ),
    Limit(
        concerns="context",
        refused="`cp_method` without `cp`",
        because="attention stays on one rank",
        broken=lambda f: f.p.cp == 1 and f.p.cp_method != DEFAULT.cp_method,
        sentence="parallel.cp_method={f.p.cp_method} has no effect on parallel.cp=1: {because}; "
        "use cp of at least 2, or leave cp_method out",
    ),
    Limit(
        concerns="context",
        refused="`training.objective=dpo` with `cp` above 1",
        because="the log-probability of an answer is a sum over its tokens, and context-parallel "
        "ranks hold parts of it",
        broken=lambda f: f.t.objective == "dpo" and f.p.cp > 1,
        sentence="training.objective=dpo found with parallel.cp={f.p.cp}: {because}; use "
        "parallel.cp=1",
    ),
    Limit(
        concerns="recompute",
        refused="`recompute_budget` without `recompute=budget`",
        because="no other mode has a budget",
        broken=lambda f: f.p.recompute != "budget"
        and f.p.recompute_budget != DEFAULT.recompute_budget,
        sentence="parallel.recompute_budget={f.p.recompute_budget} has no effect on "
        "parallel.recompute={f.p.recompute}: {because}; use recompute=budget, or leave it out",
    ),
)  # fmt: skip
"""Limits of layouts, of both engines or of the native one."""

SUPPORT: tuple[Limit, ...] = (*NATIVE, *MEMORY, *PRECISION, *DEEPSPEED, *ADAPTERS)
"""Every limit, in the order in which they are reported."""

START = "<!-- made by python -m llmtrain.config.support docs/parallelism.md -->\n"
END = "<!-- end of the support matrix -->\n"


def table() -> str:
    """The matrix as a Markdown table."""
    rows = ["| concerns | refused | because |", "|---|---|---|"]
    rows += [f"| {x.concerns} | {x.refused} | {x.because} |" for x in SUPPORT]
    return "\n".join(rows) + "\n"


def page(text: str) -> str:
    """``text`` with the table between the two marks renewed."""
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}{table()}{END}{after}"


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(page(path.read_text()))
