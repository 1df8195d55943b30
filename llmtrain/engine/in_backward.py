"""Updates inside the backward: a gradient is used and freed as soon as it is there.

Invariant: the numbers are those of an update after the backward without clipping, bit by bit, and
never do all gradients live at once. No sum over all gradients exists before the first update, so
each parameter is gated alone: one whose gradient's norm is not finite keeps its value and its
moments, of a sharded one each shard. All count updates alike, so that one count in a checkpoint is
the state of all: a step counts where some parameter's gradient is finite as a whole, and what the
others were refused counts with it. Several micro-batches, and sums over ranks that FSDP2 does not
make itself, are refused (config/memory_limits.py).

    updates = InBackward(local, optimizer_factory(config.optimizer), matrix_map(owned, world))
    updates.begin(lr=3e-4)
    local.run(batch, scale, training=True)
    squares = world.sum(updates.squares)    # each rank has those of its parts
    updates.count(squares)
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from llmtrain.engine.protocol import OptimizerFactory
from llmtrain.engine.state import STEP, gated_step, require_gate
from llmtrain.engine.step import set_learning_rate
from llmtrain.parallel.local import LocalModel, OwnedParameter
from llmtrain.parallel.matrices import MatrixMap
from llmtrain.parallel.scopes import OPTIMIZER, scope


class InBackward:
    """Optimizers of one parameter each, run by hooks of the backward."""

    def __init__(self, local: LocalModel, factory: OptimizerFactory, matrix_map: MatrixMap) -> None:
        """Hook every parameter of ``local`` and make its state."""
        each = [factory([(o.info, o.local)], matrix_map, [o.region]) for o in local.parameters]
        self.optimizer = Together(each)
        """Their groups and states, for checkpoints."""
        self.squares = torch.zeros(len(local.table), dtype=torch.float64, device=local.world.device)
        """Squared norms by row of the table, of the parts this rank counts."""
        skipped = torch.ones((), device=local.world.device)
        for owned, source, one in zip(local.parameters, local.sources, each, strict=True):
            require_gate(one)
            owned.local.grad = owned.zero_gradient()
            gated_step(one, skip=skipped, divisor=None)  # makes the state
            owned.local.grad = None
            hook = functools.partial(self._update, owned, one)
            source.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
        self._counts = [self.optimizer.state[owned.local][STEP] for owned in local.parameters]
        self._before = self._counts[0].clone()

    def begin(self, lr: float) -> None:
        """Set the learning rate of the backward that follows."""
        set_learning_rate(self.optimizer, lr)
        self.squares.zero_()
        self._before.copy_(self._counts[0])

    def count(self, squares: Tensor) -> None:
        """Give all parameters one count of updates, given ``squares`` summed over the ranks."""
        after = self._before + torch.isfinite(squares).any()
        torch._foreach_copy_(self._counts, [after] * len(self._counts))

    def _update(self, owned: OwnedParameter, one: torch.optim.Optimizer, source: Tensor) -> None:
        gradient = owned.local_gradient()
        with scope(OPTIMIZER):
            (norm,) = torch._foreach_norm([gradient])
            if owned.counted:
                self.squares[owned.index] += norm.to(self.squares).square()
            owned.local.grad = gradient
            gated_step(one, skip=(~torch.isfinite(norm)).float(), divisor=None)
        for holder in (source, owned.tensor, owned.local):
            holder.grad = None


class Together(torch.optim.Optimizer):
    """Several optimizers' groups, in order, and one state; the parts are stepped, not this."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        """Take over the groups and the (empty) states of ``parts``."""
        super().__init__([group for part in parts for group in part.param_groups], {})
        for part in parts:
            part.state = self.state
