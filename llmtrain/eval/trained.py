"""A trained model read back from its run folder, whatever layout trained it.

Invariant: the architecture, the precision and the tokenizer are those of the run's own
``config.yaml``; the weights are those of one checkpoint whose checksums hold.

    trained = load_run("runs/demo")                     # in one process
    trained.model, trained.step
    with opened_run("runs/demo", None, tp=2) as trained:  # on every rank of two
        ...
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmtrain.checkpoint.restore import load_model_weights
from llmtrain.checkpoint.start import ORIGIN, check_weights
from llmtrain.checkpoint.stored_run import StoredRun, find_run
from llmtrain.checkpoint.weights import StoredWeights
from llmtrain.config.engine import EngineConfig
from llmtrain.config.parallel import ParallelConfig
from llmtrain.config.run import RunConfig
from llmtrain.errors import CheckpointError, ConfigError, LayoutError
from llmtrain.model.transformer import Transformer
from llmtrain.ops.attention.choose import needs_of, select_attention
from llmtrain.ops.kernels import select_kernels
from llmtrain.parallel.inference import SpreadTransformer
from llmtrain.parallel.mesh import World
from llmtrain.parallel.place import Place
from llmtrain.run.directory import RunDirectory
from llmtrain.tokenizer.prompts import PromptEncoder
from llmtrain.tokenizer.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
"""Type of the weights by ``engine.precision``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedRun:
    """A run and its model, ready for inference."""

    directory: RunDirectory
    """The run folder."""
    config: RunConfig
    """What the run was trained with."""
    model: Transformer
    """The model in the run's precision; it gives whole logits, also where ranks share it."""
    device: torch.device
    """Where the model is."""
    step: int
    """Optimizer step of the checkpoint."""
    origin: dict[str, Any]
    """What an import kept of the Hugging Face folder the weights come from; empty of others."""
    rank: int = 0
    """Which of the ranks that share the model this is; rank 0 writes."""

    @property
    def num_ids(self) -> int:
        """Rows of the vocabulary that are no padding."""
        padded = self.origin.get("padded_to") == self.config.model.vocab_size
        return int(self.origin["vocab_size"]) if padded else self.config.model.vocab_size

    def tokenizer(self) -> Tokenizer:
        """Load the tokenizer the run names.

        Raises:
            ConfigError: the run names none.
        """
        return self.prompts().tokenizer

    def prompts(self) -> PromptEncoder:
        """Load the tokenizer the run names, for prompts.

        Raises:
            ConfigError: the run names none.
        """
        if self.config.tokenizer.path is None:
            raise ConfigError(
                f"{self.directory.config_yaml} has tokenizer.path=null, text needs a tokenizer; "
                "set tokenizer.path there to the folder the stores were made with"
            )
        return PromptEncoder(self.config.tokenizer.path)


def load_run(run: str, step: int | None = None) -> TrainedRun:
    """Load the newest good checkpoint of a run folder, or that of ``step``.

    Raises:
        CheckpointError: there is no run, no such checkpoint, or it is of another model.
    """
    found = find_run(run, step)
    config, at = found.config, found.checkpoint
    logger.info("%s at step %d of %d", run, at.step, config.training.num_steps)
    device = _device(config.engine.device)
    model = _model(config, at.path, device)
    return _trained(found, model, device, rank=0)


@contextmanager
def opened_run(
    run: str, step: int | None, tp: int, place: Place | None = None
) -> Iterator[TrainedRun]:
    """Load a run on ``tp`` ranks that share its matrices, or on one; each calls this.

    ``place`` defaults to what the environment says.

    Raises:
        CheckpointError: there is no run, no such checkpoint, or it is of another model.
        LayoutError: the ranks are not as many as were started, or do not divide the heads.
    """
    place = place or Place.from_environment()
    if tp != place.world_size:
        raise LayoutError(
            f"parallel.tp={tp} takes as many processes, started were {place.world_size}; use "
            f"parallel.tp={place.world_size}, or torchrun --nproc-per-node {tp} -m llmtrain ..."
        )
    if tp == 1:
        yield load_run(run, step)
        return
    found = find_run(run, step)
    engine = EngineConfig(
        device=found.config.engine.device, precision=found.config.engine.precision
    )
    with World(ParallelConfig(tp=tp, dp_shard=1), engine, place) as world:
        group = world.group("tp")
        if group is None:
            raise TypeError("a world of several tensor-parallel ranks has a group of them")
        config, path = found.config, found.checkpoint.path
        needs = needs_of(config.model, config.engine, training=False)
        attention = select_attention(config.engine.attention, world.device, needs)
        kernels = select_kernels(config.engine.kernels, world.device)
        stored = StoredWeights(path)
        check_weights(path, stored.shapes, config.model)
        with torch.device("meta"):
            model = SpreadTransformer(config.model, group, attention, kernels)
        model.load(stored, world.device, DTYPES[config.engine.precision])
        logger.info("%s at step %d on %d ranks", run, found.checkpoint.step, tp)
        yield _trained(found, model.eval(), world.device, world.rank)


def _trained(found: StoredRun, model: Transformer, device: torch.device, rank: int) -> TrainedRun:
    return TrainedRun(
        directory=found.directory, config=found.config, model=model, device=device,
        step=found.checkpoint.step, rank=rank,
        origin=found.checkpoint.meta.get("carried", {}).get(ORIGIN, {}),
    )  # fmt: skip


def _model(config: RunConfig, checkpoint: Path, device: torch.device) -> Transformer:
    """Build without memory, then take the checkpoint's tensors as they are."""
    needs = needs_of(config.model, config.engine, training=False)
    attention = select_attention(config.engine.attention, device, needs)
    kernels = select_kernels(config.engine.kernels, device)
    with torch.device("meta"):
        model = Transformer(config.model, attention=attention, kernels=kernels)
    try:
        model.load_state_dict(load_model_weights(checkpoint), assign=True)
    except RuntimeError as error:
        raise CheckpointError(
            f"{checkpoint} does not hold the model of its config.yaml: "
            f"{' '.join(str(error).split())}; put model.* of config.yaml back"
        ) from error
    return (
        model.to(device=device, dtype=DTYPES[config.engine.precision]).eval().requires_grad_(False)
    )


def _device(name: str) -> torch.device:
    if name != "cpu" and torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("cpu")
