"""Trains the classifier of texts on wanted and unwanted ones.

Gradient descent in a fixed order, with both classes weighing the same: the same texts give the same
model, bit for bit. Every tenth text of a class is held out, and the model says how it does on them.

    train(positive, negative).save(Path("quality.bin"))
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipeline.compiled import compiled
from data_pipeline.config.commands import ClassifierConfig
from data_pipeline.config.extract import FieldsConfig
from data_pipeline.filters.text_classifier import (
    ClassifierSettings,
    Facts,
    TextClassifier,
    logistic,
    logit,
    text_features,
)
from data_pipeline.read.inputs import RawFile
from data_pipeline.read.rows import Unreadable, read_text_file
from llmtrain.errors import DataError

HELD_OUT = 10
"""One text in so many is not trained on; the figures in a model's file are measured on these."""
_ORDER_SEED = 0x71


@compiled
def _descend(
    features: Any, offsets: Any, labels: Any, order: Any, shares: Any, weights: Any, rates: Any,
    bias: float,
) -> float:  # fmt: skip
    """Do one pass over the texts; return the bias. ``shares`` makes both classes weigh the same."""
    for i in range(order.shape[0]):
        text = order[i]
        own = features[offsets[text] : offsets[text + 1]]
        label = labels[text]
        error = logistic(logit(own, weights, bias)) - label
        step = rates[i] * error * shares[label]
        bias -= step
        for k in range(own.shape[0]):
            weights[own[k]] -= np.float32(step)
    return bias


def train(
    positive: Iterable[str],
    negative: Iterable[str],
    settings: ClassifierSettings | None = None,
    inputs: Sequence[str] = (),
) -> TextClassifier:
    """Train a model; every tenth text of each class is held out and measured on.

    Raises:
        DataError: a class has fewer than 2 * HELD_OUT texts.
    """
    settings = settings or ClassifierSettings()
    classes = [[text_features(text, settings) for text in texts] for texts in (negative, positive)]
    for name, texts in zip(("negative", "positive"), classes, strict=True):
        if len(texts) < 2 * HELD_OUT:
            raise DataError(
                f"{len(texts)} {name} texts; a classifier needs at least {2 * HELD_OUT} of each "
                "class: give more"
            )
    learned = [f for texts in classes for i, f in enumerate(texts) if i % HELD_OUT]
    labels = [k for k, texts in enumerate(classes) for i in range(len(texts)) if i % HELD_OUT]
    weights, bias = _fit(learned, np.array(labels, dtype=np.int64), settings)
    held_out = [
        np.array([logit(features, weights, bias) for features in texts[::HELD_OUT]])
        for texts in classes
    ]
    facts = Facts(
        positive=len(classes[1]), negative=len(classes[0]), inputs=tuple(inputs),
        accuracy=_accuracy(*held_out), auc=_auc(*held_out),
    )  # fmt: skip
    return TextClassifier(settings=settings, weights=weights, bias=bias, facts=facts)


def _fit(
    texts: Sequence[npt.NDArray[np.uint32]],
    labels: npt.NDArray[np.int64],
    settings: ClassifierSettings,
) -> tuple[npt.NDArray[np.float32], float]:
    """Return weights and bias learned from the buckets of labelled texts."""
    offsets = np.zeros(len(texts) + 1, dtype=np.int64)
    np.cumsum([len(text) for text in texts], out=offsets[1:])
    features = np.concatenate(texts)
    shares = len(labels) / (2.0 * np.bincount(labels, minlength=2))
    rates = settings.learning_rate * np.linspace(1.0, 0.0, settings.epochs * len(texts) + 1)
    weights = np.zeros(1 << settings.bucket_bits, dtype=np.float32)
    bias = 0.0
    for epoch in range(settings.epochs):
        order = np.random.Generator(np.random.PCG64([epoch, _ORDER_SEED])).permutation(len(texts))
        own = rates[epoch * len(texts) : (epoch + 1) * len(texts)]
        bias = _descend(features, offsets, labels, order, shares, weights, own, bias)
    return weights, float(bias)


def _accuracy(negative: npt.NDArray[Any], positive: npt.NDArray[Any]) -> float:
    right = int((negative < 0).sum() + (positive >= 0).sum())
    return round(right / (len(negative) + len(positive)), 6)


def _auc(negative: npt.NDArray[Any], positive: npt.NDArray[Any]) -> float:
    ranks = np.sort(negative)
    below = np.searchsorted(ranks, positive, "left") + np.searchsorted(ranks, positive, "right")
    return round(float(below.sum()) / (2 * len(negative) * len(positive)), 6)


def train_on_files(
    positive: Sequence[RawFile], negative: Sequence[RawFile], config: ClassifierConfig
) -> TextClassifier:
    """Train a model on the texts of fingerprinted files."""
    settings = ClassifierSettings(
        bucket_bits=config.bucket_bits, max_words=config.max_words, epochs=config.epochs,
        learning_rate=config.learning_rate,
    )  # fmt: skip
    inputs = [f"{file.source} {file.sha256}" for file in (*positive, *negative)]
    return train(_texts(positive, config), _texts(negative, config), settings, inputs)


def _texts(files: Sequence[RawFile], config: ClassifierConfig) -> Iterator[str]:
    """Yield the first texts of every file, the same number from each."""
    fields = FieldsConfig(text=config.text_field)
    share = -(-config.max_documents // len(files))
    for file in files:
        documents = (d for d in read_text_file(file, fields) if not isinstance(d, Unreadable))
        for document in islice(documents, share):
            yield document.text
