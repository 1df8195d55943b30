"""Bytes that a block and the loss keep between a forward and its backward, in closed form.

Invariant: the formula counts what autograd saves with fused attention, norms and SwiGLU; a test
holds it against the tensors that a real block saves. No torch is imported.

    block_bytes_per_token(model, item=2, tp=1, recompute="none") * 4096 * micro_batch_size
"""

from llmtrain.config.model import ModelConfig
from llmtrain.config.parallel import SPLIT_BACKWARD, ParallelConfig, Schedule

_FP32 = 4


def block_bytes_per_token(model: ModelConfig, item: int, tp: int, recompute: str) -> float:
    """Bytes of one block per token of the rows a tensor-parallel group works on.

    Args:
        model: the architecture.
        item: bytes of an activation: 2 in bf16, 4 in fp32, 8 in fp64.
        tp: tensor-parallel ranks; between attention and feed-forward each has a part of the tokens.
        recompute: ``none``, ``selective`` or ``full``, as ``parallel.recompute``.
    """
    width, inner = model.hidden_size, model.intermediate_size
    queries = model.num_attention_heads * model.head_size
    keys = model.num_key_value_heads * model.head_size
    residual = width * item / tp
    if recompute == "full":
        return residual
    sums = model.num_attention_heads * _FP32 / tp  # logsumexp of every query and head
    attention = (2 * queries + 2 * keys) * item / tp + sums
    if recompute == "selective":  # the results of all products and of attention
        return residual + attention + (2 * width + 2 * inner / tp) * item
    inverse = 2 * _FP32 / tp  # 1 / RMS of the two norms
    normed = 2 * width * item  # inputs of attention and of the feed-forward, gathered over tp
    kept = 2 * residual + normed + inverse + attention + 3 * inner * item / tp
    if model.qk_norm:
        heads = model.num_attention_heads + model.num_key_value_heads
        kept += ((queries + keys) * item + heads * _FP32) / tp
    return kept


def loss_bytes(model: ModelConfig, item: int, tp: int, tokens: int, chunk_tokens: int) -> float:
    """Bytes the head and the loss need at their peak, on the rank that has them.

    Logits of one chunk and what the softmax of them takes in fp32, the gradient of the hidden
    states, and that of the matrix.
    """
    rows = model.vocab_size / tp
    chunk = min(chunk_tokens, tokens)
    logits = chunk * rows * (item + _FP32)
    return logits + 2 * tokens * model.hidden_size * item + rows * model.hidden_size * item


def live_forwards(schedule: Schedule, pp: int, rank: int, microbatches: int, stages: int) -> int:
    """Forwards of single stages whose backward is still to come, at the peak of a rank.

    Args:
        schedule: order of the micro-batches.
        pp: pipeline ranks.
        rank: which of them.
        microbatches: micro-batches of a step on each rank.
        stages: stages on each rank; a stage is ``1 / stages`` of the rank's blocks.
    """
    if pp == 1:
        return 1
    every = microbatches * stages
    if schedule == "gpipe":
        return every
    if schedule == "1f1b":
        return min(every, pp - rank)
    if schedule in SPLIT_BACKWARD:
        return min(every, pp * stages + (schedule == "dualpipev"))
    ahead = 2 * (pp - 1 - rank) + (stages - 1) * pp + 1
    return min(every, ahead)


def bubble(parallel: ParallelConfig, microbatches: int) -> float:
    """Idle share of a pipeline's step, where a forward and both halves of a backward cost alike.

    Sources: arXiv:1811.06965, 2104.04473, 2401.10241; benchmarks/pipeline_idle.py measures them.
    """
    pp, stages = parallel.pp, parallel.num_stages_per_rank
    factors = {"gpipe": 1, "1f1b": 1, "interleaved_1f1b": stages, "dualpipev": 3}
    if pp == 1:
        return 0.0
    factor = factors.get(parallel.schedule, 3 * stages)
    return (pp - 1) / (factor * microbatches + pp - 1)
