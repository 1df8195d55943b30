"""datatrove's MinHash keys and shingles of given documents, for comparison pair by pair.

Reads JSON lines {"text", "language"}, takes datatrove's word splitter for each language and its
defaults for everything else, and writes what stage 1 of its deduplication would hash.

    PYTHONPATH=/data/peer/multilingual /data/peer/.venv/bin/python datatrove_minhash.py IN OUT.npz
"""

import hashlib
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from datatrove.pipeline.dedup.minhash import MinhashDedupSignature


def main(source: str, target: str) -> None:
    """Write keys [N, bands], shingle sets one behind the other, their ends, and the seconds."""
    documents = [json.loads(line) for line in Path(source).read_text().splitlines()]
    folder = tempfile.mkdtemp()
    steps = {
        language: MinhashDedupSignature(folder, language=language)
        for language in sorted({document["language"] for document in documents})
    }
    keys = np.zeros((len(documents), 14), np.uint64)
    sets, ends = [], []
    end = 0
    started = time.process_time()
    for row, document in enumerate(documents):
        step = steps[document["language"]]
        shingles = step.get_shingles(document["text"])
        if len(shingles):
            for band, values in enumerate(step.get_signature(shingles)):
                content = np.array([band, *values], np.uint64).tobytes()
                digest = hashlib.blake2b(content, digest_size=8).digest()
                keys[row, band] = int.from_bytes(digest, "little")
        found = np.unique(shingles.ravel())
        sets.append(found)
        end += len(found)
        ends.append(end)
    seconds = time.process_time() - started
    np.savez(target, keys=keys, shingles=np.concatenate(sets), ends=ends, seconds=seconds)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
