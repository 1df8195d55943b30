"""Which folder a store's path or address means, and whether its files are all there.

folder, prefix = locate("stores/wiki", cache_dir=None)   # prefix: a pair of another program
check_files(folder, manifest_of(folder))
"""

import os
from collections.abc import Iterable
from pathlib import Path

import blake3

from llmtrain.data.files import Folder, LocalFolder, StoreFile
from llmtrain.data.indexed import IndexedShard, read_header
from llmtrain.data.manifest import MANIFEST, Manifest
from llmtrain.data.shards import Shards
from llmtrain.errors import DataError

RAW_SUFFIXES = (".jsonl", ".json", ".gz", ".zst", ".parquet", ".txt", ".warc", ".arrow")
"""Endings of files that hold text, not tokens."""
_FINGERPRINT_BYTES = 1 << 20


def is_remote(path: str) -> bool:
    """Whether ``path`` is an address (``s3://``, ``file://``) that is read through a cache."""
    return "://" in path


def absolute(path: str) -> str:
    """Return a path of this machine made absolute, an address as it is."""
    return path if is_remote(path) else os.path.abspath(os.path.expanduser(path))


def locate(path: str, cache_dir: Path | str | None) -> tuple[Folder, str | None]:
    """Return the folder of a store, and the name of its pair of files where it has no manifest.

    Raises:
        DataError: there is no store, or it is remote and ``cache_dir`` is None.
    """
    if path.endswith(RAW_SUFFIXES) or any(c in path for c in "*?"):
        raise _raw_text(path, path)
    stem = path.removesuffix(".bin").removesuffix(".idx").rstrip("/")
    folder = _folder(path, cache_dir)
    if folder.has(MANIFEST):
        return folder, None
    sizes = folder.sizes()
    above, name = stem.rpartition("/")[::2]
    if not sizes and name:
        beside = _folder(above or ("/" if stem.startswith("/") else "."), cache_dir)
        if beside.has(f"{name}.idx") and beside.has(f"{name}.bin"):
            return beside, name
    if not sizes:
        raise _nothing(path)
    pairs = [n.removesuffix(".idx") for n in sorted(sizes) if n.endswith(".idx")]
    pairs = [n for n in pairs if f"{n}.bin" in sizes]
    records = [n for n in sizes if n.startswith("part-") and n.endswith(".docs.parquet")]
    if len(pairs) == 1 and not records:
        return folder, pairs[0]
    raw = sorted(n for n in sizes if n.endswith(RAW_SUFFIXES))
    if raw and not pairs and not records:
        raise _raw_text(path, f"{path}/*{''.join(Path(raw[0]).suffixes[-2:])}")
    return folder, None


def check_files(folder: Folder, manifest: Manifest) -> None:
    """Compare the files of a folder, from one listing, and their headers with its manifest.

    The headers of remote files are compared when they are first read.

    Raises:
        DataError: a file is missing, of another size or of another format.
    """
    found = folder.sizes()
    for info in manifest.shards:
        for end, size in info.sizes.items():
            name = f"{info.name}.{end}"
            if found.get(name) != size:
                raise _wrong_size(f"{folder.name}/{name}", found.get(name), size)
    if not folder.is_remote:
        for shard in Shards.listed(folder, manifest):
            shard.check_header(read_header(shard.idx_file))


def foreign_fingerprint(files: Iterable[StoreFile]) -> str:
    """Hash sizes and both ends of files: what tells two stores apart without reading them."""
    digest = blake3.blake3()
    for file in files:
        digest.update(f"{file.size}:".encode())
        digest.update(file.read(0, min(file.size, _FINGERPRINT_BYTES)))
        digest.update(file.read(max(0, file.size - _FINGERPRINT_BYTES), file.size))
    return str(digest.hexdigest())


def foreign_shard(folder: Folder, prefix: str) -> IndexedShard:
    """Open the pair of files of another program and read its whole index.

    Raises:
        DataError: it is damaged, or holds empty documents.
    """
    bin_name, idx_name, sizes = f"{prefix}.bin", f"{prefix}.idx", folder.sizes()
    folder = folder.keyed(folder.stamp([bin_name, idx_name]))
    shard = IndexedShard(
        folder.file(bin_name, sizes[bin_name]), folder.file(idx_name, sizes[idx_name])
    )
    shard.check_index()
    return shard


def _folder(path: str, cache_dir: Path | str | None) -> Folder:
    if not is_remote(path):
        return LocalFolder(Path(path))
    if cache_dir is None:
        raise DataError(
            f"{path} is read through a cache on this machine and data.cache_dir is null; set "
            "data.cache_dir to a folder on a local disk with room for the store"
        )
    from llmtrain.data.remote import RemoteFolder

    cache = Path(cache_dir)
    above = next(folder for folder in (cache, *cache.absolute().parents) if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise DataError(
            f"data.cache_dir={cache} cannot be made: {above} is no folder this process may write; "
            "set it to a folder on a local disk with room for the store"
        )
    return RemoteFolder.at(path, cache)


def _wrong_size(path: str, found: int | None, size: int) -> DataError:
    if found is None:
        return DataError(f"{path} is missing, its manifest lists it; copy or write the store again")
    return DataError(
        f"{path} holds {found:,} bytes, its manifest says {size:,}; it is damaged or still being "
        "copied: copy or write the store again"
    )


def _nothing(path: str) -> DataError:
    if is_remote(path):
        found = "does not exist or is empty"
    elif Path(path).is_dir():
        return DataError(
            f"{path} has no {MANIFEST}; the store is unfinished or no store: run the command that "
            "writes it again, it continues where it stopped"
        )
    else:
        found = "is a file" if Path(path).exists() else "does not exist"
    return DataError(
        f"{path} {found}; expected the folder of a token store or the path prefix of a "
        "Megatron .bin/.idx pair: check the path, or make it with `llmtrain-data tokenize`"
    )


def _raw_text(path: str, files: str) -> DataError:
    name = Path(path).name.split(".")[0].strip("*") or "mine"
    return DataError(
        f"{path} holds text, a source has to be a token store; make one with\n"
        f"  llmtrain-data tokenize input={files} text_field=text tokenizer=TOKENIZER "
        f"out=stores/{name}\n"
        f"and set data.sources.{name}=stores/{name}"
    )
