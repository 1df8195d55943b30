"""One decoder-only Transformer for LLaMA, Qwen2/3, Mistral and GLM-4, whole or in stages.

Invariant: parameter names and shapes are those of Hugging Face checkpoints, on every stage: a stage
holds a subset of the names and renumbers nothing. What a config means never depends on its name.

    model = Transformer(config)
    initialize_model(model, config, seed=0)
    hidden_BSD = model(tokens_BS, positions_BS, document_ids_BS)
    logits_BSV = model.logits(hidden_BSD)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmtrain.config.model import ModelConfig
from llmtrain.errors import LayoutError
from llmtrain.model.adapter import freeze_base, insert_adapter
from llmtrain.model.cache import KeyValueCache
from llmtrain.model.layers import Block, BlockContext, Embedding, Linear, RMSNorm
from llmtrain.model.mup import output_multiplier
from llmtrain.ops.attention.sdpa import sdpa_attention
from llmtrain.ops.attention.spec import AttentionFunction, AttentionSpec
from llmtrain.ops.cross_entropy import VocabPartition
from llmtrain.ops.kernels import TORCH_KERNELS, Kernels
from llmtrain.ops.rope import Rotation, rope_frequencies


class TiedHead(nn.Module):
    """The output head of a model whose embedding matrix is also its head; owns no parameter."""

    def __init__(self, embedding: Embedding) -> None:
        super().__init__()
        self.embedding = embedding

    @property
    def weight(self) -> Tensor:
        """The embedding matrix [V, D], or the rows of it that are here."""
        return self.embedding.weight

    @property
    def partition(self) -> VocabPartition | None:
        """Which rows are here; None where all are."""
        return self.embedding.partition

    def forward(self, hidden: Tensor) -> Tensor:
        """Return logits [..., V] of hidden [..., D]."""
        return F.linear(hidden, self.weight)


class Decoder(nn.Module):
    """What Hugging Face checkpoints keep under ``model.``: embedding, blocks, final norm."""

    def __init__(
        self,
        config: ModelConfig,
        layers: range,
        embedding: bool,
        head: bool,
        attention: AttentionFunction,
        kernels: Kernels,
    ) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size) if embedding else None
        self.layers = nn.ModuleDict({str(i): Block(config, i, attention, kernels) for i in layers})
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, kernels) if head else None
        self._output_multiplier = output_multiplier(config)

    def forward(self, x: Tensor, context: BlockContext) -> Tensor:
        """Tokens [B, S] or hidden [B, S, D] to hidden [B, S, D]."""
        if self.embed_tokens is not None:
            x = self.embed_tokens(x)
        for block in self.layers.values():
            x = block(x, context)
        if self.norm is None:
            return x
        x = self.norm(x)
        return x if self._output_multiplier == 1.0 else x * self._output_multiplier


class Transformer(nn.Module):
    """A whole model, or the part of it that one pipeline stage holds."""

    def __init__(
        self,
        config: ModelConfig,
        layers: range | None = None,
        embedding: bool = True,
        head: bool = True,
        attention: AttentionFunction = sdpa_attention,
        kernels: Kernels = TORCH_KERNELS,
    ) -> None:
        """Build blocks ``layers`` (all by default), with or without embedding and head.

        With tied embeddings, a head without the embedding holds its own copy of the matrix as
        ``lm_head.weight``; who splits the model so keeps the two equal.

        Raises:
            LayoutError: the range does not lie in the model.
        """
        super().__init__()
        layers = range(config.num_hidden_layers) if layers is None else layers
        _check_layers(config, layers)
        self.config = config
        self.model = Decoder(config, layers, embedding, head, attention, kernels)
        self.lm_head = (
            Linear(config.hidden_size, config.vocab_size, bias=False)
            if head and not (config.tie_word_embeddings and embedding)
            else None
        )
        if config.adapter is not None:
            insert_adapter(self.model.layers, config.adapter)
            freeze_base(self)
        self._frequencies, self._rope_factor = rope_frequencies(
            config.head_size, config.rope_theta, config.rope_scaling, config.rotary_size
        )

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        document_ids: Tensor | None = None,
        cache: KeyValueCache | None = None,
        extent: tuple[int, int] | None = None,
    ) -> Tensor:
        """Run this stage.

        Args:
            x: tokens, int [B, S], where the stage has the embedding; else hidden [B, S, D].
            positions: position of each token inside its document, int [B, S].
            document_ids: document of each token, int [B, S], unique inside a row. None says that
                each row is one document with rising positions: no mask is then built.
            cache: keys and values of earlier tokens of these rows; takes those of the new ones.
            extent: most documents of a row and most tokens of a document, where the host knows
                them; on an accelerator it may have to wait for them otherwise.

        Returns:
            Hidden [B, S, D], after the final norm where the stage has the head.
        """
        hidden: Tensor = self.model(x, self._context(x, positions, document_ids, cache, extent))
        return hidden

    def _context(
        self,
        x: Tensor,
        positions: Tensor,
        document_ids: Tensor | None,
        cache: KeyValueCache | None,
        extent: tuple[int, int] | None,
    ) -> BlockContext:
        """Compute angles and visibility once for all layers."""
        frequencies = self._frequencies.to(positions.device, non_blocking=True)
        dtype = x.dtype if x.is_floating_point() else next(self.parameters()).dtype
        rotation = Rotation.at(positions, frequencies, self._rope_factor, dtype)
        window, softcap = self.config.sliding_window, self.config.attn_logit_softcapping
        if cache is None:
            spec = AttentionSpec.within(positions, document_ids, window, softcap, extent)
        else:
            documents = torch.zeros_like(positions) if document_ids is None else document_ids
            spec = cache.begin(positions, documents, window, softcap)
        return BlockContext(rotation, spec, cache)

    @property
    def head(self) -> Linear | TiedHead:
        """The module from hidden to logits, with ``weight`` [V, D] and ``partition``, for the loss.

        Raises:
            LayoutError: this stage has no head.
        """
        if self.lm_head is not None:
            return self.lm_head
        if self.model.norm is None or self.model.embed_tokens is None:
            raise LayoutError("this stage has no output head; only the last stage has")
        return TiedHead(self.model.embed_tokens)

    def logits(self, hidden_BSD: Tensor) -> Tensor:
        """Return logits [B, S, V] of what the last stage's forward gave; of the rows here alone."""
        logits: Tensor = self.head(hidden_BSD)
        return logits


def _check_layers(config: ModelConfig, layers: range) -> None:
    whole = range(config.num_hidden_layers)
    if layers.step != 1 or (len(layers) and (layers[0] not in whole or layers[-1] not in whole)):
        raise LayoutError(
            f"layers {layers.start}..{layers.stop - 1} do not lie in a model of "
            f"{len(whole)} layers; use a range inside 0..{len(whole) - 1}"
        )
