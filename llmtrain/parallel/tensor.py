"""Tensor and sequence parallelism: every matrix is spread over the ranks of one group.

Between blocks each rank holds hidden [B, S / ranks, D] of its part of the sequence; attention and
feed-forward gather the sequence, run the rank's heads or columns, and reduce-scatter the result
(arXiv:1909.08053 section 3, arXiv:2205.05198 section 4.2.2). The vocabulary is spread too, and the
loss is taken over the parts (ops/cross_entropy.py). Everything is plain tensors and two
collectives, so FSDP2 may shard the local parameters further and any engine may run the result.

Invariant: names stay; of each row of the matrices that are split exactly one rank has the value.
Norms and the bias after the output projection are on all ranks, and each rank's gradient of them
is a partial sum over the group. A dim that the ranks do not divide gives the first ranks one more.

    with torch.device("meta"):
        transformer = Transformer(config)
    slices = apply_tensor_parallel(transformer, group)
    slices["model.embed_tokens.weight"]    # (slice(34, 67), slice(0, 20)) on rank 1 of 2
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from llmtrain.config.model import ModelConfig
from llmtrain.errors import LayoutError
from llmtrain.model.layers import Block, Embedding, Linear
from llmtrain.model.transformer import Transformer
from llmtrain.ops.cross_entropy import VocabPartition
from llmtrain.parallel.collectives import gather_along, reduce_scatter_along, stack_over
from llmtrain.parallel.region import Region, whole

ROWS, SEQUENCE = 0, 1
"""Dims of hidden [B, S, D] that can be spread between blocks; a single token has no sequence."""

Slices = dict[str, Region]
"""By parameter name: which slices of the whole parameter this rank holds."""


def apply_tensor_parallel(
    transformer: Transformer, group: dist.ProcessGroup, spread: int = SEQUENCE
) -> Slices:
    """Leave of ``transformer``, whole or a pipeline stage, this rank's part; in place.

    Parameters are cut where they are: on the meta device nothing is allocated. ``spread`` is the
    dim of hidden that ranks share between blocks; they must divide it.

    Returns:
        The slices of every parameter that was cut; those it does not name are whole on every rank
        and their gradients are partial sums.

    Raises:
        LayoutError: the ranks do not divide the key and value heads, or there are more ranks than
            columns of the feed-forward or rows of the vocabulary.
    """
    _check(transformer.config, group.size())
    cut = _Cut(group, spread, {})
    partition = vocab_partition(transformer.config.vocab_size, group)
    for name, block in transformer.model.layers.items():
        if not isinstance(block, Block):
            raise TypeError(f"layer {name} is a {type(block).__name__}, not a Block")
        cut.block(block, f"model.layers.{name}.")
    embedding = transformer.model.embed_tokens
    if embedding is not None:
        cut.rows(embedding, "model.embed_tokens.")
        transformer.model.embed_tokens = VocabParallelEmbedding(embedding, partition, group, spread)
    if transformer.model.norm is not None:
        transformer.model.norm.register_forward_hook(_GatherOutput(group, spread))
    if transformer.lm_head is not None:
        cut.rows(transformer.lm_head, "lm_head.")
        transformer.lm_head.partition = partition
    return cut.slices


def vocab_partition(vocab_size: int, group: dist.ProcessGroup) -> VocabPartition:
    """Describe this rank's part of the vocabulary, with sums and maxima in rank order."""
    return VocabPartition(
        start=even_part(vocab_size, group.size(), group.rank()).start,
        sum=lambda x: stack_over(x, group).sum(dim=0),
        max=lambda x: stack_over(x, group).amax(dim=0),
    )


def even_part(size: int, parts: int, index: int) -> slice:
    """Cut ``size`` into contiguous parts, the first ``size % parts`` one longer; give one."""
    length, longer = divmod(size, parts)
    start = index * length + min(index, longer)
    return slice(start, start + length + (index < longer))


class RowParallelLinear(Linear):
    """A linear map of which each rank has some input columns; its output is spread over ranks."""

    def __init__(self, part: Linear, group: dist.ProcessGroup, spread: int) -> None:
        """Take over the parameters of ``part``, whose bias, if any, is whole."""
        super().__init__(part.in_features, part.out_features, part.bias is not None, device="meta")
        self.weight, self.bias = part.weight, part.bias
        self.lora_A, self.lora_B, self.lora_scale = part.lora_A, part.lora_B, part.lora_scale
        self.group, self.spread = group, spread

    def forward(self, input: Tensor) -> Tensor:
        """Map [B, S, own inputs] to this rank's part of [B, S, D]; the bias comes after the sum."""
        partial = self.adapted((self.product or F.linear)(input, self.weight, None), input)
        out = reduce_scatter_along(partial, self.spread, self.group)
        return out if self.bias is None else out + self.bias


class VocabParallelEmbedding(Embedding):
    """A table of which each rank has some rows; its output is spread over ranks."""

    def __init__(
        self, part: Embedding, partition: VocabPartition, group: dist.ProcessGroup, spread: int
    ) -> None:
        """Take over the rows of ``part``, which are those of ``partition``."""
        super().__init__(part.num_embeddings, part.embedding_dim, device="meta")
        self.weight = part.weight
        self.partition: VocabPartition = partition
        self.group, self.spread = group, spread

    def forward(self, input: Tensor) -> Tensor:
        """Look up tokens [B, S]; this rank's part of the vectors [B, S, D].

        An id outside the whole vocabulary is left to the lookup of an outer rank, which refuses it
        as that of one rank does.
        """
        row = input - self.partition.start
        elsewhere = torch.zeros_like(row, dtype=torch.bool)
        if self.group.rank() > 0:
            elsewhere |= row < 0
        if self.group.rank() < self.group.size() - 1:
            elsewhere |= row >= self.num_embeddings
        found = F.embedding(row.masked_fill(elsewhere, 0), self.weight)
        found = found.masked_fill(elsewhere[..., None], 0.0)
        return reduce_scatter_along(found, self.spread, self.group)


def _check(config: ModelConfig, ranks: int) -> None:
    heads = config.num_key_value_heads
    if heads % ranks:
        fit = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        raise LayoutError(
            f"parallel.tp={ranks} does not divide model.num_key_value_heads={heads}; "
            f"use tp in {{{fit}}}"
        )
    for name in ("intermediate_size", "vocab_size"):
        if getattr(config, name) < ranks:
            raise LayoutError(
                f"parallel.tp={ranks} ranks cannot share model.{name}={getattr(config, name)}; "
                f"use tp <= {getattr(config, name)}"
            )


@dataclass(frozen=True)
class _GatherInput:
    """Hook before a module whose first argument is this rank's part of hidden [B, S, D]."""

    group: dist.ProcessGroup
    spread: int

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (gather_along(args[0], self.spread, self.group), *args[1:])


@dataclass(frozen=True)
class _GatherOutput:
    """Hook after a module that returns this rank's part of hidden [B, S, D]."""

    group: dist.ProcessGroup
    spread: int

    def __call__(self, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        return gather_along(out, self.spread, self.group)


@dataclass(frozen=True)
class _Cut:
    """Cuts modules and notes what of each parameter is left."""

    group: dist.ProcessGroup
    spread: int
    slices: Slices

    def block(self, block: Block, prefix: str) -> None:
        """Cut one block and have it gather hidden twice: for attention and feed-forward."""
        attention, mlp = block.self_attn, block.mlp
        for name in ("q_proj", "k_proj", "v_proj"):
            self.rows(getattr(attention, name), f"{prefix}self_attn.{name}.")
        for name in ("gate_proj", "up_proj"):
            self.rows(getattr(mlp, name), f"{prefix}mlp.{name}.")
        self.columns(attention.o_proj, f"{prefix}self_attn.o_proj.")
        attention.o_proj = RowParallelLinear(attention.o_proj, self.group, self.spread)
        self.columns(mlp.down_proj, f"{prefix}mlp.down_proj.")
        mlp.down_proj = RowParallelLinear(mlp.down_proj, self.group, self.spread)
        gather = _GatherInput(self.group, self.spread)
        attention.register_forward_pre_hook(gather)
        mlp.register_forward_pre_hook(gather)

    def rows(self, module: Linear | Embedding, prefix: str) -> None:
        """Keep this rank's outputs of a linear map, bias and adapter too, or rows of a table."""
        module.weight = self._keep(prefix + "weight", module.weight, 0)
        if isinstance(module, Embedding):
            module.num_embeddings = module.weight.shape[0]
            return
        module.out_features = module.weight.shape[0]
        if module.bias is not None:
            module.bias = self._keep(prefix + "bias", module.bias, 0)
        if module.lora_B is not None:
            self.rows(module.lora_B, f"{prefix}lora_B.")

    def columns(self, module: Linear, prefix: str) -> None:
        """Keep this rank's inputs of a linear map (of its adapter too); a bias stays whole."""
        module.weight = self._keep(prefix + "weight", module.weight, 1)
        module.in_features = module.weight.shape[1]
        if module.lora_A is not None:
            self.columns(module.lora_A, f"{prefix}lora_A.")

    def _keep(self, name: str, full: Tensor, dim: int) -> nn.Parameter:
        region = list(whole(tuple(full.shape)))
        region[dim] = even_part(full.shape[dim], self.group.size(), self.group.rank())
        self.slices[name] = tuple(region)
        local = full.detach()[self.slices[name]].clone(memory_format=torch.contiguous_format)
        return nn.Parameter(local, requires_grad=full.requires_grad)
