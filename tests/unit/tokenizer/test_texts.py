"""The sample of a trainer is spread over the input and does not depend on its order."""

import random

from llmtrain.tokenizer.texts import Sample, spread_sample

DOCUMENTS = [(f"{i:032x}", f"text {i} " + "x" * (i % 50)) for i in range(2000)]
TOTAL = sum(len(text) for _, text in DOCUMENTS)


def test_sample_is_spread_and_independent_of_order() -> None:
    sample = spread_sample(DOCUMENTS, TOTAL // 10)
    shuffled = random.Random(0).sample(DOCUMENTS, len(DOCUMENTS))
    assert spread_sample(shuffled, TOTAL // 10) == sample
    size = sum(map(len, sample))
    assert TOTAL // 10 <= size < TOTAL // 10 + 60
    numbers = [int(text.split()[1]) for text in sample]
    assert 5 < sum(number < 200 for number in numbers) < 45
    assert 5 < sum(number >= 1800 for number in numbers) < 45


def test_a_larger_sample_holds_the_smaller() -> None:
    small, large = (spread_sample(DOCUMENTS, size) for size in (1_000, 10_000))
    assert large[: len(small)] == small


def test_sample_of_everything() -> None:
    assert sorted(spread_sample(DOCUMENTS, 10 * TOTAL)) == sorted(text for _, text in DOCUMENTS)
    assert spread_sample([], 100) == []


def test_sample_counts_what_is_read() -> None:
    sample = Sample(["abc", "déf", "never read"], 7)
    assert list(sample) == ["abc", "déf"]
    assert sample.counts() == {"texts": 2, "bytes": 7}
