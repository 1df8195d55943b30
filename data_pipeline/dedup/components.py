"""Connected components by union-find: the smallest node of a component is its root.

Edges are taken a piece at a time, so memory is that of the nodes (9 bytes each) whatever the number
of edges; which node becomes the root does not depend on their order.

    forest = Forest(num_nodes)
    forest.unite(left, right)
    roots, sizes = forest.finish()
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipeline.compiled import compiled

UInt32Array = npt.NDArray[np.uint32]


@compiled
def _unite(parent: Any, left: Any, right: Any) -> None:
    """Join the trees of each pair; the smaller root stays one, paths are halved on the way."""
    for i in range(left.shape[0]):
        a, b = left[i], right[i]
        while parent[a] != a:
            parent[a] = parent[parent[a]]
            a = parent[a]
        while parent[b] != b:
            parent[b] = parent[parent[b]]
            b = parent[b]
        if a < b:
            parent[b] = a
        else:
            parent[a] = b


@compiled
def _flatten(parent: Any, size: Any) -> None:
    """Point every node at its root, which is no larger than its parent, and count members."""
    for i in range(parent.shape[0]):
        root = parent[parent[i]]
        parent[i] = root
        size[root] += 1


class Forest:
    """Trees over the nodes 0 to n - 1."""

    def __init__(self, nodes: int) -> None:
        """Every node is a tree of its own; at most 2**32 - 1 nodes."""
        self._parent: UInt32Array = np.arange(nodes, dtype=np.uint32)

    def unite(self, left: UInt32Array, right: UInt32Array) -> None:
        """Join the trees of left[i] and right[i], uint32 [E] each."""
        _unite(self._parent, np.ascontiguousarray(left), np.ascontiguousarray(right))

    def finish(self) -> tuple[UInt32Array, UInt32Array]:
        """Return (root of every node, members of the component at its root and 0 elsewhere)."""
        size = np.zeros(len(self._parent), np.uint32)
        _flatten(self._parent, size)
        return self._parent, size
