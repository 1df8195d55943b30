"""What a task hands back and what a finished stage says: counts that balance, files, digests.

The bytes of a manifest tell no time and no place, so that equal work gives equal manifests. Counts
are made where documents are read and where they are written, and have to agree:
documents in = kept + dropped + quarantined; characters out = in - dropped - deleted + inserted.

    counts.check("02-c4")  # raises ConservationError
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from data_pipeline.shards import Shard
from llmtrain.errors import DataError


class ConservationError(RuntimeError):
    """A stage lost or invented documents, text or tokens: a fault of the pipeline."""


@dataclass(kw_only=True)
class Counts:
    """What went in and came out of a task or a stage; they add up."""

    documents_in: int = 0
    """Documents read."""
    documents_out: int = 0
    """Documents that go on."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Documents dropped, by reason."""
    quarantined: dict[str, int] = field(default_factory=dict)
    """Records that could not be read, by reason."""
    characters_in: int = 0
    """Characters of the documents read."""
    characters_out: int = 0
    """Characters of the documents that go on."""
    characters_dropped: int = 0
    """Characters of the documents dropped, as they came in."""
    deleted: dict[str, int] = field(default_factory=dict)
    """Characters deleted from documents that go on, by rule."""
    inserted: int = 0
    """Characters the rules put in."""
    bytes_in: int = 0
    """UTF-8 bytes of the documents read."""
    bytes_out: int = 0
    """UTF-8 bytes of the documents that go on."""
    tokens: int = 0
    """Tokens written."""

    def add(self, other: "Counts") -> None:
        """Add another's numbers to these."""
        for name in _COUNTED:
            value = getattr(other, name)
            if isinstance(value, dict):
                mine = getattr(self, name)
                for key, number in value.items():
                    mine[key] = mine.get(key, 0) + number
            elif value:
                setattr(self, name, getattr(self, name) + value)

    def check(self, stage: str) -> None:
        """Raise ConservationError unless documents and characters balance."""
        out = self.documents_out + sum(self.dropped.values()) + sum(self.quarantined.values())
        if self.documents_in != out:
            raise ConservationError(
                f"{stage}: {self.documents_in} documents in, but {self.documents_out} kept + "
                f"{sum(self.dropped.values())} dropped + {sum(self.quarantined.values())} "
                f"quarantined = {out}"
            )
        kept = self.characters_in - self.characters_dropped
        left = kept - sum(self.deleted.values()) + self.inserted
        if self.characters_out != left:
            raise ConservationError(
                f"{stage}: {self.characters_out} characters out, but {kept} kept - "
                f"{sum(self.deleted.values())} deleted + {self.inserted} inserted = {left}"
            )

    def sorted(self) -> dict[str, Any]:
        """The numbers as JSON-able values, reasons in alphabetical order."""
        return {
            name: dict(sorted(value.items())) if isinstance(value, dict) else value
            for name, value in asdict(self).items()
        }


_COUNTED = tuple(entry.name for entry in fields(Counts))


@dataclass(kw_only=True)
class TaskResult:
    """What a task hands to the driver, next to the files it wrote."""

    shards: list[Shard] = field(default_factory=list)
    """Documents that go on."""
    dropped: list[Shard] = field(default_factory=list)
    """Documents that stop here."""
    files: dict[str, str] = field(default_factory=dict)
    """Further files worth keeping: name -> digest."""
    work: dict[str, int] = field(default_factory=dict)
    """Files that only the stage itself needs: name -> bytes."""
    counts: Counts = field(default_factory=Counts)
    """What went in and out."""
    details: dict[str, Any] = field(default_factory=dict)
    """Anything else, JSON-able."""

    @property
    def names(self) -> list[str]:
        """Every file, below the stage's target."""
        shards = [Path(shard.path).parts[2:] for shard in (*self.shards, *self.dropped)]
        return [*(str(Path(*parts)) for parts in shards), *self.files, *self.work]

    def stands_in(self, folder: Path) -> bool:
        """Whether every file is in ``folder`` with the size it was written with."""
        shards = [shard.size for shard in (*self.shards, *self.dropped)]
        sizes = [*shards, *(None for _ in self.files), *self.work.values()]
        paths = [folder / name for name in self.names]
        return all(
            path.is_file() and size in (None, path.stat().st_size)
            for path, size in zip(paths, sizes, strict=True)
        )

    def as_dict(self) -> dict[str, Any]:
        """JSON-able values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "TaskResult":
        """The inverse of ``as_dict``."""
        return cls(
            shards=[Shard(**s) for s in values["shards"]],
            dropped=[Shard(**s) for s in values["dropped"]],
            files=dict(values["files"]),
            work=dict(values["work"]),
            counts=Counts(**values["counts"]),
            details=dict(values["details"]),
        )


@dataclass(kw_only=True)
class Manifest:
    """What a finished stage says about itself; its bytes tell no time and no place."""

    stage: str
    key: str
    settings: dict[str, Any]
    code: dict[str, Any]
    source: str
    inputs: list[dict[str, Any]]
    shards: list[Shard]
    dropped: list[Shard]
    files: dict[str, str]
    counts: Counts
    details: dict[str, Any]

    def to_json(self) -> str:
        """Canonical text of the manifest."""
        values = asdict(self)
        values["counts"] = self.counts.sorted()
        return json.dumps(values, indent=1, sort_keys=True, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Manifest":
        """The inverse of ``to_json``."""
        values = json.loads(text)
        values["shards"] = [Shard(**s) for s in values["shards"]]
        values["dropped"] = [Shard(**s) for s in values["dropped"]]
        values["counts"] = Counts(**values["counts"])
        return cls(**values)

    @classmethod
    def read(cls, path: Path) -> "Manifest":
        """Read a manifest.

        Raises:
            DataError: it is damaged.
        """
        try:
            return cls.from_json(path.read_text(encoding="utf-8"))
        except (ValueError, KeyError, TypeError):
            raise DataError(
                f"{path} is damaged; put it back, or remove {path.parent} to make it again"
            ) from None
