"""Signatures against a reference in plain Python, recall against theory, and what is normalised."""

import functools
import random
import unicodedata

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_pipeline.dedup.minhash import MINHASH_PRESETS, MinHasher, MinHashPreset
from data_pipeline.text.characters import LONE, WORD, CharacterTable, normalized_characters
from llmtrain.errors import ConfigError

WORDS = [f"{a}{b}" for a in "bcdfghjklmnpqrstvwxz" for b in ("a", "ei", "oun", "ust", "yk")]
M = (1 << 64) - 1
GAMMA = 0x9E3779B97F4A7C15


parts_of = functools.lru_cache(maxsize=None)(normalized_characters)


def mix(x: int) -> int:
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & M
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & M
    return x ^ (x >> 31)


def unit_hash(points: list[int]) -> int:
    h = 0xCBF29CE484222325
    for point in points:
        h = (h ^ point) * 0x100000001B3 & M
    return mix(h)


def units(text: str, unit: str) -> list[int]:
    marked = "".join(
        f" {chr(p)} " if kind == LONE and unit == "word" else chr(p) if kind >= WORD else " "
        for character in text
        for kind, p in parts_of(character)
    ).split()
    pieces = marked if unit == "word" else list(" ".join(marked))
    return [unit_hash([ord(c) for c in piece]) for piece in pieces]


def reference(text: str, preset: MinHashPreset) -> list[int]:
    """Return the signature, computed the slow way."""
    hashes = units(text, preset.unit)
    width = min(preset.shingle, len(hashes))
    if not hashes:
        hashes, width = [ord(c) for c in text], len(text)
    shingles = {
        mix(
            functools.reduce(lambda x, h: (x * GAMMA + h) & M, hashes[i : i + width], 0)
            ^ (width * 0xBF58476D1CE4E5B9 & M)
        )
        for i in range(len(hashes) - width + 1)
    }
    draws = [
        mix(0x6D696E68617368 + (i + 1) * GAMMA & M) >> 32
        for i in range(2 * preset.bands * preset.rows)
    ]
    pairs = zip(draws[0::2], draws[1::2], strict=True)
    return [min(((a | 1) * (x >> 32) + b) & 0xFFFFFFFF for x in shingles) for a, b in pairs]


TEXT = st.text(
    st.one_of(st.sampled_from("abc  .é\u0301ß0٣漢かไ한각Σς'\u00ad\n"), st.characters()),
    min_size=1,
    max_size=60,
)


@pytest.mark.parametrize("name", list(MINHASH_PRESETS))
@settings(max_examples=15)
@given(text=TEXT)
@example(text="one two three")
@example(text="한국어 글을 각각 나눈다, Das ist ein Wort mehr als fünf!")
@example(text="?!.")
@example(text=" ")
def test_signatures_equal_the_reference(name: str, text: str) -> None:
    signature = MinHasher(name).signature(text)
    assert signature.tolist() == reference(text, MINHASH_PRESETS[name])


def test_signatures_are_the_same_on_every_machine() -> None:
    text = "The quick brown fox jumps over the lazy dog; 12 times, naïvely. 日本語も。"
    keys = {name: int(MinHasher(name).band_keys([text])[0][0]) for name in MINHASH_PRESETS}
    assert keys == {
        "fineweb": 1848508352353111236,
        "slimpajama": 16642724526135788725,
        "redpajama_v2": 10644051051708589267,
        "olmo": 13366710132061767649,
    }


def test_shingles_are_those_of_the_signature_repeats_included() -> None:
    hasher = MinHasher("fineweb")
    text = "a b c d e " * 40
    shingles = hasher.shingles(text).copy()
    assert len(shingles) == 196
    assert len(set(shingles.tolist())) == 5
    assert hasher.shingles("a b c d e f").tolist()[0] == shingles[0]
    with pytest.raises(ValueError, match="empty document"):
        hasher.shingles("")


def test_batches_equal_single_texts_and_bands_differ() -> None:
    hasher = MinHasher("fineweb")
    texts = ["a b c d e f g", "x", "a b c d e f g " * 5000]
    keys = hasher.band_keys(texts)
    assert keys.shape == (3, 14)
    assert keys.dtype == np.uint64
    for row, signature, text in zip(keys, hasher.signatures(texts), texts, strict=True):
        assert row.tolist() == hasher.band_keys([text])[0].tolist()
        assert signature.tolist() == hasher.signature(text).tolist()
    assert len(set(keys.ravel().tolist())) == 42


@pytest.mark.parametrize("preset", ["fineweb", "slimpajama"])
def test_arrow_texts_have_the_keys_of_their_strings(preset: str) -> None:
    texts = [
        "left out",
        "One, two. " * 20,
        "Größe ΐ ﬁ 각 한국어",
        "猫が好き𠀀𝒳",
        "?!",
        "\U0001f600 x",
    ]
    column = pa.array(texts, pa.large_string())
    fresh = MinHasher(preset).band_keys(column.slice(1))
    assert fresh.tolist() == [MinHasher(preset).band_keys([text])[0].tolist() for text in texts[1:]]
    assert MinHasher(preset).band_keys(column[:0]).shape == (0, fresh.shape[1])
    with pytest.raises(ValueError, match="empty document"):
        MinHasher(preset).band_keys(pa.array(["a", ""], pa.large_string()))


def test_other_seeds_draw_other_permutations() -> None:
    texts = ["a b c d e f g"]
    rows = [MinHasher("fineweb", seed).signatures(texts)[0] for seed in range(3)]
    assert len(set(np.concatenate(rows).tolist())) == 3 * 14 * 8
    assert rows[0].tolist() == MinHasher("fineweb").signatures(texts)[0].tolist()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("The CAT sat on the mat", "the cat, sat -- on the mat!"),
        ("call 555 1234 right now please", "call 987 6543 right now please"),
        ("number ٣٤ stands here as well", "number 56 stands here as well"),
        ("caf\u00e9 cr\u00e8me is what we want", "cafe\u0301 creme is what we want"),
        ("ein\u00adge\u00adteilt ist das Wort hier", "eingeteilt ist das wort hier"),
        ("ΟΔΟΣ ΚΑΙ ΔΡΟΜΟΣ στην πόλη", "οδος και δρομος στην πολη"),
        ("white   space\n\tdoes not count here", "white space does not count here"),
        ("각 나라의 말은 서로 다르다", unicodedata.normalize("NFD", "각 나라의 말은 서로 다르다")),
    ],
)
def test_what_does_not_count(one: str, other: str) -> None:
    hasher = MinHasher("fineweb")
    assert hasher.signature(one).tolist() == hasher.signature(other).tolist()


def test_texts_shorter_than_a_shingle_are_compared_whole() -> None:
    hasher = MinHasher("redpajama_v2")
    same = hasher.band_keys(["Two words.", "two WORDS", "words two", "two", "two words two"])
    assert same[0].tolist() == same[1].tolist()
    for other in same[2:]:
        assert not set(same[0].tolist()) & set(other.tolist())


def test_only_equal_texts_without_words_meet_and_empty_ones_are_refused() -> None:
    hasher = MinHasher("fineweb")
    keys = hasher.band_keys(["!!!", "!!!", "???"])
    assert keys[0].tolist() == keys[1].tolist()
    assert not set(keys[0].tolist()) & set(keys[2].tolist())
    with pytest.raises(ValueError, match="empty document"):
        hasher.signature("")


def test_scripts_without_spaces_are_compared_by_characters() -> None:
    base = (
        "吾輩は猫である名前はまだ無いどこで生れたかとんと見当がつかぬ何でも薄暗いじめじめした所で"
    )
    other = base.replace("無い", "ない")
    hasher = MinHasher("olmo")
    shared = np.mean(hasher.signature(base) == hasher.signature(other))
    assert 0.5 < shared < 0.95


@pytest.mark.parametrize("name", ["fineweb", "olmo", "slimpajama"])
def test_recall_follows_the_theory(name: str) -> None:
    preset = MINHASH_PRESETS[name]
    hasher = MinHasher(preset)
    rng = random.Random(1)
    expected, found, estimates = [], [], []
    for _ in range(150):
        words = [word(rng) for _ in range(60)]
        changed = list(words)
        for _ in range(rng.randint(1, 3)):
            changed[rng.randrange(60)] = word(rng)
        texts = [" ".join(words), " ".join(changed)]
        one, other = (shingle_set(text, preset) for text in texts)
        jaccard = len(one & other) / len(one | other)
        a, b = hasher.band_keys(texts)
        expected.append(preset.probability(jaccard))
        found.append(bool((a == b).any()))
        sign = hasher.signatures(texts)
        estimates.append(float((sign[0] == sign[1]).mean()) - jaccard)
    spread = np.sqrt(sum(p * (1 - p) for p in expected))
    assert abs(sum(found) - sum(expected)) < 4 * spread + 1
    assert abs(np.mean(estimates)) < 0.012


def word(rng: random.Random) -> str:
    return "".join(rng.choices("abcdefghij", k=7))


def shingle_set(text: str, preset: MinHashPreset) -> set[tuple[int, ...]]:
    hashes = units(text, preset.unit)
    return {tuple(hashes[i : i + preset.shingle]) for i in range(len(hashes) - preset.shingle + 1)}


def test_unrelated_texts_do_not_meet() -> None:
    rng = random.Random(2)
    texts = [" ".join(rng.choices(WORDS, k=80)) for _ in range(400)]
    keys = MinHasher("fineweb").band_keys(texts)
    assert len(np.unique(keys)) == keys.size


def test_probability_is_the_s_curve() -> None:
    preset = MINHASH_PRESETS["fineweb"]
    assert preset.probability(0.75) == pytest.approx(0.772, abs=1e-3)
    assert preset.probability(1.0) == 1.0
    assert preset.probability(0.0) == 0.0


def test_unknown_presets_are_refused_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"'fine' is not known; use one of fineweb, olmo"):
        MinHasher("fine")


def test_the_table_holds_what_single_characters_become() -> None:
    table = CharacterTable()
    points = np.arange(0x20, 0x3100, dtype=np.uint32)
    table.learn(points)
    for point in points.tolist():
        parts = normalized_characters(chr(point))
        if len(parts) == 1:
            assert (table.kind[point], table.mapped[point]) == parts[0]
        elif parts:
            row = table.expansions[table.mapped[point]].tolist()
            assert row[1 : row[0] + 1] == [part for _, part in parts]
