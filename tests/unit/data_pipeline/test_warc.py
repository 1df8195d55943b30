"""Reading WARC files, and going on after damage."""

import gzip
from pathlib import Path

import pytest

from data_pipeline.read.members import scan
from data_pipeline.read.warc import Damaged, Record, read_member, read_warc
from llmtrain.errors import DataError
from tests.crawl import pages, write_warc

NUMBER = 6


@pytest.fixture(params=[True, False], ids=["gzip", "plain"])
def warc(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / ("c.warc.gz" if request.param else "c.warc")
    write_warc(path, seed=3, number=NUMBER, gzip=request.param)
    return path


def records_of(path: Path) -> tuple[list[Record], list[Damaged]]:
    items = list(read_warc(path))
    records = [item for item in items if isinstance(item, Record)]
    return records, [item for item in items if isinstance(item, Damaged)]


def test_records_are_what_was_written(warc: Path) -> None:
    records, damaged = records_of(warc)
    assert not damaged
    expected = pages(seed=3, number=NUMBER)
    assert [r.url for r in records] == [url for url, *_ in expected]
    assert [r.payload.decode() for r in records] == [html for *_, html in expected]
    assert [r.timestamp for r in records] == [date for _, date, *_ in expected]
    assert records[0].record_id == "<urn:test:3:0>"
    assert records[0].content_type == "text/html; charset=utf-8"


def test_members_are_found_again_by_offset_and_length(warc: Path) -> None:
    records, _ = records_of(warc)
    for record in records:
        (again,) = read_member(warc, record.offset, record.length)
        assert again == record
    assert records[-1].offset + records[-1].length == warc.stat().st_size


def test_damage_inside_a_record_costs_that_record_alone(warc: Path) -> None:
    whole, _ = records_of(warc)
    content = bytearray(warc.read_bytes())
    if warc.suffix == ".gz":
        content[whole[2].offset + whole[2].length // 2] ^= 0xFF
    else:
        content[whole[2].offset : whole[2].offset + 8] = b"GARBAGE!"
    warc.write_bytes(content)
    records, damaged = records_of(warc)
    assert records == whole[:2] + whole[3:]
    assert [(d.offset, d.length) for d in damaged] == [(whole[2].offset, whole[2].length)]


def test_cut_file_costs_its_last_record(warc: Path) -> None:
    whole, _ = records_of(warc)
    warc.write_bytes(warc.read_bytes()[:-40])
    records, damaged = records_of(warc)
    assert records == whole[:-1]
    assert [d.offset for d in damaged] == [whole[-1].offset]


def test_garbage_between_members_is_counted_and_passed(tmp_path: Path) -> None:
    path = tmp_path / "c.warc.gz"
    write_warc(path, seed=3, number=NUMBER)
    whole, _ = records_of(path)
    content = path.read_bytes()
    at = whole[3].offset
    path.write_bytes(content[:at] + b"\x1f\x8b\x08 no member" + content[at:])
    records, (damaged,) = records_of(path)
    assert [r.record_id for r in records] == [r.record_id for r in whole]
    assert (damaged.offset, damaged.length) == (at, 13)


@pytest.mark.parametrize("keep_bytes", [0, 1 << 20], ids=["inflated twice", "kept"])
def test_one_member_with_all_records_is_read(
    keep_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan, "__defaults__", (keep_bytes,))
    plain = tmp_path / "c.warc"
    write_warc(plain, seed=3, number=NUMBER, gzip=False)
    packed = tmp_path / "c.warc.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes(), mtime=0))
    records, damaged = records_of(packed)
    assert len(records) == NUMBER
    assert not damaged


@pytest.mark.parametrize("content", [b"", b"<html>not a crawl</html>"])
def test_what_is_no_warc_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "c.warc"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"c\.warc"):
        list(read_warc(path))


@pytest.mark.parametrize("damage", [b"Content-Length: 99999999", b"Content-Length: 00000001"])
@pytest.mark.parametrize("packed", [True, False])
def test_a_wrong_length_inside_costs_its_record(
    damage: bytes, packed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan, "__defaults__", (0,))
    path = tmp_path / "c.warc"
    write_warc(path, seed=3, number=NUMBER, gzip=False)
    whole, _ = records_of(path)
    content = path.read_bytes()
    at = content.index(b"Content-Length: ", whole[2].offset)
    end = content.index(b"\r\n", at)
    content = content[:at] + damage + content[end:]
    if packed:
        path = tmp_path / "c.warc.gz"
        content = gzip.compress(content, mtime=0)
    path.write_bytes(content)
    records, damaged = records_of(path)
    assert [r.record_id for r in records] == [r.record_id for r in whole[:2] + whole[3:]]
    assert len(damaged) == 1


def test_a_record_is_found_again_where_its_line_break_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "c.warc"
    write_warc(path, seed=3, number=NUMBER, gzip=False)
    whole, _ = records_of(path)
    content = bytearray(path.read_bytes())
    content[whole[3].offset - 30 : whole[3].offset] = bytes(30)
    path.write_bytes(content)
    records, damaged = records_of(path)
    assert records == whole[:2] + whole[3:]
    assert [(d.offset, d.length) for d in damaged] == [(whole[2].offset, whole[2].length)]


def test_a_body_that_inflates_without_end_is_counted_and_not_kept(tmp_path: Path) -> None:
    body = gzip.compress(bytes(3 << 20))
    http = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Encoding: gzip\r\n\r\n" + body
    header = (
        b"WARC/1.0\r\nWARC-Type: response\r\nWARC-Record-ID: <urn:bomb>\r\n"
        b"Content-Type: application/http; msgtype=response\r\nContent-Length: %d\r\n\r\n"
    )
    path = tmp_path / "c.warc"
    path.write_bytes(header % len(http) + http + b"\r\n\r\n")
    (damaged,) = read_warc(path, max_record_bytes=1 << 20)
    assert isinstance(damaged, Damaged)
    assert damaged.reason == "body inflates to more than max_record_bytes=1048576"
    (record,) = read_warc(path, max_record_bytes=4 << 20)
    assert isinstance(record, Record)
    assert len(record.payload) == 3 << 20
