"""Memory and time of a training step on GPUs that are not here.

Invariant: memory is counted in closed form for the rank that needs most; times are what the rates
given come to, and no better than those. No torch is imported.

    found = estimate(config)
    found.memory.total / 2**30, found.step_s
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from llmtrain.config.parallel import ParallelConfig, microbatches_per_rank, resolve_dp
from llmtrain.config.plan import PlanConfig
from llmtrain.errors import ConfigError
from llmtrain.planner.activations import block_bytes_per_token, bubble, live_forwards, loss_bytes
from llmtrain.planner.devices import DEVICES, Device, device
from llmtrain.planner.flops import flops_per_token, num_adapter_parameters
from llmtrain.planner.memory import Seat, block_shapes, num_elements, rank_shapes, state_bytes
from llmtrain.planner.stages import split_layers, stages_of_rank

GIB = 2.0**30
_ITEM = {"fp64": 8, "fp32": 4, "bf16": 2}
_REDUCED = 4
"""Bytes of an element of a gradient that is summed or accumulated."""


Held = dict[tuple[ParallelConfig, int, int], tuple[int, int]]
"""By layout, ranks along dp_shard and pipeline rank: bytes of state, elements before sharding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes on the GPU that needs most, at the peak of a step."""

    state: float
    """Parameters, gradients and optimizer state that stay."""
    gathered: float
    """Parameters that FSDP2 has put together, and gradients it has not yet taken apart."""
    activations: float
    """What blocks keep for their backward."""
    loss: float
    """Logits and gradients of the head."""

    @property
    def total(self) -> float:
        """The sum."""
        return self.state + self.gathered + self.activations + self.loss


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """One configuration on the GPUs asked for."""

    config: PlanConfig
    """Its layout has no ``auto``."""
    microbatches: int
    """Micro-batches of a step on each rank."""
    memory: Memory
    """Of the GPU that needs most."""
    limit: float
    """Bytes of a GPU that the run may take."""
    compute_s: float
    """Seconds of a step in which a GPU computes."""
    bubble: float
    """Share of a step in which a stage of the pipeline waits for others, communication apart."""
    exposed_s: float
    """Seconds of a step in which computation waits for communication."""

    @property
    def step_s(self) -> float:
        """Seconds of a step."""
        return self.compute_s / (1 - self.bubble) + self.exposed_s

    @property
    def fits(self) -> bool:
        """Whether the memory is enough."""
        return self.memory.total <= self.limit

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second of all GPUs together."""
        return self.config.training.global_batch_tokens / self.step_s

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation of the whole step; recomputation and waiting count against it."""
        training = self.config.training
        flops = flops_per_token(self.config.model, training.sequence_length)
        peak = gpu_of(self.config).tflops * 1e12 * self.config.num_gpus
        return self.tokens_per_s * flops / peak


def gpu_of(config: PlanConfig) -> Device:
    """The kind of GPU asked for.

    Raises:
        ConfigError: it is not known.
    """
    found = device(config.gpu)
    if found is None:
        raise ConfigError(f"gpu={config.gpu} is not known; use one of {', '.join(DEVICES)}")
    return found


def estimate(config: PlanConfig, held: Held | None = None) -> Estimate:
    """Count memory and time of ``config``, which breaks no rule on ``config.num_gpus`` ranks.

    Args:
        config: model, layout, training and GPUs.
        held: kept from one call to the next while only layout and micro-batch size change; it
            spares counting the same parts again.

    Raises:
        ConfigError: the kind of GPU is not known.
    """
    gpu, layout = gpu_of(config), _Layout(config, {} if held is None else held)
    memory = max((layout.memory(rank) for rank in range(config.parallel.pp)), key=_total)
    held_gib = gpu.memory_gib if config.memory_gib is None else config.memory_gib
    compute_s = layout.compute_s(gpu)
    return Estimate(
        config=config,
        microbatches=layout.microbatches,
        memory=memory,
        limit=(held_gib - config.reserve_gib) * GIB,
        compute_s=compute_s,
        bubble=bubble(config.parallel, layout.microbatches),
        exposed_s=layout.exposed_s(compute_s),
    )


def _total(memory: Memory) -> float:
    return memory.total


class _Layout:
    """One configuration with everything that its parts share worked out."""

    def __init__(self, config: PlanConfig, held: Held) -> None:
        self.config, self.held = config, held
        parallel, training = config.parallel, config.training
        self.dp_replicate, self.dp_shard = resolve_dp(parallel, config.num_gpus)
        self.microbatches = microbatches_per_rank(
            parallel, training.global_batch_tokens // training.sequence_length,
            self.dp_replicate * self.dp_shard, training.micro_batch_size,
        )  # fmt: skip
        self.item = _ITEM[config.engine.precision]
        self.tokens = training.micro_batch_size * training.sequence_length / parallel.cp
        self.sharded = self._shards_parameters()
        self.reshards = self.sharded and (
            parallel.pp == 1
            if parallel.reshard_after_forward == "auto"
            else parallel.reshard_after_forward
        )

    def _shards_parameters(self) -> bool:
        if self.config.engine.kind == "deepspeed":
            return self.config.engine.deepspeed.zero_stage == 3 and self.dp_shard > 1
        return self.dp_shard > 1

    def memory(self, pp_rank: int) -> Memory:
        """Bytes of the first tensor-parallel rank of ``pp_rank``; no other of them has more."""
        c = self.config
        has_head = self._last_stage() in self._stages(pp_rank)
        loss = 0.0
        if has_head:
            loss = loss_bytes(
                c.model, self.item, c.parallel.tp, int(self.tokens), c.engine.loss_chunk_tokens
            )
        return Memory(
            state=0.0 if c.parallel.cpu_offload else self._held(pp_rank)[0],
            gathered=self._gathered(pp_rank),
            activations=self._activations(pp_rank),
            loss=loss,
        )

    def _held(self, pp_rank: int) -> tuple[int, int]:
        """Bytes of state, and elements of the parameters before sharding."""
        c = self.config
        key = replace(c.parallel, recompute="none"), self.dp_shard, pp_rank
        if key not in self.held:
            seat = Seat(pp=pp_rank)
            state = state_bytes(c.model, c.parallel, c.engine, c.optimizer, self.dp_shard, seat)
            own = num_elements(rank_shapes(c.model, c.parallel, seat))
            self.held[key] = state.total, own
        return self.held[key]

    def _stages(self, pp_rank: int) -> tuple[int, ...]:
        p = self.config.parallel
        return stages_of_rank(p.schedule, p.pp, pp_rank, p.num_stages_per_rank)

    def _last_stage(self) -> int:
        return self.config.parallel.num_stages - 1

    def _blocks(self, pp_rank: int) -> int:
        p = self.config.parallel
        ranges = split_layers(self.config.model, p.num_stages, p.schedule, p.num_stages_per_rank)
        return sum(len(ranges[stage]) for stage in self._stages(pp_rank))

    def _gathered(self, pp_rank: int) -> float:
        """Bytes of whole parameters and whole gradients under sharding."""
        if not self.sharded:
            return 0.0
        parallel = self.config.parallel
        own, blocks = self._held(pp_rank)[1], self._blocks(pp_rank)
        block = self._block_elements()
        rest = own - blocks * block  # embedding, last norm, head: gathered all through
        here = min(blocks, 1 + parallel.fsdp_prefetch) if self.reshards else blocks
        parameters = (rest + here * block) * self.item
        keeps_whole = self.microbatches > 1 and not parallel.reduce_every_microbatch
        model = self.config.model
        if model.adapter is not None:  # the rest has no gradients
            block, rest = num_adapter_parameters(model) // model.num_hidden_layers, 0
            own = blocks * block
        whole = own if keeps_whole else max(block, rest)
        return parameters + whole * _REDUCED + max(block, rest) * self.item

    def _block_elements(self) -> int:
        parts = block_shapes(self.config.model, 0)
        return num_elements(parts.items()) // self.config.parallel.tp

    def _activations(self, pp_rank: int) -> float:
        """Bytes that the blocks of all micro-batches under way keep, and one that runs again."""
        model, p = self.config.model, self.config.parallel
        stages, blocks = p.num_stages_per_rank, self._blocks(pp_rank)
        live = live_forwards(p.schedule, p.pp, pp_rank, self.microbatches, stages)
        every = block_bytes_per_token(model, self.item, p.tp, "none") * self.tokens
        if p.recompute == "budget":
            kept, again = p.recompute_budget * every, 0.0
        else:
            kept = block_bytes_per_token(model, self.item, p.tp, p.recompute) * self.tokens
            again = every - kept if p.recompute != "none" else 0.0
        held = live * blocks / stages
        if p.activation_offload:
            held = min(held, 3.0)  # the last block, and two on their way
        return held * kept + again

    def compute_s(self, gpu: Device) -> float:
        """Seconds a GPU computes in a step; what is recomputed in full costs a forward again."""
        training, p = self.config.training, self.config.parallel
        flops = flops_per_token(self.config.model, training.sequence_length)
        again = 4 / 3 if p.recompute == "full" else 1.0
        rate = gpu.tflops * 1e12 * self.config.mfu * self.config.num_gpus
        return training.global_batch_tokens * flops * again / rate

    def exposed_s(self, compute_s: float) -> float:
        """Seconds of a step in which computation waits for communication."""
        hidden = sum(self._sharding_s()) - compute_s  # it runs beside the computation
        return self._tensor_s() + self._context_s() + max(0.0, hidden)

    def _tensor_s(self) -> float:
        """Gathers and reduce-scatters of hidden states over tp: four a block, each way."""
        p = self.config.parallel
        passes = 3 if p.recompute == "full" else 2
        hidden = self.tokens * self.config.model.hidden_size * self.item * (p.tp - 1) / p.tp
        blocks = self._blocks(0) * self.microbatches
        return passes * 4 * blocks * hidden / self._bytes_per_s(p.tp)

    def _context_s(self) -> float:
        """Keys and values of the other ranks of cp, and their gradients on the way back."""
        p, model = self.config.parallel, self.config.model
        keys = 2 * model.num_key_value_heads * model.head_size / p.tp
        others = self.tokens * (p.cp - 1) * keys * self.item
        blocks = self._blocks(0) * self.microbatches
        return 2 * blocks * others / self._bytes_per_s(p.cp, apart=p.tp)

    def _sharding_s(self) -> Iterator[float]:
        """Gathers and reduce-scatters of FSDP2, and sums over replicas."""
        p = self.config.parallel
        own = trained = self._held(0)[1]
        if (model := self.config.model).adapter is not None:
            trained = self._blocks(0) * num_adapter_parameters(model) // model.num_hidden_layers
        ranks = self.dp_shard * p.cp
        rate = self._bytes_per_s(ranks, apart=p.tp)
        if self.sharded:
            gathers = 2 * self.microbatches if self.reshards else 1
            yield gathers * own * self.item * (ranks - 1) / ranks / rate
            sums = self.microbatches if p.reduce_every_microbatch else 1
            yield sums * trained * _REDUCED * (ranks - 1) / ranks / rate
        if self.dp_replicate > 1:
            share = trained / (ranks if self.sharded else 1)
            yield 2 * share * _REDUCED / self._bytes_per_s(self.dp_replicate, apart=ranks * p.tp)

    def _bytes_per_s(self, ranks: int, apart: int = 1) -> float:
        """Rate of a group of ``ranks`` whose neighbours in rank order are ``apart``.

        Between machines every member of the group sends through a network card of its own, and
        what is gathered crosses once for all members of a machine.
        """
        c = self.config
        if ranks * apart <= c.gpus_per_node:
            return 1e9 * c.node_gb_per_s
        members = max(1, c.gpus_per_node // apart)
        return 1e9 * min(c.node_gb_per_s, members * c.network_gb_per_s)
