"""Counts how a finished store packs into windows, and writes that beside it.

Blocks are packed alone, so tasks take runs of them and the counts do not depend on how many tasks
or workers there are. Only the index is read.

    pack_with(PackConfig(store="stores/mine", sequence_length=4096), InlineExecutor())
"""

from typing import Any

from data_pipeline.config.commands import PackConfig
from data_pipeline.execute.local import Executor, Task
from llmtrain.data.pack_blocks import (
    BlockCounts,
    PackBlocks,
    count_blocks,
    packing_of,
    write_packing,
)
from llmtrain.data.store import TokenStore

TASK_BLOCKS = 1_000
"""Blocks of one task, about ten seconds of work."""


def pack_with(config: PackConfig, executor: Executor) -> dict[str, Any]:
    """Pack the store of ``config`` and return what is told of it.

    Raises:
        DataError: the store does not open, or is not on this machine.
    """
    store = TokenStore.open(config.store)
    num_blocks = PackBlocks(store, config.sequence_length).num_blocks
    tasks = []
    for first in range(0, num_blocks, TASK_BLOCKS):
        end = min(first + TASK_BLOCKS, num_blocks)
        arguments = {"path": config.store, "window_tokens": config.sequence_length}
        tasks.append(Task(f"{first:08d}", count_task, {**arguments, "first": first, "end": end}))
    counts: dict[str, BlockCounts] = {}
    executor.run(tasks, lambda task, result: counts.update({task.key: result}))
    packing = packing_of(store, config.sequence_length, [counts[key] for key in sorted(counts)])
    path = write_packing(store, packing)
    documents = packing.num_documents
    return {
        "packing": str(path),
        "blocks": num_blocks,
        "windows": packing.num_windows,
        "padding": round(packing.padding, 6),
        "cut_documents": packing.cut_documents,
        "cut_documents_share": round(packing.cut_documents / documents, 6),
        "cut_documents_share_concat": round(packing.cut_documents_concat / documents, 6),
    }


def count_task(path: str, window_tokens: int, first: int, end: int) -> BlockCounts:
    """Count the windows of the blocks [first, end) of the store at ``path``."""
    return count_blocks(TokenStore.open(path, check=False), window_tokens, first, end)
