"""A copy of every checkpoint on another file system: an object store, or any other of fsspec.

Invariant: it is made behind the training, of what is committed here; ``meta.json`` arrives last, so
that a copy that was cut short does not exist; what comes back is checked like any checkpoint.

    mirror = Mirror("s3://bucket/runs/demo", keep)
    mirror.start(path)                  # in a thread of its own; of several, the newest is next
    mirror.fetch(run.checkpoints)       # None where the mirror holds none
"""

import json
import logging
import shutil
import threading
from pathlib import Path
from typing import Any

from llmtrain.checkpoint import archive
from llmtrain.checkpoint.retention import Keep
from llmtrain.config.training import CheckpointConfig
from llmtrain.errors import CheckpointError, ConfigError

logger = logging.getLogger(__name__)


class Mirror:
    """The folder of copies; used by one rank."""

    def __init__(self, url: str, keep: Keep) -> None:
        """Copy to the folder ``url`` and keep there what ``keep`` says.

        Raises:
            ConfigError: a package is missing, or fsspec does not know the address.
        """
        self._url, self._keep = url.rstrip("/"), keep
        self._files, self._root = _open(self._url)
        self._lock = threading.Lock()
        self._next: Path | None = None
        self._at: Path | None = None
        self._thread: threading.Thread | None = None

    @classmethod
    def of(cls, config: CheckpointConfig) -> "Mirror | None":
        """The mirror of a configuration, if it has one; raises ConfigError."""
        return None if config.mirror is None else cls(config.mirror, Keep.of(config))

    def start(self, path: Path) -> list[Path]:
        """Copy a checkpoint behind the training; gives those that are still needed here."""
        with self._lock:
            busy = [path] if self._thread is None or self._at is None else [path, self._at]
            self._next = path
            if self._thread is None:
                self._at = path
                self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)
                self._thread.start()
            return busy

    def wait(self) -> None:
        """Wait until the newest one is there, or could not be copied."""
        if (thread := self._thread) is not None:
            logger.info("waiting for %s to have the newest checkpoint", self._url)
            thread.join()

    def fetch(self, directory: Path) -> archive.Checkpoint | None:
        """Bring the newest whole copy to ``directory``; None where there is none.

        Raises:
            CheckpointError: the mirror cannot be read, or none of its copies is whole.
        """
        problems = []
        try:
            for step in sorted(self._steps(), reverse=True):
                try:
                    return self._bring(step, directory)
                except CheckpointError as error:
                    problems.append(str(error))
        except OSError as error:
            raise CheckpointError(
                f"{self._url} cannot be read ({error}); check network, credentials and address, or "
                "use checkpoint.mirror=null to start from the first step"
            ) from error
        if problems:
            raise CheckpointError(f"no checkpoint in {self._url} is whole: {'; '.join(problems)}")
        return None

    def _run(self) -> None:
        while True:
            with self._lock:
                if self._next is None:
                    self._thread = None
                    return
                path, self._next = self._next, None
                self._at = path
            try:
                self._put(path)
                self._retire()
                logger.info("%s has %s", self._url, path.name)
            except Exception as error:  # each file system has its own; training goes on
                logger.warning(
                    "%s has no copy of %s (%s); the next checkpoint is tried again",
                    self._url, path.name, error,
                )  # fmt: skip

    def _put(self, path: Path) -> None:
        there = f"{self._root}/{path.name}"
        if self._files.exists(there):
            self._files.rm(there, recursive=True)
        self._files.makedirs(there, exist_ok=True)
        names = sorted((file.name for file in path.iterdir()), key=lambda n: (n == archive.META, n))
        for name in names:
            self._files.put_file(str(path / name), f"{there}/{name}")

    def _bring(self, step: int, directory: Path) -> archive.Checkpoint:
        aside = archive.fresh_aside(directory, step)
        there = f"{self._root}/{archive.folder_name(step)}"
        logger.info("fetching %s from %s", archive.folder_name(step), self._url)
        for name in self._names(there):
            self._files.get_file(f"{there}/{name}", str(aside / name))
        try:
            archive.open_checkpoint(aside)
        except CheckpointError:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        final = directory / archive.folder_name(step)
        archive.install(aside, final)
        return archive.open_checkpoint(final)

    def _steps(self) -> list[int]:
        """Steps of the copies that are there to the end."""
        return [step for step in self._folders() if self._whole(step)]

    def _folders(self) -> list[int]:
        try:
            names = self._names(self._root)
        except FileNotFoundError:
            return []
        return [step for name in names if (step := archive.step_of(name)) is not None]

    def _whole(self, step: int) -> bool:
        path = f"{self._root}/{archive.folder_name(step)}/{archive.META}"
        return bool(self._files.exists(path))

    def _names(self, folder: str) -> list[str]:
        self._files.invalidate_cache(folder)
        found = self._files.ls(folder, detail=False)
        return [str(path).rstrip("/").rpartition("/")[2] for path in found]

    def _retire(self) -> None:
        """Delete copies that the rule does not keep, and those cut short."""
        folders = self._folders()
        whole = [step for step in folders if self._whole(step)]
        scores = {s: v for s in whole if (v := self._score(s)) is not None}
        for step in set(folders) - self._keep.kept(whole, scores):
            self._files.rm(f"{self._root}/{archive.folder_name(step)}", recursive=True)

    def _score(self, step: int) -> float | None:
        if not self._keep.best:
            return None
        path = f"{self._root}/{archive.folder_name(step)}/{archive.META}"
        score: Any = json.loads(self._files.cat_file(path)).get("scores", {}).get(self._keep.metric)
        return None if score is None else float(score)


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
