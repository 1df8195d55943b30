"""What ranks do in the tests of tasks during training."""

import torch

from llmtrain.config.run import RunConfig
from llmtrain.eval.in_training import model_of
from llmtrain.parallel.place import Place
from tests.distributed.inferences import PROMPTS
from tests.distributed.rig import rig


def logits_on_the_way(place: Place, config: RunConfig) -> tuple[list[list[float]], list[float]]:
    """Logits after two steps, and the losses of four of which the third follows them."""
    with rig(place, config) as r:
        losses = r.train(range(2))
        model = model_of(r.engine, config, r.world)
        found = []
        for prompt in PROMPTS:
            tokens = torch.tensor([prompt], device=r.world.device)
            positions = torch.arange(len(prompt), device=r.world.device)[None]
            found.append(model.logits(model(tokens, positions))[0, -1].float().tolist())
        return found, losses + r.train(range(2, 4))
