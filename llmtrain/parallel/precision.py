"""Master weights for modules that compute in bf16 without FSDP2.

Invariant: the optimizer, checkpoints and gradients see fp32 only; bf16 copies are what forward and
backward read. A micro-batch's bf16 gradient is added to the fp32 one as soon as it exists, which is
what FSDP2 does with its mixed-precision policy, so layouts agree.

    masters = MasterWeights(module)
    module(x).sum().backward()     # gradients land in masters.parameters
    masters.publish()              # after the update
"""

import torch
from torch import Tensor, nn


class MasterWeights:
    """The fp32 parameters behind a module, which is turned to bf16."""

    def __init__(self, module: nn.Module) -> None:
        """Keep the module's values in fp32 and cast its parameters to bf16 in place."""
        self.parameters: dict[str, nn.Parameter] = {}
        self._copies: list[Tensor] = []
        for name, parameter in module.named_parameters():
            master = nn.Parameter(parameter.detach().clone())
            self.parameters[name] = master
            parameter.data = parameter.data.to(torch.bfloat16)
            self._copies.append(parameter.data)
            _send_gradients(parameter, master)

    def publish(self) -> None:
        """Cast the masters into the module's parameters."""
        with torch.no_grad():
            torch._foreach_copy_(self._copies, list(self.parameters.values()))


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
