"""A trained model read back from its run folder, in one process, whatever layout trained it.

Invariant: the architecture, the precision and the tokenizer are those of the run's own
``config.yaml``; the weights are those of one checkpoint whose checksums hold.

    trained = load_run("runs/demo")
    trained.model, trained.step
"""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from llmtrain.config.run import RunConfig
from llmtrain.errors import CheckpointError, ConfigError
from llmtrain.model.transformer import Transformer
from llmtrain.ops.attention.choose import needs_of, select_attention
from llmtrain.ops.kernels import select_kernels
from llmtrain.tokenizer import tokenizer as tokenizers
from llmtrain.train.checkpoint import load_model_weights
from llmtrain.train.rundir import RunDirectory
from llmtrain.train.stored_run import find_run

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
    """The whole model on one device, in the run's precision."""
    device: torch.device
    """Where the model is."""
    step: int
    """Optimizer step of the checkpoint."""

    def tokenizer(self) -> tokenizers.Tokenizer:
        """Load the tokenizer the run names.

        Raises:
            ConfigError: the run names none.
        """
        if self.config.tokenizer.path is None:
            raise ConfigError(
                f"{self.directory.config_yaml} has tokenizer.path=null, text needs a tokenizer; "
                "set tokenizer.path there to the folder the stores were made with"
            )
        return tokenizers.load(self.config.tokenizer.path)


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
    return TrainedRun(
        directory=found.directory, config=config, model=model, device=device, step=at.step
    )


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
