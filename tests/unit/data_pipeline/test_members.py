"""Compressed files as rows of members: damage costs a member, and large ones are not kept."""

import bz2
import gzip
import lzma
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from data_pipeline.read import members
from data_pipeline.read.byte_file import ByteFile, find
from data_pipeline.read.members import CODECS, Inflated, inflate, read_members, scan
from llmtrain.errors import DataError

PACK: dict[str, Callable[[bytes], bytes]] = {
    ".gz": lambda data: gzip.compress(data, mtime=0),
    ".zst": lambda data: zstandard.ZstdCompressor(write_checksum=True).compress(data),
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}
TEXTS = [bytes(str(i), "ascii") * 3000 for i in range(5)]


@pytest.fixture(params=sorted(PACK))
def suffix(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def write(folder: Path, suffix: str, *, between: bytes = b"") -> tuple[Path, list[int]]:
    """A file of one member per text, and where each begins."""
    parts = [PACK[suffix](text) for text in TEXTS]
    path = folder / f"a.jsonl{suffix}"
    path.write_bytes(between.join(parts))
    starts = [sum(len(p) + len(between) for p in parts[:i]) for i in range(len(parts))]
    return path, starts


def contents(path: Path) -> list[bytes | str]:
    """What every member holds, or what is wrong with it."""
    codec = CODECS[path.suffix]()
    with ByteFile(path) as file:
        return [m.damage or b"".join(inflate(file, codec, m)) for m in read_members(file, codec)]


@pytest.mark.parametrize("keep_bytes", [0, 1 << 20])
def test_members_come_in_order(
    suffix: str, keep_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan, "__defaults__", (keep_bytes,))
    path, _ = write(tmp_path, suffix)
    assert contents(path) == TEXTS


def test_zeros_between_members_are_padding_up_to_a_size(suffix: str, tmp_path: Path) -> None:
    path, _ = write(tmp_path, suffix, between=bytes(512))
    assert contents(path) == TEXTS
    path, _ = write(tmp_path, suffix, between=bytes(members._PADDING_BYTES + 1))
    assert [c for c in contents(path) if isinstance(c, bytes)] == TEXTS
    assert sum(isinstance(c, str) for c in contents(path)) == len(TEXTS) - 1


@pytest.mark.parametrize("victim", [0, 2, 4])
def test_damage_costs_the_member_it_is_in(suffix: str, victim: int, tmp_path: Path) -> None:
    path, starts = write(tmp_path, suffix)
    content = bytearray(path.read_bytes())
    end = [*starts, len(content)][victim + 1]
    content[(starts[victim] + end) // 2] ^= 0xFF
    path.write_bytes(content)
    codec = CODECS[suffix]()
    with ByteFile(path) as file:
        found = list(read_members(file, codec))
    assert [(m.offset, m.end) for m in found if m.damage] == [(starts[victim], end)]
    whole = [m.content for m in found if not m.damage]
    assert whole == TEXTS[:victim] + TEXTS[victim + 1 :]


def test_a_cut_file_says_so(suffix: str, tmp_path: Path) -> None:
    path, starts = write(tmp_path, suffix)
    path.write_bytes(path.read_bytes()[:-3])
    with ByteFile(path) as file:
        last = list(read_members(file, CODECS[suffix]()))[-1]
    assert (last.offset, last.end, last.cut) == (starts[-1], path.stat().st_size, True)


def test_large_members_are_read_forwards_and_backwards(tmp_path: Path) -> None:
    data = b"".join(b"%06d\n" % i for i in range(300_000))
    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(data, mtime=0))
    with ByteFile(path) as file:
        codec = CODECS[".gz"]()
        member = scan(file, codec, 0, keep_bytes=1000)
        assert member.content is None
        assert member.size == len(data)
        content = Inflated(file, codec, member)
        for start, length in ((0, 8), (700_000, 20), (699_995, 9), (5, 1), (len(data) - 3, 10)):
            assert content.read(start, length) == data[start : start + length]
        assert find(content, b"123456\n", 0) == 7 * 123456
        assert find(content, b"no such", 0) == -1


def test_small_files_that_grow_are_inflated_a_piece_at_a_time(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(PACK[suffix](bytes(6 << 20)))
    codec = CODECS[suffix]()
    with ByteFile(path) as file:
        (member,) = read_members(file, codec)
        pieces = [len(piece) for piece in inflate(file, codec, member)]
    assert sum(pieces) == 6 << 20
    limit = 32 << 20 if suffix == ".zst" else 1 << 20  # zstd has no way to ask for less
    assert max(pieces) <= limit


def test_a_pattern_is_found_across_the_windows_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    for at in (0, (256 << 10) - 3, (512 << 10) - 1, 700_000):
        content = bytearray(800_000)
        content[at : at + 6] = b"needle"
        path.write_bytes(content)
        with ByteFile(path) as file:
            assert find(file, b"needle", 0) == at
            assert find(file, b"needle", at + 1) == -1


def test_a_file_that_shrinks_while_it_is_read_is_refused(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(PACK[suffix](random.Random(1).randbytes(900_000)))
    codec = CODECS[suffix]()
    with ByteFile(path) as file:
        member = scan(file, codec, 0, keep_bytes=0)
        os.truncate(path, 500_000)
        with pytest.raises(DataError, match="was cut while it was read"):
            list(inflate(file, codec, member))
