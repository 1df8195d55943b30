"""How well near-duplicates are found: pair recall against theory, precision, beside datatrove.

Pairs are asked for before any union: whether the two documents share a band. The theory is the
probability of that at the pair's exact Jaccard similarity, averaged over the pairs; each side is
measured by its own shingles. The difference of the sides has a 95 % interval from a paired
bootstrap over the pairs. With ``seeds`` each side draws its permutations that many times, what it
ships first: recall is then the mean, next to what each seed found.

    python benchmarks/dedup_quality.py corpus=/data/corpus peer=/data/peer/.venv/bin/python seeds=8
    python benchmarks/dedup_quality.py corpus=/data/corpus number=300 out=quality.json
"""

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from reporting import commit

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.dedup_pairs import Pairs, make_pairs, read_pages
from data_pipeline.dedup.jaccard import jaccard
from data_pipeline.dedup.minhash import MINHASH_PRESETS, MinHasher

PEER = Path(__file__).parent / "peers" / "datatrove_minhash.py"
PRECISION_AT = (0.5, 0.6, 0.7, 0.8)
_RESAMPLES = 2000
_LARGEST_GROUP = 64
"""Documents under one key of which all pairs are looked at."""


@dataclass
class Side:
    """What one implementation says of the documents."""

    keys: npt.NDArray[np.uint64]
    """Band keys [seeds, N, bands]; 0 where a document has none."""
    sets: list[npt.NDArray[np.uint64]]
    """Shingles, sorted."""
    seconds: float
    """Processor time of one seed."""

    def found(self, pairs: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Whether the two documents of each pair share a band, [seeds, pairs]."""
        one, other = self.keys[:, pairs[:, 0]], self.keys[:, pairs[:, 1]]
        shared: npt.NDArray[np.bool_] = ((one == other) & (one != 0)).any(axis=2)
        return shared

    def similarity(self, pairs: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """Exact Jaccard similarity of each pair."""
        return np.array([jaccard(self.sets[a], self.sets[b]) for a, b in pairs.tolist()])


def own_side(texts: list[str], seeds: int) -> Side:
    """Sign the documents with this project's MinHash."""
    hasher = MinHasher("fineweb")
    hasher.band_keys(texts[:20])
    started = time.process_time()
    keys = [hasher.band_keys(texts)]
    seconds = time.process_time() - started
    keys += [MinHasher("fineweb", seed).band_keys(texts) for seed in range(1, seeds)]
    return Side(np.stack(keys), [np.unique(hasher.shingles(text)) for text in texts], seconds)


def peer_side(pairs: Pairs, interpreter: str, seeds: int) -> Side:
    """Sign the documents with datatrove, each with the splitter of its language."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "in.jsonl", Path(folder) / "out.npz"
        source.write_text("\n".join(
            json.dumps({"text": text, "language": language})
            for text, language in zip(pairs.texts, pairs.languages, strict=True)
        ))  # fmt: skip
        extra = Path(interpreter).parent.parent.parent / "multilingual"
        command = [interpreter, str(PEER), str(source), str(target), str(seeds)]
        subprocess.run(["env", f"PYTHONPATH={extra}", *command], check=True)
        answer = np.load(target)
        ends = answer["ends"].tolist()
        sets = np.split(answer["shingles"], ends[:-1])
        return Side(answer["keys"], sets, float(answer["seconds"]))


def recall(side: Side, pairs: npt.NDArray[np.int64]) -> dict[str, Any]:
    """Pair recall in per cent, and what theory expects of these pairs; the error is one seed's."""
    probability = MINHASH_PRESETS["fineweb"].probability
    similarity = side.similarity(pairs)
    expected = np.array([probability(value) for value in similarity])
    error = np.sqrt((expected * (1 - expected)).sum()) / len(pairs)
    found = 100 * side.found(pairs).mean(axis=1)
    return {
        "jaccard": round(float(similarity.mean()), 4),
        "theory": round(100 * float(expected.mean()), 2),
        "recall": round(float(found.mean()), 2),
        "standard_error": round(100 * float(error), 2),
        "recall_of_each_seed": found.round(2).tolist(),
    }  # fmt: skip


def difference(own: Side, peer: Side, pairs: npt.NDArray[np.int64]) -> dict[str, float]:
    """Own recall less the peer's, in points, with a paired bootstrap."""
    gains = own.found(pairs).mean(axis=0) - peer.found(pairs).mean(axis=0)
    rng = np.random.default_rng(0)
    means = [gains[rng.integers(0, len(gains), len(gains))].mean() for _ in range(_RESAMPLES)]
    low, high = np.percentile(means, [2.5, 97.5])
    return {
        "points": round(100 * float(gains.mean()), 2),
        "low": round(100 * float(low), 2),
        "high": round(100 * float(high), 2),
    }


def precision(side: Side) -> dict[str, float]:
    """Of all pairs that share a band under the first seed, the share that is similar enough."""
    shipped = side.keys[0]
    numbers = np.repeat(np.arange(len(shipped)), shipped.shape[1])
    keys = shipped.ravel()
    order = np.argsort(keys, kind="stable")
    groups = np.split(numbers[order], np.flatnonzero(np.diff(keys[order])) + 1)
    pairs = {
        (int(a), int(b))
        for group in groups
        if 1 < len(group) <= _LARGEST_GROUP
        for i, a in enumerate(group)
        for b in group[:i]
        if a != b
    }
    similarity = side.similarity(np.array(sorted(pairs), np.int64).reshape(-1, 2))
    shares = {f"{at:g}": round(100 * float((similarity >= at).mean()), 3) for at in PRECISION_AT}
    return {"pairs": len(pairs), **shares}


def compare(pairs: Pairs, interpreter: str | None, seeds: int) -> dict[str, Any]:
    """Measure both sides on every kind of pair, and on Chinese and Japanese alone."""
    sides = {"own": own_side(pairs.texts, seeds)}
    if interpreter:
        sides["datatrove"] = peer_side(pairs, interpreter, seeds)
    size = sum(len(text.encode()) for text in pairs.texts)
    unspaced = np.array([language[:3] in ("zho", "jpn") for language in pairs.languages])
    kinds: dict[str, Any] = {}
    for kind, numbers in pairs.pairs.items():
        both = np.array(numbers, np.int64).reshape(-1, 2)
        for name, some in ((kind, both), (f"{kind}, zh+ja", both[unspaced[both].all(axis=1)])):
            if len(some):
                entry: dict[str, Any] = {"pairs": len(some)}
                entry |= {side: recall(value, some) for side, value in sides.items()}
                if interpreter:
                    entry["difference"] = difference(sides["own"], sides["datatrove"], some)
                kinds[name] = entry
    return {
        "documents": len(pairs.texts),
        "text_bytes": size,
        "seeds": seeds,
        "kinds": kinds,
        "precision": {side: precision(value) for side, value in sides.items()},
        "megabytes_per_second": {
            side: round(size / 1e6 / value.seconds, 2) for side, value in sides.items()
        },
    }


def table(result: dict[str, Any]) -> str:
    """The result as lines for people."""
    lines = [
        "kind                        pairs  Jaccard  theory  recall   datatrove: theory  recall"
    ]
    for kind, entry in result["kinds"].items():
        own, peer = entry["own"], entry.get("datatrove")
        line = (
            f"{kind:26s} {entry['pairs']:6,}   {own['jaccard']:.3f}  {own['theory']:6.2f}  "
            f"{own['recall']:6.2f}"
        )
        if peer:
            gain = entry["difference"]
            line += (
                f"              {peer['theory']:6.2f}  {peer['recall']:6.2f}  "
                f"{gain['points']:+.2f} [{gain['low']:+.2f}, {gain['high']:+.2f}]"
            )
        lines.append(line)
    for side, shares in result["precision"].items():
        found = ", ".join(f"{share} % at {at}" for at, share in shares.items() if at != "pairs")
        lines.append(f"precision, {side}: {shares['pairs']:,} pairs found; Jaccard {found}")
    speeds = ", ".join(f"{s} {v}" for s, v in result["megabytes_per_second"].items())
    lines.append(f"signatures, MB/s of one core: {speeds}")
    return "\n".join(lines)


def main(words: list[str]) -> None:
    """Read NAME=VALUE: corpus, number (pairs of a kind), pages (of a source), peer, out, seeds.

    ``seed`` is that of the pairs, ``seeds`` how many each side has for its permutations.
    """
    options = {
        "number": "3000", "pages": "1200", "seed": "0", "seeds": "1", "peer": "", "out": "",
    }  # fmt: skip
    options |= dict(word.split("=", 1) for word in words)
    pages = read_pages(Path(options["corpus"]), int(options["pages"]))
    pairs = make_pairs(pages, int(options["number"]), int(options["seed"]))
    result = compare(pairs, options["peer"] or None, int(options["seeds"]))
    result["command"] = " ".join(["python benchmarks/dedup_quality.py", *words])
    result["commit"] = commit()
    print(table(result))
    if options["out"]:
        Path(options["out"]).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
