"""Blocks and the head, run forward and backward twice: equal inputs must give equal gradients.

Inside ``watching`` a block that runs forward runs twice instead, each time with a backward to its
input and its trained parameters, there and then: wrappers that gather parameters around a forward
(FSDP2, ZeRO 3) have gathered them. The gradient of its output is its input, a tensor of that shape
without random numbers. So do the head and the loss. The gradients of the first run are summed over
the data-parallel ranks, twice.

Invariant: nothing is left behind. Gradients are returned, not accumulated: no ``grad`` changes, and
no hook that sums gradients or updates parameters runs.

    twice = Twice(world, engine.stages(), exact=True)
    with twice.watching():
        engine.eval_step(batch)
    twice.found()       # [(17, "layer 3's gradient of mlp.up_proj.weight")]
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llmtrain.data.batch import StepBatch
from llmtrain.engine.protocol import LossFunction
from llmtrain.model.layers import Block
from llmtrain.parallel.mesh import World
from llmtrain.parallel.region import local_part
from llmtrain.parallel.stage import StageModule
from llmtrain.train.loss import head_matrix

_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

_ROUNDINGS = 128
"""Of a sum of 16,384 terms in another order: they go astray as the square root of their number."""

Found = tuple[int, str]
"""Number of a comparison, counted alike on ranks that run the same blocks, and what differed."""


class Twice:
    """Comparisons of what the blocks and the head of this rank compute."""

    def __init__(self, world: World, stages: Sequence[nn.Module], *, exact: bool) -> None:
        """``exact``: gradients agree in every bit; else as ``alike`` says."""
        self._world = world
        self._modules = [module for stage in stages for module in stage.modules()]
        self._exact = exact
        self._compared: list[tuple[str, Tensor]] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Have blocks and losses run twice; each returns what its first run gave."""
        with ExitStack() as stack:
            for module in self._modules:
                if isinstance(module, Block):
                    run: Any = functools.partial(self._block, module, module.forward)
                    stack.enter_context(_replaced(module, "forward", run))
                elif isinstance(module, StageModule) and module.loss is not None:
                    run = functools.partial(self._loss, module.loss)
                    stack.enter_context(_replaced(module, "loss", run))
            yield

    def found(self) -> list[Found]:
        """What differed, in the order it was computed in; waits for the device."""
        if not self._compared:
            return []
        names, flags = zip(*self._compared, strict=True)
        differ: list[bool] = torch.stack(flags).tolist()
        return [(number, names[number]) for number, wrong in enumerate(differ) if wrong]

    def _block(
        self, block: Block, forward: Callable[..., Tensor], given: Tensor, context: Any
    ) -> Tensor:
        x = given.detach().requires_grad_()
        wanted = {"its input": x, **_trained(block)}

        def run() -> tuple[Tensor, dict[str, Tensor]]:
            out = forward(x, context)
            return out.detach(), _gradients(out, wanted, given.detach().to(out.dtype))

        with torch.enable_grad():
            (out, gradients), (again, others) = run(), run()
        self._compare(f"layer {block.self_attn.layer}", out, again, gradients, others)
        return out

    def _loss(
        self, loss: LossFunction, hidden: Tensor, head: nn.Module, batch: StepBatch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        x = hidden.detach().requires_grad_()
        weight, _ = head_matrix(head)
        wanted = {"its input": x} | ({"its matrix": weight} if weight.requires_grad else {})

        def run() -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
            loss_sum, metrics = loss(x, head, batch)
            ones = torch.ones_like(loss_sum)
            return loss_sum.detach(), metrics, _gradients(loss_sum, wanted, ones)

        with torch.enable_grad():
            (loss_sum, metrics, gradients), (again, _, others) = run(), run()
        self._compare("the head", loss_sum, again, gradients, others)
        return loss_sum, {name: value.detach() for name, value in metrics.items()}

    def _compare(
        self,
        where: str,
        out: Tensor,
        again: Tensor,
        gradients: Mapping[str, Tensor],
        others: Mapping[str, Tensor],
    ) -> None:
        """Note whether two runs agree, the backward's results in the order it makes them in."""
        self._compared.append((f"{where}'s output", ~same_bits(out, again)))
        for name, gradient in reversed(tuple(gradients.items())):
            sound = self._same(gradient, others[name])
            self._compared.append((f"{where}'s gradient of {name}", ~sound))
        local = [gradient for name, gradient in gradients.items() if name not in _NOT_SUMMED]
        if local and self._world.dp_size > 1:
            sound = self._same(self._sum(local), self._sum(local))
            self._compared.append((f"{where}'s sum of gradients over ranks", ~sound))

    def _same(self, first: Tensor, second: Tensor) -> Tensor:
        return same_bits(first, second) if self._exact else alike(first, second)

    def _sum(self, gradients: Sequence[Tensor]) -> Tensor:
        return self._world.sum(torch.cat([one.flatten() for one in gradients]), "dp")


_NOT_SUMMED = ("its input",)


def bits(values: Tensor) -> Tensor:
    """View the bits of ``values`` as whole numbers, flat; of a sharded tensor those held here."""
    plain = local_part(values.detach()).contiguous().flatten()
    return plain.view(_WORDS[plain.dtype.itemsize])


def same_bits(first: Tensor, second: Tensor) -> Tensor:
    """Tell on the device whether two tensors have the same bits; bool scalar."""
    return (bits(first) == bits(second)).all()


def alike(first: Tensor, second: Tensor) -> Tensor:
    """Tell on the device whether two results of one sum may differ by its order of adding alone.

    The norm of what differs is at most one rounding of the type they have, or _ROUNDINGS of the
    type they are summed in (fp32 for bf16), of every element. Two without a finite norm pass. Bool
    scalar.
    """
    summed_in = torch.promote_types(first.dtype, torch.float32)
    share = max(torch.finfo(first.dtype).eps, _ROUNDINGS * torch.finfo(summed_in).eps)
    norm, other = (one.detach().norm(dtype=torch.float64) for one in (first, second))
    apart = (first.detach() - second.detach()).norm(dtype=torch.float64)
    within: Tensor = apart <= share * norm
    return within | ~(torch.isfinite(norm) | torch.isfinite(other))


def _trained(block: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in block.named_parameters() if p.requires_grad}


def _gradients(out: Tensor, wanted: Mapping[str, Tensor], given: Tensor) -> dict[str, Tensor]:
    """Gradients of ``wanted`` by name, given that of ``out``; without those that are not used."""
    found = torch.autograd.grad(out, list(wanted.values()), given, allow_unused=True)
    named = zip(wanted, found, strict=True)
    return {name: local_part(gradient) for name, gradient in named if gradient is not None}


@contextmanager
def _replaced(module: nn.Module, name: str, function: Any) -> Iterator[None]:
    """Give ``module`` another attribute; what it had, of its own or its class, comes back."""
    own = vars(module).get(name)
    setattr(module, name, function)
    try:
        yield
    finally:
        if own is None:
            delattr(module, name)
        else:
            setattr(module, name, own)
