"""Types of parameters and gradients where modules compute in bf16.

Invariant: gradients are fp32. A micro-batch's bf16 gradient is added to the fp32 one as soon as it
exists, which is what FSDP2 does with its mixed-precision policy, so layouts agree. Parameters are
fp32 with bf16 copies that forward and backward read, or (``engine.master_dtype=bf16``) bf16 alone,
as are those that are not trained.

    masters = MasterWeights(list(module.parameters()))
    module(x).sum().backward()     # gradients land in masters.parameters
    masters.publish()              # after the update

    keep_gradients_in_fp32(module.parameters())    # without masters
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

COMPUTE_DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}
"""Type of products and hidden states by ``engine.precision``."""


def storage_dtype(precision: str, master_dtype: str) -> torch.dtype:
    """Give the type of the parameters that the optimizer updates."""
    if precision == "bf16" and master_dtype == "bf16":
        return torch.bfloat16
    return torch.float64 if precision == "fp64" else torch.float32


def keep_gradients_in_fp32(parameters: Iterable[Tensor]) -> None:
    """Have autograd add the gradients of bf16 ``parameters`` up in fp32."""
    for parameter in parameters:
        if parameter.dtype == torch.bfloat16 and parameter.requires_grad:
            parameter.grad_dtype = torch.float32


def keep_frozen_as_computed(parameters: Iterable[nn.Parameter], dtype: torch.dtype) -> None:
    """Give those of ``parameters`` that are not trained the type that forward reads them in."""
    for parameter in parameters:
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


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
