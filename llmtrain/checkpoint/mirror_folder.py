"""The folder of copies on another file system, through fsspec: what is there, comes and goes.

Invariant: a copy is there as long as its ``meta.json`` is, which arrives last, whole, and goes
first. What cannot be reached raises; it is never taken for something that is not there.

    folder = MirrorFolder("s3://bucket/runs/demo")
    folder.put(run.checkpoints / "step-000000100")
    folder.metas()                      # of the copies that are there, by step
"""

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from blake3 import blake3

from llmtrain.checkpoint import archive
from llmtrain.errors import CheckpointError, ConfigError

logger = logging.getLogger(__name__)


class MirrorFolder:
    """Copies of checkpoints, and of files that lie beside them, in one folder."""

    def __init__(self, url: str) -> None:
        """Use the folder ``url``; raises ConfigError where fsspec or a package does not know it."""
        self.url = url.rstrip("/")
        self._files, self._root = _open(self.url)
        self._atomic = "file" not in self._files.protocol

    def steps(self) -> list[int]:
        """Steps that have a folder, of a whole copy or not."""
        self._files.invalidate_cache(self._root)
        try:
            found = self._files.ls(self._root, detail=False)
        except FileNotFoundError:
            return []
        names = (str(path).rstrip("/").rpartition("/")[2] for path in found)
        return sorted(step for name in names if (step := archive.step_of(name)) is not None)

    def metas(self) -> dict[int, dict[str, Any]]:
        """``meta.json`` of every copy by step; empty where one cannot be understood."""
        found = {}
        for step in self.steps():
            content = self._content(f"{self._at(step)}/{archive.META}")
            if content is not None:
                found[step] = _parsed(content)
        return found

    def put(self, path: Path, go_on: Callable[[], None] = lambda: None) -> None:
        """Copy a checkpoint; of one whose files are there, ``meta.json`` alone where it differs.

        ``go_on`` is called between files and may raise.
        """
        meta = archive.read_meta(path)
        there = self._at(meta["step"])
        held = self._content(f"{there}/{archive.META}")
        if held is None or not self.renew(path, _parsed(held)):
            if meta["step"] in self.steps():  # not every store lets one delete
                self.remove(meta["step"])
            self._files.makedirs(there, exist_ok=True)
            for name in sorted(meta["files"]):
                go_on()
                self._files.put_file(str(path / name), f"{there}/{name}")
            go_on()
            self._put_whole(path / archive.META, f"{there}/{archive.META}")

    def renew(self, path: Path, held: Mapping[str, Any]) -> bool:
        """Replace the ``meta.json`` that is ``held`` by that of ``path``, if the files are equal.

        Whether they are.
        """
        new = archive.read_meta(path)
        if held.get("files") != new["files"]:
            return False
        if held != new:
            self._put_whole(path / archive.META, f"{self._at(new['step'])}/{archive.META}")
        return True

    def get(self, step: int, aside: Path) -> None:
        """Bring the files of a copy to the folder ``aside``.

        Raises:
            CheckpointError: a file is not there, or ``meta.json`` is damaged.
        """
        there = self._at(step)

        def bring(name: str) -> None:
            try:
                self._files.get_file(f"{there}/{name}", str(aside / name))
            except FileNotFoundError as error:
                raise CheckpointError(
                    f"{archive.folder_name(step)} is damaged: {self.url} has no {name} of it"
                ) from error

        bring(archive.META)
        with ThreadPoolExecutor(max_workers=4) as pool:
            list(pool.map(bring, sorted(archive.read_meta(aside)["files"])))

    def remove(self, step: int) -> None:
        """Delete a copy, or what there is of one."""
        there = self._at(step)
        with suppress(FileNotFoundError):
            self._files.rm_file(f"{there}/{archive.META}")
        with suppress(FileNotFoundError):
            self._files.rm(there, recursive=True)

    def set_aside(self, step: int, meta: Mapping[str, Any]) -> None:
        """Move a copy with this ``meta.json`` to a name by which no copy is found."""
        there = self._at(step)
        aside = f"{self._root}/{archive.DAMAGED}{archive.folder_name(step)}"
        with suppress(FileNotFoundError):
            self._files.rm(aside, recursive=True)
        self._files.makedirs(aside, exist_ok=True)
        for name in (archive.META, *meta.get("files", ())):
            with suppress(FileNotFoundError):
                self._files.mv(f"{there}/{name}", f"{aside}/{name}")
        self.remove(step)

    def put_beside(self, path: Path) -> None:
        """Copy a file of the run's folder under the name it has there, unless it is there."""
        there = f"{self._root}/{path.parent.name}"
        if self._content(f"{there}/{path.name}") != path.read_bytes():
            self._files.makedirs(there, exist_ok=True)
            self._put_whole(path, f"{there}/{path.name}")

    def get_beside(self, path: Path, digest: str) -> bool:
        """Bring such a file back; whether there is one with this blake3."""
        content = self._content(f"{self._root}/{path.parent.name}/{path.name}")
        if content is None or blake3(content).hexdigest() != digest:
            return False
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".tmp-{path.name}")
        beside.write_bytes(content)
        beside.replace(path)
        logger.info("%s came from %s", path, self.url)
        return True

    def _at(self, step: int) -> str:
        return f"{self._root}/{archive.folder_name(step)}"

    def _content(self, path: str) -> bytes | None:
        """Bytes of a small file; None where there is none."""
        try:
            return bytes(self._files.cat_file(path))
        except FileNotFoundError:
            return None

    def _put_whole(self, path: Path, there: str) -> None:
        """Copy a file so that its name never stands for a part of it, as in object stores."""
        beside = there if self._atomic else f"{there}.part"
        self._files.put_file(str(path), beside)
        if not self._atomic:
            self._files.mv(beside, there)


def _parsed(content: bytes) -> dict[str, Any]:
    try:
        return archive.parse_meta(content, "")
    except CheckpointError:
        return {}


def _open(url: str) -> tuple[Any, str]:
    try:
        import fsspec

        files, root = fsspec.url_to_fs(url)
    except ImportError as error:
        raise ConfigError(
            f"checkpoint.mirror={url} needs a package that is not installed ({error}); run "
            "`pip install 'llmtrain[mirror]'` and the package of the address's protocol, as s3fs, "
            "gcsfs or adlfs"
        ) from None
    except ValueError as error:
        raise ConfigError(
            f"checkpoint.mirror={url} cannot be reached ({error}); use an address fsspec knows, "
            "such as s3://BUCKET/DIR, gs://BUCKET/DIR or file:///DIR"
        ) from None
    return files, str(root).rstrip("/")
