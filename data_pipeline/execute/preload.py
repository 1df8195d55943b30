"""What local workers share: imported once by the fork server, before the workers are forked.

Pages of a process that were there before the fork count once, however many workers there are, as
long as nobody writes to them. pyarrow and numba load most of what they need only when they are
first used, so both are used here once; without it every worker had 60 MB more of its own. pandas,
which pyarrow would load to recognise data frames, stays out: no task has any, and it takes 27 MB.

    multiprocessing.get_context("forkserver").set_forkserver_preload(["data_pipeline.execute.preload"])
"""

import gc
import sys

import pyarrow as pa

import data_pipeline.pipeline
from data_pipeline.compiled import compiled


@compiled
def _double(x: int) -> int:
    return 2 * x


class _WithoutPandas:
    """Makes pandas look absent: pyarrow asks once, when it makes its first array."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "pandas":
            raise ModuleNotFoundError(name)


def warm_up() -> None:
    """Make pyarrow and numba load what they load on first use; freeze what is there."""
    finder = _WithoutPandas()
    sys.meta_path.insert(0, finder)
    pa.array([0])
    sys.meta_path.remove(finder)
    _double(1)
    gc.collect()
    gc.freeze()  # a collection in a worker would write to every object it visits


SHARED = (data_pipeline.pipeline, pa)
"""Modules held for the workers."""
warm_up()
