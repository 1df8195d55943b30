"""datatrove's MinHash keys and shingles of given documents, for comparison pair by pair.

Reads JSON lines {"text", "language"}, takes datatrove's word splitter for each language and its
defaults for everything else, and writes what stage 1 of its deduplication would hash. SEEDS is how
many seeds of its permutations it takes, its default first.

    PYTHONPATH=/data/peer/multilingual /data/peer/.venv/bin/python datatrove_minhash.py IN OUT SEEDS
"""

import hashlib
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupSignature


def main(source: str, target: str, seeds: int) -> None:
    """Write keys [seeds, N, bands], shingle sets, their ends, and the seconds of the first seed."""
    documents = [json.loads(line) for line in Path(source).read_text().splitlines()]
    folder = tempfile.mkdtemp()
    first = MinhashConfig().seed
    signers = [
        MinhashDedupSignature(folder, MinhashConfig(seed=first + seed)) for seed in range(seeds)
    ]
    steps = {
        language: MinhashDedupSignature(folder, language=language)
        for language in sorted({document["language"] for document in documents})
    }
    keys = np.zeros((seeds, len(documents), 14), np.uint64)
    shingles_of, sets, ends = [], [], []
    end = 0
    started = time.process_time()
    for row, document in enumerate(documents):
        step = steps[document["language"]]
        shingles = step.get_shingles(document["text"])
        sign(signers[0], shingles, keys[0, row])
        shingles_of.append(shingles)
        found = np.unique(shingles.ravel())
        sets.append(found)
        end += len(found)
        ends.append(end)
    seconds = time.process_time() - started
    for signer, into in zip(signers[1:], keys[1:], strict=True):
        for row, shingles in enumerate(shingles_of):
            sign(signer, shingles, into[row])
    np.savez(target, keys=keys, shingles=np.concatenate(sets), ends=ends, seconds=seconds)


def sign(step: MinhashDedupSignature, shingles: np.ndarray, out: np.ndarray) -> None:
    """Write a key for each band of a signature; zeros for a document without shingles."""
    if not len(shingles):
        return
    for band, values in enumerate(step.get_signature(shingles)):
        content = np.array([band, *values], np.uint64).tobytes()
        digest = hashlib.blake2b(content, digest_size=8).digest()
        out[band] = int.from_bytes(digest, "little")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
