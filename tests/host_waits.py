"""Finds where the host would wait for a GPU, on any machine: all tensors count as the device's.

Values read, sizes that depend on values, and device tensors made from host data are seen wherever
they are asked for in this thread, the backward included. Tensors made from host data without naming
a device are the host's own.

    with NoHostWait():
        engine.train_step(batch, lr, limits)      # AssertionError where the host would wait
"""

from contextlib import ExitStack
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from llmtrain.data.batch import StepBatch

aten = torch.ops.aten

READS = ("_local_scalar_dense", "equal", "is_nonzero", "item")
"""Operations that give the host a value."""
SIZES = (
    "nonzero", "nonzero_numpy", "masked_select", "unique_dim", "unique_consecutive",
    "unique_dim_consecutive", "_unique", "_unique2", "bincount", "histc", "repeat_interleave",
)  # fmt: skip
"""Operations whose result has a size that depends on values."""
FROM_HOST = ("tensor", "as_tensor")
"""Functions that copy host data to a device, which the host waits for, where one is named."""
METHODS = ("cpu", "tolist", "numpy", "item", "__bool__", "__int__", "__float__", "__index__")
"""Methods of tensors that give the host values, also where no operation is dispatched."""


class NoHostWait:
    """Raises AssertionError where the host would wait."""

    def __enter__(self) -> Self:
        self._modes = ExitStack()
        self._modes.enter_context(_Methods())
        self._modes.enter_context(_Operations())  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: object) -> None:
        self._modes.close()


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.overloadpacket.__name__
        assert name not in (*READS, *SIZES), f"the host waits: aten.{name}"
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            masks = [i for i in args[1] if isinstance(i, Tensor) and i.dtype == torch.bool]
            assert not masks, f"the host waits: aten.{name} with a mask"
        return func(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.of_host: list[Tensor] = []

    def __torch_function__(  # type: ignore[no-untyped-def]
        self, func, types, args=(), kwargs: dict[str, Any] | None = None
    ):
        name = getattr(func, "__name__", "")
        if name in METHODS:
            mine = _storage(args[0]) in map(_storage, self.of_host)
            assert mine, f"the host waits: Tensor.{name}"
        made = func(*args, **(kwargs or {}))
        if name in FROM_HOST:
            assert (kwargs or {}).get("device") is None, f"the host waits: torch.{name} on a device"
            self.of_host.append(made)
        return made


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def as_copied(batch: StepBatch) -> StepBatch:
    """``batch`` as its copy to a device is: with what the host learnt of it on the way."""
    return replace(
        batch, extent=(int(batch.document_ids.max()) + 1, int(batch.positions.max()) + 1)
    )
