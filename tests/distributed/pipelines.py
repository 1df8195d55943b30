"""Bodies that ranks run in the tests of DeepSpeed's pipeline."""

from dataclasses import replace

import torch
from torch import Tensor

from llmtrain.config.deepspeed import PASSED, REFUSED, SECTIONS, SET_HERE
from llmtrain.config.run import RunConfig
from llmtrain.parallel.place import Place
from tests.distributed.rig import loss_of, rig


def short_run(place: Place, config: RunConfig) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of five steps and the gradients of the first, the latter from rank 0 alone."""
    with rig(place, config) as r:
        losses = r.train(range(1))
        gradients = r.engine.gradients()
        return losses + r.train(range(1, 5)), gradients if place.rank == 0 else {}


def changing_shapes(place: Place, config: RunConfig) -> list[float]:
    """Losses of steps and evaluations that take turns with other sizes of micro-batch and row."""
    with rig(place, config) as r:
        losses = [loss_of(r.step(0))]
        wide = replace(r.batch(0), num_microbatches=2)
        losses.append(loss_of(r.engine.eval_step(wide)))
        losses.append(loss_of(r.step(1)))
        cut = {
            name: getattr(wide, name)[:, :8]
            for name in ("tokens", "targets", "positions", "document_ids", "loss_weight")
        }
        losses.append(loss_of(r.engine.eval_step(replace(wide, num_microbatches=4, **cut))))
        losses += r.train(range(2, 4))
        return losses


def unclassified_keys(place: Place) -> list[str]:
    """Keys that the installed DeepSpeed looks up and for which llmtrain has no rule."""
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    looked_up: set[str] = set()

    class Recorder(dict[str, object]):
        def get(self, key: str, default: object = None) -> object:  # type: ignore[override]
            looked_up.add(key)
            return super().get(key, default)

        def __getitem__(self, key: str) -> object:
            looked_up.add(key)
            return super().__getitem__(key)

        def __contains__(self, key: object) -> bool:
            looked_up.add(str(key))
            return super().__contains__(key)

        def __copy__(self) -> "Recorder":
            return Recorder(self)

    DeepSpeedConfig(Recorder(train_batch_size=place.world_size))
    zero = {f"zero_optimization.{name}" for name in DeepSpeedZeroConfig.model_fields}
    return sorted((looked_up | zero) - {*PASSED, *SECTIONS, *SET_HERE, *REFUSED})


def stage_parameters(place: Place, config: RunConfig) -> list[str]:
    """Names of the parameters in the hands of this rank's DeepSpeed."""
    with rig(place, config) as r:
        held = r.engine._deepspeed.module  # type: ignore[attr-defined]
        assert all(p.dtype == torch.float32 for p in held.parameters())
        return [name.partition("stage.transformer.")[2] for name, _ in held.named_parameters()]
