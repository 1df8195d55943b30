"""The text a tokenizer is trained on: a sample spread over the whole input, in a fixed order.

``spread_sample`` keeps the documents whose ids hash lowest, so that the sample depends on which
documents there are and not on how they are ordered or cut into files, and reads the input once.

    texts = spread_sample(((document.id, document.text) for document in documents), 200_000_000)
"""

import heapq
from collections.abc import Iterable, Iterator

import blake3

from llmtrain.errors import DataError


class Sample:
    """The first ``max_bytes`` of some texts, and how much they were."""

    def __init__(self, texts: Iterable[str], max_bytes: int) -> None:
        """Nothing is read before the sample is iterated over."""
        self._texts = texts
        self._max_bytes = max_bytes
        self.num_texts = 0
        self.num_bytes = 0

    def __iter__(self) -> Iterator[str]:
        for text in self._texts:
            if self.num_bytes >= self._max_bytes:
                return
            self.num_texts += 1
            self.num_bytes += len(text.encode())
            yield text

    def counts(self) -> dict[str, int]:
        """What was read so far, for the meta file."""
        return {"texts": self.num_texts, "bytes": self.num_bytes}


def spread_sample(documents: Iterable[tuple[str, str]], max_bytes: int) -> list[str]:
    """Return the texts of the (id, text) whose ids hash lowest, until they are ``max_bytes``.

    In the order of the hashes. Holds little more than the sample in memory.
    """
    kept: list[tuple[int, str]] = []  # a heap with the largest hash first
    size = 0
    for id_, text in documents:
        key = -int.from_bytes(blake3.blake3(id_.encode()).digest(length=8), "big")
        if size >= max_bytes and key <= kept[0][0]:
            continue
        heapq.heappush(kept, (key, text))
        size += len(text.encode())
        while size - len(kept[0][1].encode()) >= max_bytes:
            size -= len(heapq.heappop(kept)[1].encode())
    return [text for _, text in sorted(kept, reverse=True)]


def no_utf8(error: Exception) -> DataError:
    """Return what a tokenizer says of a text that UTF-8 cannot hold."""
    return DataError(
        f"a text is no UTF-8, it may hold a lone surrogate ({error}); decode the source "
        "with errors='replace'"
    )
