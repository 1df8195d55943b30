"""Names for stretches of a step, which a profiler records and nothing else sees.

Invariant: where no profiler is on, a scope does nothing and asks torch one question.

    with scope(BACKWARD):
        loss.backward()
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.autograd.profiler import record_function

DATA = "llmtrain::data"
FORWARD = "llmtrain::forward"
LOSS = "llmtrain::loss"
BACKWARD = "llmtrain::backward"
OPTIMIZER = "llmtrain::optimizer"
COMMUNICATION = "llmtrain::communication"

_NOTHING = nullcontext()


def scope(name: str) -> AbstractContextManager[object]:
    """Name what happens inside, for a profiler."""
    on = torch._C._autograd._profiler_enabled()
    return record_function(name) if on else _NOTHING
