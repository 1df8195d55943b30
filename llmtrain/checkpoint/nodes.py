"""The machines of a run: which ranks share one, and which machine keeps whose copies.

Invariant: every rank comes to the same list. A machine is its host name, so it is the same one
after a restart that numbers the ranks otherwise.

    nodes = Nodes.meet(socket.gethostname())       # every rank calls it
    nodes.is_leader, nodes.keeper
"""

from dataclasses import dataclass

from llmtrain.checkpoint.objects import gather, rank


@dataclass(frozen=True, slots=True)
class Nodes:
    """The nodes in the order of their first ranks."""

    names: tuple[str, ...]
    """Host names."""
    ranks: tuple[tuple[int, ...], ...]
    """Ranks of each."""
    here: int
    """Number of the node of this rank."""

    @classmethod
    def meet(cls, name: str) -> "Nodes":
        """Gather the names; every rank calls it with that of its machine."""
        hosts = gather(name)
        names = tuple(dict.fromkeys(hosts))
        ranks = tuple(tuple(r for r, host in enumerate(hosts) if host == one) for one in names)
        return cls(names, ranks, names.index(name))

    @property
    def count(self) -> int:
        """Number of nodes."""
        return len(self.names)

    @property
    def mine(self) -> tuple[int, ...]:
        """Ranks of this node."""
        return self.ranks[self.here]

    @property
    def is_leader(self) -> bool:
        """Whether this is the first rank of its node."""
        return rank() == self.mine[0]

    @property
    def keeper(self) -> int:
        """The node that keeps a copy of what this one holds; itself where it is alone."""
        return (self.here + 1) % self.count

    @property
    def kept(self) -> int:
        """The node whose copy this one keeps; itself where it is alone."""
        return (self.here - 1) % self.count
