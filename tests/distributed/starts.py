"""What ranks do in the tests of starting from a checkpoint."""

from pathlib import Path

from llmtrain.checkpoint.checkpoints import Checkpoints
from llmtrain.checkpoint.start import start_from
from llmtrain.config.run import RunConfig
from llmtrain.config.training import CheckpointConfig
from llmtrain.parallel.place import Place
from llmtrain.run.progress import Progress
from tests.distributed.rig import loss_of, rig


def start_and_save(
    place: Place, config: RunConfig, where: str, folder: str
) -> tuple[float, dict[str, object]]:
    """Start from ``where``, save as it is; returns the first loss and what ``where`` carries."""
    with rig(place, config) as r:
        carried = start_from(where, r.engine, config.model)
        loss = loss_of(r.engine.eval_step(r.batch(0)))
        checkpoints = Checkpoints(Path(folder), CheckpointConfig(), r.engine, facts={})
        progress = Progress(num_steps=10, steps=config.training.steps, step=1)
        assert checkpoints.save(progress)
        assert checkpoints.wait()
        checkpoints.close()
        return loss, dict(carried)
