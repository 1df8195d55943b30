"""A stage: shard tasks, then one manifest, written last.

``Stage`` runs the tasks of a stage through an executor, commits what each wrote (attempt folder,
fsync, rename), remembers finished tasks, and writes ``manifest.json`` when the counts balance. The
driver may be killed at any point: the same call goes on after the last finished task and the files
come out the same. Where a task or a stage was finished twice, the first stays and the second has
to be equal. A finished stage is used again only if its key (settings, versions, digests of its
inputs) is equal; otherwise it is refused with what changed, never overwritten.

    stage = Stage(context, "01-url", settings, inputs)
    manifest = stage.finished() or stage.finish(...)
"""

import fcntl
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import blake3

from data_pipeline.attempts import attempt, check_equal, code_versions, left_behind
from data_pipeline.execute.local import Executor, Task
from data_pipeline.execute.progress import Progress
from data_pipeline.manifest import Counts, Manifest, TaskResult
from data_pipeline.shards import write_durably
from llmtrain.data.manifest import sync
from llmtrain.errors import DataError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Context:
    """Where a pipeline runs and with what."""

    out: Path
    """Folder of the pipeline."""
    executor: Executor
    """Runs the tasks."""
    progress: bool = False
    """Show a progress bar on the terminal; without, long phases log a line now and then."""


@cache
def source_digest() -> str:
    """Digest of this package's source: manifests name it, a change of it is told, not refused."""
    folder = Path(__file__).parent
    files = sorted(folder.rglob("*.py"))
    content = b"".join(str(p.relative_to(folder)).encode() + p.read_bytes() for p in files)
    return blake3.blake3(content).hexdigest(length=8)


class Stage:
    """One stage of a pipeline under ``OUT/stages/NAME``."""

    def __init__(
        self,
        context: Context,
        name: str,
        settings: Mapping[str, Any],
        inputs: Sequence[Mapping[str, Any]],
        target: Path | None = None,
    ) -> None:
        """Name the stage; ``inputs`` are {name, digest} of everything it reads.

        What tasks write goes to ``target``, by default next to the manifest.
        """
        self.context = context
        self.name = name
        self.settings = dict(settings)
        self.inputs = [dict(entry) for entry in inputs]
        self.folder = context.out / "stages" / name
        self.target = target or self.folder
        self.started = time.monotonic()
        identity = {"stage": name, "settings": self.settings, "code": code_versions()}
        text = json.dumps([identity, self.inputs], sort_keys=True, ensure_ascii=False)
        self.key = blake3.blake3(text.encode()).hexdigest(length=16)

    def finished(self) -> Manifest | None:
        """Return the manifest if the stage is done.

        Raises:
            DataError: it was made from something else, or one of its files or its manifest is gone.
        """
        path = self.folder / "manifest.json"
        if not path.is_file():
            self._check_begun()
            return None
        manifest = Manifest.read(path)
        if manifest.key != self.key:
            raise DataError(
                f"{self.folder} was made from something else: {self._difference(manifest)}; "
                f"use another out=, or remove {self.folder} and what follows it"
            )
        if manifest.source != source_digest():
            logger.warning(
                "%s was made by other source code (%s, now %s) of equal version; it stays as it is",
                self.folder, manifest.source, source_digest(),
            )  # fmt: skip
        for shard in (*manifest.shards, *manifest.dropped):
            file = self.context.out / shard.path
            if not file.is_file() or file.stat().st_size != shard.size:
                raise DataError(f"{file} is missing or cut; remove {self.folder} to make it again")
        for name in manifest.files:
            if not (self.target / name).is_file():
                raise DataError(
                    f"{self.target / name} is missing; remove {self.folder} to make it again"
                )
        self._clear_work()
        return manifest

    def _check_begun(self) -> None:
        """Raise DataError for a folder that is neither new nor that of a stage at work."""
        if not (self.folder / "tasks").is_dir() and any(self.folder.glob("*")):
            raise DataError(
                f"{self.folder} holds files but no manifest.json, so nobody can say whether they "
                f"are whole; put the manifest back, or remove {self.folder} to make it again"
            )

    def _clear_work(self) -> None:
        """Remove what only tasks needed; a driver killed here leaves it to the next one."""
        for leftover in (self.target / "attempts", self.folder / "tasks", self.folder / "work"):
            shutil.rmtree(leftover, ignore_errors=True)

    def _difference(self, manifest: Manifest) -> str:
        mine = {"settings": self.settings, "versions": code_versions()}
        other = {"settings": manifest.settings, "versions": manifest.code}
        changes = [
            f"{kind}.{key} was {theirs.get(key)!r}, is {ours.get(key)!r}"
            for kind, ours, theirs in ((k, mine[k], other[k]) for k in mine)
            for key in sorted(ours.keys() | theirs.keys())
            if ours.get(key) != theirs.get(key)
        ]
        changes += _changed_inputs(manifest.inputs, self.inputs)
        return "; ".join(changes) or "its key differs"

    def run(
        self,
        phase: str,
        function: Callable[..., TaskResult],
        jobs: Sequence[tuple[dict[str, Any], int]],
    ) -> list[TaskResult]:
        """Run one task per job (arguments, cost); return results in the order of the jobs."""
        (self.folder / "tasks").mkdir(parents=True, exist_ok=True)
        self._adopt()
        results: dict[str, TaskResult] = {}
        tasks: list[Task] = []
        for i, (arguments, cost) in enumerate(jobs):
            key = f"{phase}-{i:05d}"
            done = self._done(key)
            if done is not None:
                results[key] = done
                continue
            call = {
                "function": function, "folder": str(self.target), "key": key,
                "stage_key": self.key, "versions": code_versions(), "arguments": arguments,
            }  # fmt: skip
            tasks.append(Task(key, attempt, call, cost))
        with Progress(
            f"{self.name} {phase}", num_tasks=len(tasks), cost=sum(task.cost for task in tasks),
            terminal=self.context.progress,
        ) as progress:  # fmt: skip

            def commit(task: Task, answer: tuple[str, TaskResult]) -> None:
                folder, result = answer
                results[task.key] = self._commit(task.key, Path(folder), result)
                progress.add(task.cost, result.counts.documents_in)

            self.context.executor.run(tasks, commit)
        return [results[f"{phase}-{i:05d}"] for i in range(len(jobs))]

    def _adopt(self) -> None:
        """Commit what tasks of a driver that died have finished; clear what they have not."""
        for key, folder, result in left_behind(self.target, self.key):
            self._commit(key, folder, result)
        shutil.rmtree(self.target / "attempts", ignore_errors=True)

    def _done(self, key: str) -> TaskResult | None:
        """Return what a finished task handed back, if all it wrote still stands."""
        path = self.folder / "tasks" / f"{key}.json"
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):  # a crash of the machine may leave an empty file
            return None
        if values["key"] != self.key:
            return None
        result = TaskResult.from_dict(values["result"])
        return result if result.stands_in(self.target) else None

    def _commit(self, key: str, attempt_folder: Path, result: TaskResult) -> TaskResult:
        """Move what an attempt wrote to its place; of two attempts at a task the first one stays.

        Raises:
            DataError: both are finished and are not equal, or this machine does not see it.
        """
        before = self._done(key)
        if before is not None:
            check_equal(f"{self.name} {key}", before.as_dict(), result.as_dict())
            shutil.rmtree(attempt_folder, ignore_errors=True)
            return before
        if not attempt_folder.is_dir():
            raise DataError(
                f"{attempt_folder} was written on another machine and is not to be seen here; out= "
                "has to lie on a file system that all machines share"
            )
        for name in result.names:
            target = self.target / name
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(attempt_folder / name, target)
        record = {"key": self.key, "result": result.as_dict()}
        path = self.folder / "tasks" / f"{key}.json"
        aside = path.with_suffix(".aside")
        aside.write_text(json.dumps(record, ensure_ascii=False), encoding="utf-8")
        os.replace(aside, path)
        shutil.rmtree(attempt_folder, ignore_errors=True)
        return result

    def finish(
        self,
        results: Sequence[TaskResult],
        details: Mapping[str, Any] | None = None,
        timing: Mapping[str, Any] | None = None,
    ) -> Manifest:
        """Check that the counts balance, write the manifest, and clear what only tasks needed.

        ``details`` go into the manifest, ``timing`` beside it: it differs from run to run.
        """
        counts = Counts()
        for result in results:
            counts.add(result.counts)
        counts.check(self.name)
        manifest = Manifest(
            stage=self.name, key=self.key, settings=self.settings, code=code_versions(),
            source=source_digest(),
            inputs=self.inputs, counts=counts, details=dict(details or {}),
            shards=[shard for result in results for shard in result.shards],
            dropped=[shard for result in results for shard in result.dropped],
            files={n: d for result in results for n, d in result.files.items()},
        )  # fmt: skip
        for folder in {(self.target / name).parent for r in results for name in r.names}:
            sync(folder)
        seconds = round(time.monotonic() - self.started, 3)
        times = json.dumps({"seconds": seconds, **(timing or {})})
        replace_file(self.folder / "timing.json", times + "\n")
        path = self.folder / "manifest.json"
        if path.is_file():  # of another driver, where folders cannot be locked
            values = json.loads(path.read_text(encoding="utf-8"))
            check_equal(str(self.folder), values, json.loads(manifest.to_json()))
        else:
            replace_file(path, manifest.to_json())
        self._clear_work()
        return manifest

    def timing(self) -> dict[str, Any]:
        """What the call that finished the stage took: ``seconds`` of wall time, and parts of it."""
        path = self.folder / "timing.json"
        return dict(json.loads(path.read_text())) if path.is_file() else {}

    def seconds(self) -> float:
        """Wall time of the call that finished the stage."""
        return float(self.timing().get("seconds", 0.0))


def _changed_inputs(
    before: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]
) -> list[str]:
    """Say which inputs are others; nothing if none are."""
    pairs = [(dict(a), dict(b)) for a, b in zip(before, now, strict=False) if a != b]
    if pairs:
        (was, is_), more = pairs[0], len(pairs) - 1
        rest = f" and {more} more" if more else ""
        return [f"input {was['name']} ({was['digest']}) is {is_['name']} ({is_['digest']}){rest}"]
    if len(before) != len(now):
        return [f"it had {len(before)} inputs, now {len(now)}"]
    return []


@contextmanager
def exclusive(out: Path) -> Iterator[None]:
    """Make a folder and hold it for this process; the lock ends with the process, however it dies.

    Raises:
        DataError: another command is at work there.
    """
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(
                f"another llmtrain-data command is at work in {out}; wait for it to end, or use "
                "another out="
            ) from None
        except OSError as error:
            logger.warning("%s cannot be locked (%s); run no second command in it", out, error)
        yield


def replace_file(path: Path, text: str) -> None:
    """Write a small file so that it is either the old or the new one, whole, after any crash."""
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    write_durably(aside, text.encode())
    os.replace(aside, path)
    sync(path.parent)
