"""Fill-in-the-middle: some documents of a row are put in the order prefix, suffix, middle.

"Efficient training of language models to fill in the middle" (arXiv:2207.14255), on tokens: a
document is cut at two places, and three tokens tell which part comes next. A row keeps its length:
the last three tokens of the part give way, all but an EOS. Which documents, and where they are cut,
is a hash of (seed, source, epoch, first token), so it does not depend on who reads them.

    fim = FillInMiddle(config.data.fim, seed=1, source_names=("code", "wiki"))
    assemble_windows(orders, sources, windows, ..., fim=fim, epochs=epochs)
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from llmtrain.config.data import FimConfig
from llmtrain.data.indexed import Int64Array
from llmtrain.data.permutation import UInt64Array, derive_key, keyed_hash

NUM_SENTINELS = 3
"""Tokens that mark the parts."""
MIN_TOKENS = 8
"""Shorter documents, or parts of them in a row, stay as they are."""


class Stretches(NamedTuple):
    """Inputs in a row that are one document or a part of it; arrays of one length."""

    place: Int64Array
    """First input, over all rows."""
    length: Int64Array
    """Inputs."""
    start: Int64Array
    """Token of the store at the first input."""


class FillInMiddle:
    """Rearranges a share of the documents."""

    def __init__(self, config: FimConfig, *, seed: int, source_names: tuple[str, ...]) -> None:
        """Decide by ``seed`` and the names of the sources."""
        self.config = config
        self._seed = seed
        self._source_names = source_names

    def apply(
        self,
        documents: Stretches,
        sources: npt.NDArray[np.int32],
        epochs: Int64Array,
        ends_document: npt.NDArray[np.bool_],
        tokens: Int64Array,
        targets: Int64Array,
    ) -> Int64Array:
        """Rearrange the chosen documents in place; returns the inputs that have no target now.

        ``sources``, ``epochs`` and ``ends_document``, whether the last input is the document's, are
        of each of ``documents``. The last input of a part whose document goes on loses its target:
        what followed it no longer does.
        """
        chosen, spm, cuts = self._decide(documents, sources, epochs)
        last_inputs = documents.place + documents.length - 1
        for i in np.flatnonzero(chosen).tolist():
            first, last = int(documents.place[i]), int(last_inputs[i])
            text = tokens[first : last if ends_document[i] else last + 1]  # EOS stays the last
            kept = len(text) - NUM_SENTINELS
            low, high = sorted(int(cut) % (kept + 1) for cut in cuts[i])
            text[:] = self._rearranged(text[:kept].copy(), low, high, bool(spm[i]))
            targets[first:last] = tokens[first + 1 : last + 1]
        return last_inputs[chosen]

    def _decide(
        self, documents: Stretches, sources: npt.NDArray[np.int32], epochs: Int64Array
    ) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_], UInt64Array]:
        """Return whether each is chosen, whether its suffix comes first, and two hashes to cut."""
        hashes = np.zeros((len(sources), 4), dtype=np.uint64)
        for source, epoch in sorted(set(zip(sources.tolist(), epochs.tolist(), strict=True))):
            own = np.flatnonzero((sources == source) & (epochs == epoch))
            key = derive_key("fill in the middle", self._seed, self._source_names[source], epoch)
            for i, word in enumerate(np.frombuffer(key, dtype="<u8").astype(np.uint64)):
                hashes[own, i] = keyed_hash(documents.start[own].astype(np.uint64), word)
        shares = hashes[:, :2] / 2.0**64
        chosen = (shares[:, 0] < self.config.rate) & (documents.length >= MIN_TOKENS)
        return chosen, shares[:, 1] < self.config.spm_rate, hashes[:, 2:]

    def _rearranged(self, text: Int64Array, low: int, high: int, spm: bool) -> Int64Array:
        """Return ``text`` with its middle [low, high) last, and the tokens that mark the parts."""
        prefix, middle, suffix = np.split(text, [low, high])
        before, between, after = (
            np.array([token])
            for token in (self.config.prefix_id, self.config.suffix_id, self.config.middle_id)
        )
        if spm:  # the variant that shares its form with the other: PRE SUF suffix MID prefix middle
            return np.concatenate([before, between, suffix, after, prefix, middle])
        return np.concatenate([before, prefix, between, suffix, after, middle])
