"""Master weights for modules that compute in bf16 without FSDP2.

Invariant: the optimizer, checkpoints and gradients see fp32 only; bf16 copies are what forward and
backward read. A micro-batch's bf16 gradient is added to the fp32 one as soon as it exists, which is
what FSDP2 does with its mixed-precision policy, so layouts agree.

    masters = MasterWeights(list(module.parameters()))
    module(x).sum().backward()     # gradients land in masters.parameters
    masters.publish()              # after the update
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

COMPUTE_DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}
"""Type of products and hidden states by ``engine.precision``."""


class MasterWeights:
    """The fp32 parameters behind modules, whose own parameters are turned to bf16."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        """Keep the values of ``parameters`` in fp32 and cast them to bf16 in place."""
        self.parameters: list[nn.Parameter] = []
        self._copies: list[Tensor] = []
        for parameter in parameters:
            master = nn.Parameter(parameter.detach().clone())
            self.parameters.append(master)
            parameter.data = parameter.data.to(torch.bfloat16)
            self._copies.append(parameter.data)
            _send_gradients(parameter, master)

    def publish(self) -> None:
        """Cast the masters into the modules' parameters."""
        with torch.no_grad():
            torch._foreach_copy_(self._copies, list(self.parameters))


def _send_gradients(parameter: nn.Parameter, master: nn.Parameter) -> None:
    def accumulate(computed: Tensor) -> None:
        if computed.grad is None:
            return
        if master.grad is None:
            master.grad = computed.grad.float()
        else:
            master.grad.add_(computed.grad)
        computed.grad = None

    parameter.register_post_accumulate_grad_hook(accumulate)  # type: ignore[no-untyped-call]
