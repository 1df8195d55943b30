"""The linear classifier: what it looks at, what it learns, and that files are safe."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.commands import classifier
from data_pipeline.config.commands import ClassifierConfig
from data_pipeline.filters.classifier_training import HELD_OUT, _auc, train
from data_pipeline.filters.text_classifier import ClassifierSettings, TextClassifier, text_features
from llmtrain.errors import ConfigError, DataError

SMALL = ClassifierSettings(bucket_bits=14, epochs=3)


def texts(words: str, number: int = 60) -> list[str]:
    """Texts of a few of the words each, by a fixed rule."""
    split = words.split()
    return [
        " ".join(split[(i * 7 + k * (i % 3 + 1)) % len(split)] for k in range(12)) + f"\nno {i}"
        for i in range(number)
    ]


GOOD = texts("river mountain history science theory author museum light paper ocean stone letter")
BAD = texts("buy cheap click now offer free bonus login cart price sale discount")


@pytest.fixture(scope="module")
def model() -> TextClassifier:
    return train(GOOD, BAD, SMALL)


def test_it_tells_the_classes_apart(model: TextClassifier) -> None:
    assert model.facts.positive == model.facts.negative == 60
    assert model.facts.accuracy == 1.0
    assert model.facts.auc == 1.0
    assert model.score("The author of the paper wrote history.") > 0.6
    assert model.score("click now for a free offer") < 0.4
    assert model.score("") == pytest.approx(1 / (1 + math.exp(-model.bias)))


def test_training_is_the_same_every_time(model: TextClassifier, tmp_path: Path) -> None:
    model.save(tmp_path / "a")
    train(GOOD, BAD, SMALL).save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    train(GOOD, BAD[:-1], SMALL).save(tmp_path / "c")
    assert (tmp_path / "a").read_bytes() != (tmp_path / "c").read_bytes()


def test_features_are_words_and_pairs_without_case_and_digits() -> None:
    one = text_features("Two Words 17", SMALL)
    assert len(one) == 6
    assert np.array_equal(one, text_features("two WORDS 42", SMALL))
    assert not np.array_equal(one, text_features("words two 42", SMALL))
    assert set(one.tolist()) >= set(text_features("words", SMALL)[:1].tolist())
    broken = text_features("two\nwords 17", SMALL)
    assert len(broken) == 8
    assert np.array_equal(broken, text_features("two\n\n \nwords 17", SMALL))
    limited = ClassifierSettings(bucket_bits=14, max_words=2)
    assert len(text_features("one two three four", limited)) == 4
    assert len(text_features("", SMALL)) == 0


def test_the_score_is_the_logistic_function_of_the_mean_weight(model: TextClassifier) -> None:
    features = text_features(GOOD[0], SMALL)
    mean = float(model.weights[features].astype(np.float64).mean())
    assert model.score(GOOD[0]) == pytest.approx(1 / (1 + math.exp(-model.bias - mean)))


def test_both_classes_weigh_the_same() -> None:
    uneven = train(GOOD[:20], BAD, SMALL)
    assert uneven.facts.accuracy == 1.0
    assert uneven.score(GOOD[40]) > 0.5


def test_auc_counts_pairs() -> None:
    negative, positive = np.array([0.0, 1.0, 2.0]), np.array([1.0, 3.0])
    assert _auc(negative, positive) == pytest.approx((1.5 + 3) / 6, abs=1e-6)


def test_files_come_back_and_damaged_ones_are_refused(
    model: TextClassifier, tmp_path: Path
) -> None:
    path = tmp_path / "model.bin"
    model.save(path)
    again = TextClassifier.load(path)
    assert again.facts == model.facts
    assert again.settings == model.settings
    assert [again.score(text) for text in GOOD] == [model.score(text) for text in GOOD]
    content = path.read_bytes()
    for damaged, message in [
        (content[:-1], "is damaged: 65535 bytes"),
        (content[:-1] + b"x", "is damaged: 65536 bytes"),
        (b"PK" + content, "is no classifier of this version"),
        (content.replace(b'"bias"', b'"bios"'), "damaged header"),
    ]:
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=message):
            TextClassifier.load(path)
    with pytest.raises(DataError, match="cannot be read"):
        TextClassifier.load(tmp_path / "absent")


def test_few_texts_are_refused() -> None:
    with pytest.raises(
        DataError, match=f"19 positive texts; a classifier needs at least {2 * HELD_OUT}"
    ):
        train(GOOD[:19], BAD, SMALL)


def test_the_command_trains_on_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, lines in (("good", GOOD), ("bad1", BAD[:30]), ("bad2", BAD[30:])):
        rows = "".join(json.dumps({"content": text}) + "\n" for text in lines)
        (tmp_path / f"{name}.jsonl").write_text(rows)
    config = ClassifierConfig(
        positive=str(tmp_path / "good.jsonl"), negative=str(tmp_path / "bad*.jsonl"),
        out=str(tmp_path / "model.bin"), text_field="content", bucket_bits=14, max_documents=50,
    )  # fmt: skip
    assert classifier(config) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["positive"], facts["negative"]) == (50, 50)
    assert [line.split()[0] for line in facts["inputs"]] == ["positive", "negative", "negative"]
    assert TextClassifier.load(tmp_path / "model.bin").score(GOOD[0]) > 0.5
    with pytest.raises(DataError, match="exists already"):
        classifier(config)
    with pytest.raises(ConfigError, match="bucket_bits=40"):
        ClassifierConfig(positive="a", negative="b", out="c", bucket_bits=40)
