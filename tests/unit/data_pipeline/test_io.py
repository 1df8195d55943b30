"""What paths, globs, folders and addresses mean, and how files are fingerprinted."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.config.extract import FieldsConfig
from data_pipeline.document import Document
from data_pipeline.read.inputs import RawFile, find_raw_files, fingerprint, identity_of
from data_pipeline.read.pages import Page, read_pages
from data_pipeline.read.rows import read_text_file
from data_pipeline.read.storage import local_copy
from llmtrain.errors import DataError

ROWS = [{"text": f"Line one of {i}.\nLine two.", "url": f"u/{i}", "key": f"k{i}"} for i in range(3)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def test_inputs_resolve_to_sorted_files(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "c.warc.gz"):
        (tmp_path / name).write_bytes(LINES)
    (tmp_path / "notes.txt").write_text("no input")
    names = [Path(f.path).name for f in find_raw_files({"s": str(tmp_path)})]
    assert names == ["a.jsonl", "b.jsonl", "c.warc.gz"]
    files = find_raw_files({"y": f"{tmp_path}/*.jsonl", "x": (f"{tmp_path}/c.warc.gz",)})
    assert [(f.source, f.format) for f in files] == [("x", "warc"), ("y", "jsonl"), ("y", "jsonl")]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "no input given"),
        ({"s": "absent/*.warc.gz"}, "matches no file"),
        ({"s": str(Path(__file__).parents[3] / "LICENSE")}, "is of no known kind"),
        ({"s": "nosuch://bucket/*.jsonl"}, "is no address fsspec knows"),
    ],
)
def test_wrong_inputs_are_named(inputs: dict[str, str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        find_raw_files(inputs)


def test_a_folder_without_anything_to_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is a folder without files"):
        find_raw_files({"s": str(tmp_path)})
    (tmp_path / "image.png").write_bytes(b"x")
    with pytest.raises(DataError, match="holds no file that ends in one of"):
        find_raw_files({"s": str(tmp_path)})


def test_file_named_twice_is_refused(tmp_path: Path) -> None:
    path = str(tmp_path / "a.jsonl")
    Path(path).write_bytes(LINES)
    with pytest.raises(DataError, match="twice"):
        find_raw_files({"s": (path, path)})


def test_pages_that_would_have_one_address_are_refused(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "index.html").write_text(f"<p>{folder}")
    both = (str(tmp_path / "a"), str(tmp_path / "b"))
    with pytest.raises(
        DataError, match=r"a/index\.html and .*b/index\.html would have one address"
    ):
        find_raw_files({"s": both})
    assert len(find_raw_files({"s": str(tmp_path)})) == 1
    files = find_raw_files(dict(zip("xy", both, strict=True)))
    pages = [page for file in map(fingerprint, files) for page in read_pages(file, 1000)]
    assert [page.url for page in pages if isinstance(page, Page)] == [
        "file:///x/index.html", "file:///y/index.html",
    ]  # fmt: skip


def test_linked_folders_are_read_and_circles_end(tmp_path: Path) -> None:
    for folder in ("crawl/sub", "elsewhere"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "a.jsonl").write_bytes(LINES)
    (tmp_path / "crawl" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "crawl" / "sub" / "up").symlink_to(tmp_path / "crawl")
    found = [file.path for file in find_raw_files({"s": str(tmp_path / "crawl")})]
    assert found == [str(tmp_path / "crawl" / name / "a.jsonl") for name in ("linked", "sub")]


def test_names_in_manifests_hold_no_folder(tmp_path: Path) -> None:
    assert RawFile(source="s", path=str(tmp_path / "a.jsonl"), format="jsonl").name == "a.jsonl"
    assert RawFile(source="s", path="/caf\udce9.jsonl", format="jsonl").name == "caf?.jsonl"


def test_a_folder_of_pages_is_read_in_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("b/index.html", "a.md", "b/code.py", ".git/notes.txt", "b/image.png", "Z.TXT"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x" * 10)
    (group,) = find_raw_files({"s": str(tmp_path)})
    names = [str(Path(p).relative_to(tmp_path)) for p in group.members]
    assert names == ["Z.TXT", "a.md", "b/code.py", "b/index.html"]
    assert (group.format, group.size, group.name) == ("pages", 40, f"{tmp_path.name}#00000")
    monkeypatch.setattr("data_pipeline.read.inputs.GROUP_BYTES", 25)
    groups = find_raw_files({"s": str(tmp_path)})
    assert [len(g.members) for g in groups] == [2, 2]
    assert groups[1].name == f"{tmp_path.name}#00001"
    assert identity_of(groups[0]) != identity_of(groups[1])


def test_pages_beside_tables_are_left_out_of_a_folder_but_not_of_a_glob(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES)
    (tmp_path / "README.md").write_text("About these files.")
    assert [f.format for f in find_raw_files({"s": str(tmp_path)})] == ["jsonl"]
    both = find_raw_files({"s": f"{tmp_path}/*"})
    assert [f.format for f in both] == ["jsonl", "pages"]


def test_the_digest_of_a_group_tells_names_and_contents_but_not_the_place(tmp_path: Path) -> None:
    digests = []
    for folder, name, text in (("a", "x.md", "1"), ("b", "x.md", "1"), ("c", "y.md", "1"),
                               ("d", "x.md", "2")):  # fmt: skip
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text(text)
        (group,) = find_raw_files({"s": str(tmp_path / folder)})
        digests.append(fingerprint(group).sha256)
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


@pytest.fixture
def memory() -> Iterator[Any]:
    """fsspec's file system in memory, empty before and after."""
    import fsspec

    system = fsspec.filesystem("memory")
    system.store.clear()
    yield system
    system.store.clear()


def read_all(files: list[RawFile]) -> list[str]:
    items = [item for f in files for item in read_text_file(fingerprint(f), FieldsConfig())]
    return [item.text for item in items if isinstance(item, Document)]


def test_addresses_that_fsspec_opens_are_listed_and_read(memory: Any) -> None:
    for name in ("b.jsonl", "sub/a.jsonl", "notes.dat", ".hidden/c.jsonl"):
        memory.pipe(f"/crawl/{name}", LINES)
    folder = find_raw_files({"s": "memory://crawl"})
    assert [f.path for f in folder] == ["memory:///crawl/b.jsonl", "memory:///crawl/sub/a.jsonl"]
    assert read_all(folder) == [row["text"] for row in ROWS] * 2
    assert [f.name for f in find_raw_files({"s": "memory://crawl/*.jsonl"})] == ["b.jsonl"]
    (one,) = find_raw_files({"s": "memory://crawl/b.jsonl"})
    assert fingerprint(one).size == len(LINES)
    assert identity_of(one) == identity_of(one)
    with pytest.raises(DataError, match="matches no file"):
        find_raw_files({"s": "memory://crawl/*.warc"})


def test_a_remote_folder_of_pages_is_one_group(memory: Any) -> None:
    memory.pipe("/manual/a/index.html", b"<p>Text.</p>")
    memory.pipe("/manual/b.md", b"# Text")
    (group,) = find_raw_files({"s": "memory://manual"})
    assert (group.format, len(group.members), group.size) == ("pages", 2, 18)
    assert len(fingerprint(group).sha256) == 64


def test_a_remote_file_that_has_changed_is_refused(memory: Any, tmp_path: Path) -> None:
    memory.pipe("/a.jsonl", LINES)
    (file,) = map(fingerprint, find_raw_files({"s": "memory://a.jsonl"}))
    with local_copy(file.path, tmp_path, file.sha256) as path:
        assert path.read_bytes() == LINES
        assert path.parent.parent == tmp_path
    assert list(tmp_path.iterdir()) == []
    memory.pipe("/a.jsonl", LINES + LINES)
    with (
        pytest.raises(DataError, match="has changed since the run began"),
        local_copy(file.path, tmp_path, file.sha256),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.core.url_to_fs", absent)
    with pytest.raises(DataError, match="needs a package that is not installed: Install s3fs"):
        find_raw_files({"s": "s3://bucket/a.jsonl"})
