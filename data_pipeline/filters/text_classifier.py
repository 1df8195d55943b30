"""A linear classifier of texts over hashed words and pairs of words, in the manner of fastText.

A word is lower-cased with every digit a 0; line breaks count as words. The score of a text is the
logistic function of a bias and the mean weight of its words and pairs (arXiv:1607.01759 with one
output and no hidden layer, which is the same family of functions for two classes). A file names its
format and version and holds the digest of its weights.

    TextClassifier.load(Path("quality.bin")).score("Some text.")   # 0.731059
"""

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import blake3
import numpy as np
import numpy.typing as npt

from data_pipeline.compiled import compiled
from data_pipeline.text.code_points import DIGIT, LINE_BREAK, properties
from data_pipeline.text.hashing import mix
from data_pipeline.text.letter_case import lower_case
from data_pipeline.text.words import words
from llmtrain.errors import DataError

_MAGIC = b"llmtrain-classifier 1\n"
_BASE = np.uint64(0x9E3779B97F4A7C15)
_BREAK = np.uint64(0xD1B54A32D192ED03)
_ZERO = np.uint32(ord("0"))


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassifierSettings:
    """What a model is made with."""

    bucket_bits: int = 20
    """Weights, as a power of two; words and pairs share them by hash."""
    max_words: int = 1000
    """Words of a text that are looked at."""
    epochs: int = 5
    """Passes over the texts."""
    learning_rate: float = 0.3
    """Step size at the start; it falls to zero in a straight line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Where a model comes from and how it does on texts it was not trained on."""

    positive: int = 0
    """Positive texts, held-out ones included."""
    negative: int = 0
    """Negative texts, held-out ones included."""
    accuracy: float = 0.0
    """Share of the held-out texts on the right side of 0.5."""
    auc: float = 0.0
    """Chance that a positive held-out text scores above a negative one."""
    inputs: tuple[str, ...] = ()
    """Label and sha256 of every file the texts came from."""


@compiled
def _features(
    points: Any, starts: Any, ends: Any, table: Any, lower: Any, mask: Any, limit: int, out: Any
) -> int:
    """Write the bucket of every word and pair of words; return their number."""
    count = 0
    before = np.uint64(0)
    position = 0
    for word in range(min(starts.shape[0], limit)):
        broken = False
        for i in range(position, starts[word]):
            broken = broken or (table[points[i]] & LINE_BREAK) != 0
        if broken and word > 0:
            out[count] = np.uint32(mix(_BREAK) & mask)
            out[count + 1] = np.uint32(mix(before * _BASE + _BREAK) & mask)
            before = _BREAK
            count += 2
        key = np.uint64(0)
        for i in range(starts[word], ends[word]):
            point = _ZERO if table[points[i]] & DIGIT else lower[points[i]]
            key = key * _BASE + np.uint64(point) + np.uint64(1)
        key = mix(key)
        out[count] = np.uint32(key & mask)
        out[count + 1] = np.uint32(mix(before * _BASE + key) & mask)
        count += 2
        before = key
        position = ends[word]
    return count


@compiled
def logit(features: Any, weights: Any, bias: float) -> float:
    """Return the bias and the mean weight of some buckets."""
    total = 0.0
    for i in range(features.shape[0]):
        total += weights[features[i]]
    return float(bias + total / max(features.shape[0], 1))


@compiled
def logistic(x: float) -> float:
    """Return 1 / (1 + exp(-x)), for any x."""
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))


@dataclass(frozen=True, slots=True, kw_only=True)
class TextClassifier:
    """A trained model."""

    settings: ClassifierSettings
    """What it was made with."""
    weights: npt.NDArray[np.float32]
    """One weight per bucket, [2 ** bucket_bits]."""
    bias: float
    """Score of nothing, before the logistic function."""
    facts: Facts = field(default_factory=Facts)
    """Origin and quality."""

    def features(self, text: str) -> npt.NDArray[np.uint32]:
        """Return the buckets of a text's words and pairs."""
        return text_features(text, self.settings)

    def score(self, text: str) -> float:
        """Return the probability in [0, 1] that a text is positive."""
        return float(logistic(logit(self.features(text), self.weights, self.bias)))

    def save(self, path: Path) -> None:
        """Write the model: a line that names the format, a line of JSON, the weights."""
        weights = self.weights.astype("<f4").tobytes()
        header = {
            "settings": asdict(self.settings), "facts": asdict(self.facts), "bias": self.bias,
            "digest": blake3.blake3(weights).hexdigest(length=16),
        }  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps(header, sort_keys=True).encode() + b"\n"
        path.write_bytes(_MAGIC + line + weights)

    @classmethod
    def load(cls, path: Path) -> "TextClassifier":
        """Read a model.

        Raises:
            DataError: there is none, it is of another version, or damaged.
        """
        try:
            content = path.read_bytes()
        except OSError as error:
            raise DataError(
                f"the classifier {path} cannot be read ({error.strerror}); give the file that "
                "`llmtrain-data classifier` has written"
            ) from error
        if not content.startswith(_MAGIC):
            raise DataError(
                f"{path} is no classifier of this version: it begins with {content[:24]!r}, "
                f"expected {_MAGIC!r}; train it again with `llmtrain-data classifier`"
            )
        line, _, weights = content[len(_MAGIC) :].partition(b"\n")
        try:
            header = json.loads(line)
            settings = ClassifierSettings(**header["settings"])
            facts = Facts(**{**header["facts"], "inputs": tuple(header["facts"]["inputs"])})
            digest, bias = header["digest"], float(header["bias"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} has a damaged header ({error}); train it again") from error
        found = blake3.blake3(weights).hexdigest(length=16)
        if found != digest or len(weights) != 4 << settings.bucket_bits:
            raise DataError(
                f"{path} is damaged: {len(weights)} bytes of weights with digest {found}, "
                f"expected {4 << settings.bucket_bits} with {digest}; train it again"
            )
        values = np.frombuffer(weights, dtype="<f4")
        return cls(settings=settings, weights=values, bias=bias, facts=facts)


def text_features(text: str, settings: ClassifierSettings) -> npt.NDArray[np.uint32]:
    """Return the buckets of a text's words and pairs, uint32 [features]."""
    split = words(text)
    out = np.empty(4 * min(len(split), settings.max_words), dtype=np.uint32)
    mask = np.uint64((1 << settings.bucket_bits) - 1)
    count = _features(
        split.points, split.starts, split.ends, properties(), lower_case(), mask,
        settings.max_words, out,
    )  # fmt: skip
    return out[:count]
