"""Bytes of parameters, gradients and optimizer state that a rank holds, in closed form.

Invariant: the formula knows the configuration only, builds nothing and imports no torch; it counts
what stays from one step to the next and, of gradients, what is there when the optimizer runs.
Activations, gathered parameters and buffers of collectives are not state, nor
are the few gradients that live at a time under ``optimizer.in_backward``.

    seats = list(seats_of(parallel, dp_shard=8))
    max(state_bytes(model, parallel, engine, optimizer, 8, seat).total for seat in seats) / 2**30
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from llmtrain.config.engine import EngineConfig
from llmtrain.config.model import ModelConfig
from llmtrain.config.parallel import ParallelConfig
from llmtrain.config.training import OptimizerConfig
from llmtrain.planner.stages import split_layers, stages_of_rank
from llmtrain.planner.zero import COUNTER_BYTES, StateBytes, zero_state_bytes

Shape = tuple[int, ...]

EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"

_ROWS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "embed_tokens", "lm_head")
"""Modules of which tensor parallelism gives each rank some outputs (or rows of the vocabulary)."""
_COLUMNS = ("o_proj", "down_proj")
"""Modules of which it gives each rank some inputs; a bias stays whole."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """Where a rank sits, as far as its state depends on it; replicas hold the same."""

    pp: int = 0
    """Pipeline rank."""
    shard: int = 0
    """Number among the ranks that FSDP2 or ZeRO shards over."""
    tp: int = 0
    """Tensor-parallel rank."""


def seats_of(parallel: ParallelConfig, dp_shard: int) -> Iterator[Seat]:
    """List the places of a layout with ``dp_shard`` resolved."""
    for pp in range(parallel.pp):
        for shard in range(_num_shards(parallel, dp_shard)):
            for tp in range(parallel.tp):
                yield Seat(pp=pp, shard=shard, tp=tp)


def state_bytes(
    model: ModelConfig,
    parallel: ParallelConfig,
    engine: EngineConfig,
    optimizer: OptimizerConfig,
    dp_shard: int,
    seat: Seat,
) -> StateBytes:
    """Count the state of the rank at ``seat``.

    Args:
        model: the whole model.
        parallel: the layout.
        engine: kind, precision, type of the masters and ZeRO stage.
        optimizer: kind, and type of the moments.
        dp_shard: ranks along that axis, ``auto`` resolved; under DeepSpeed all data ranks.
        seat: the rank.
    """
    shapes = rank_shapes(model, parallel, seat)
    if engine.kind == "deepspeed":
        return zero_state_bytes(shapes, engine, num_moments(optimizer.kind, ""), dp_shard)
    item = 8 if engine.precision == "fp64" else 4  # of gradients, always
    ranks = _num_shards(parallel, dp_shard)
    kept = 2 if engine.master_dtype == "bf16" else item
    copies = 2 if engine.precision == "bf16" and ranks == 1 and kept > 2 else 0
    computed = 2 if engine.precision == "bf16" else item
    moment = 2 if optimizer.state_dtype == "bf16" else item
    parameters = gradients = moments = 0
    for name, shape in shapes:
        row = math.prod(shape[1:])
        chunk = -(-shape[0] // ranks)
        held = max(0, min(chunk, shape[0] - seat.shard * chunk))
        if is_packed(model, name):
            parameters += packed_bytes(shape[0] * row)  # never sharded
            continue
        if not is_trained(model, name):
            parameters += chunk * row * computed
            continue
        parameters += chunk * row * (kept + copies)  # shards are padded to equal sizes
        gradients += 0 if optimizer.in_backward else chunk * row * item
        moments += num_moments(optimizer.kind, name) * held * row * moment + COUNTER_BYTES
    return StateBytes(parameters=parameters, gradients=gradients, optimizer=moments)


def is_trained(model: ModelConfig, name: str) -> bool:
    """Tell whether the optimizer updates a parameter: beside an adapter only the adapter."""
    return model.adapter is None or ".lora_" in name


def is_packed(model: ModelConfig, name: str) -> bool:
    """Tell whether a matrix is kept in 4 bits: those of the blocks, where the adapter says so."""
    matrix = name.endswith("_proj.weight")
    return matrix and model.adapter is not None and model.adapter.quantize_base is not None


def packed_bytes(count: int) -> int:
    """Bytes of ``count`` values in 4 bits with an fp32 factor for every 64 of them."""
    return -(-count // 2) + 4 * -(-count // 64)


def num_moments(optimizer: str, name: str) -> int:
    """Count the tensors of a parameter's size that an optimizer keeps for it.

    Muon keeps one for the matrices of the blocks; the rest goes by AdamW.
    """
    if optimizer == "lion":
        return 1
    matrix = ".layers." in name and "norm" not in name and name.endswith(".weight")
    return 1 if optimizer == "muon" and matrix else 2


def parameter_shapes(model: ModelConfig) -> dict[str, Shape]:
    """List the stored parameters of the whole model and their shapes, in the model's order."""
    shapes: dict[str, Shape] = {EMBEDDING: (model.vocab_size, model.hidden_size)}
    for layer in range(model.num_hidden_layers):
        shapes |= block_shapes(model, layer)
    shapes[NORM] = (model.hidden_size,)
    if not model.tie_word_embeddings:
        shapes[HEAD] = (model.vocab_size, model.hidden_size)
    return shapes


def block_shapes(model: ModelConfig, layer: int) -> dict[str, Shape]:
    """List the parameters of one block and their shapes, in the block's order."""
    width, head, inner = model.hidden_size, model.head_size, model.intermediate_size
    queries, keys = model.num_attention_heads * head, model.num_key_value_heads * head
    shapes: dict[str, Shape] = {"input_layernorm.weight": (width,)}
    for name, size in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
        shapes |= _matrix(model, f"self_attn.{name}", size, width, model.attention_bias)
    output_bias = model.attention_output_bias
    shapes |= _matrix(model, "self_attn.o_proj", width, queries, output_bias)
    if model.qk_norm:
        shapes |= {f"self_attn.{name}_norm.weight": (head,) for name in ("q", "k")}
    shapes["post_attention_layernorm.weight"] = (width,)
    for name in ("gate_proj", "up_proj"):
        shapes |= _matrix(model, f"mlp.{name}", inner, width)
    shapes |= _matrix(model, "mlp.down_proj", width, inner)
    if model.post_norms:
        names = ("post_self_attn_layernorm", "post_mlp_layernorm")
        shapes |= {f"{name}.weight": (width,) for name in names}
    return {f"model.layers.{layer}.{name}": shape for name, shape in shapes.items()}


def _matrix(
    model: ModelConfig, name: str, outputs: int, inputs: int, bias: bool = False
) -> dict[str, Shape]:
    """List a linear map's matrix, its bias and its adapter."""
    shapes: dict[str, Shape] = {f"{name}.weight": (outputs, inputs)}
    if bias:
        shapes[f"{name}.bias"] = (outputs,)
    adapter = model.adapter
    if adapter is not None and name.rpartition(".")[2] in adapter.targets:
        shapes[f"{name}.lora_A.weight"] = (adapter.rank, inputs)
        shapes[f"{name}.lora_B.weight"] = (outputs, adapter.rank)
    return shapes


def rank_shapes(
    model: ModelConfig, parallel: ParallelConfig, seat: Seat
) -> list[tuple[str, Shape]]:
    """List what tensor and pipeline parallelism leave of the model at ``seat``.

    With tied embeddings a pipeline's last stage holds a copy of the matrix.
    """
    per_rank = parallel.num_stages_per_rank
    ranges = split_layers(model, parallel.num_stages, parallel.schedule, per_rank)
    matrix = (model.vocab_size, model.hidden_size)
    shapes: list[tuple[str, Shape]] = []
    for stage in stages_of_rank(parallel.schedule, parallel.pp, seat.pp, per_rank):
        if stage == 0:
            shapes.append((EMBEDDING, matrix))
        for layer in ranges[stage]:
            shapes += block_shapes(model, layer).items()
        if stage == parallel.num_stages - 1:
            shapes.append((NORM, (model.hidden_size,)))
            if not model.tie_word_embeddings or parallel.num_stages > 1:
                shapes.append((HEAD, matrix))
    return [(name, _cut(name, shape, parallel.tp, seat.tp)) for name, shape in shapes]


def num_elements(shapes: Iterable[tuple[str, Shape]]) -> int:
    """Count the elements of parameters."""
    return sum(math.prod(shape) for _, shape in shapes)


def _cut(name: str, shape: Shape, tp: int, rank: int) -> Shape:
    """Give the shape of a part; where ``tp`` leaves a rest, the first ranks get one more."""
    module, kind = name.split(".")[-2:]
    if module in ("lora_A", "lora_B"):
        matrix = name.split(".")[-3]
        if (module == "lora_B") != (matrix in _ROWS):
            return shape
        module = matrix
    if module in _ROWS:
        dim = 0
    elif module in _COLUMNS and kind == "weight":
        dim = 1
    else:
        return shape
    size, rest = divmod(shape[dim], tp)
    return (*shape[:dim], size + (rank < rest), *shape[dim + 1 :])


def _num_shards(parallel: ParallelConfig, dp_shard: int) -> int:
    """Count the ranks that share parameters: context-parallel ranks share where data ranks do."""
    return dp_shard * parallel.cp if dp_shard > 1 else 1
