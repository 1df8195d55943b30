"""A damaged folder or a full disk is one sentence and status 2, and nothing is overwritten."""

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipeline.cli import main
from tests.crawl import write_crawl

SETTINGS = [
    "pipeline=demo", "pipeline.stages=[url,exact]", "pipeline.extract.shard_bytes=20000",
    "pipeline.tokenizer.vocab_size=400", "pipeline.split.validation_share=0.1",
]  # fmt: skip


def configure(crawl: Path, out: Path) -> list[str]:
    inputs = [f"input.{name}={crawl / name}" for name in ("north", "south")]
    return ["run", *SETTINGS, *inputs, f"out={out}"]


def digests(out: Path) -> dict[str, str]:
    """Digest of every file below a folder."""
    files = [p for p in out.rglob("*") if p.is_file()]
    return {str(p.relative_to(out)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="module")
def crawl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("crawl")
    write_crawl(folder, pages_per_file=15)
    return folder


@pytest.fixture(scope="module")
def finished(crawl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "out"
    assert main(configure(crawl, out)) == 0
    return out


@pytest.fixture
def out(finished: Path, tmp_path: Path) -> Path:
    """A copy of a finished folder."""
    return shutil.copytree(finished, tmp_path / "out")


def refused(command: list[str], out: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that has to be refused; returns what it says."""
    before = digests(out)
    capsys.readouterr()
    status = main(command)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert status == 2
    assert len(said) == 1
    assert digests(out) == before
    return said[0]


def first(out: Path, pattern: str) -> Path:
    return sorted(out.glob(pattern))[0]


def remove(path: Path) -> None:
    path.unlink()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("stage", ["00-extract", "*-exact"])
@pytest.mark.parametrize("damage", [remove, cut])
def test_missing_or_cut_shard(
    stage: str, damage: Callable[[Path], None], crawl: Path, out: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    victim = first(out, f"stages/{stage}/documents/*")
    damage(victim)
    said = refused(configure(crawl, out), out, capsys)
    assert f"{victim} is missing or cut; remove {victim.parent.parent} to make it again" in said


@pytest.mark.parametrize("damage", [remove, cut, flip])
def test_shard_damaged_while_the_next_stage_is_at_work(
    damage: Callable[[Path], None], crawl: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The stage that reads it has not begun: what it needs is checked before it is used."""
    split = first(out, "stages/*-split")
    for folder in (split, *out.glob("stages/*-tok*"), out / "stores", out / "tokenizer"):
        shutil.rmtree(folder)
    victim = first(out, "stages/*-exact/documents/*")
    damage(victim)
    capsys.readouterr()
    assert main(configure(crawl, out)) == 2
    said = capsys.readouterr().err
    assert f"error: {victim} is" in said
    assert not (split / "manifest.json").exists()


@pytest.mark.parametrize("stage", ["00-extract", "*-exact", "*-tokenize"])
def test_deleted_manifest(
    stage: str, crawl: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = first(out, f"stages/{stage}/manifest.json")
    manifest.unlink()
    said = refused(configure(crawl, out), out, capsys)
    assert f"{manifest.parent} holds files but no manifest.json" in said


@pytest.mark.parametrize("name", ["stages/*-exact/manifest.json", "pipeline.json"])
def test_damaged_manifest(
    name: str, crawl: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    victim = first(out, name)
    cut(victim)
    assert f"{victim} is damaged" in refused(configure(crawl, out), out, capsys)


def test_changed_setting(crawl: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [*configure(crawl, out), "pipeline.split.validation_share=0.2"]
    said = refused(command, out, capsys)
    assert "split.validation_share was 0.1, is 0.2; use another out=" in said


def test_changed_input(finished: Path, crawl: Path, out: Path, tmp_path: Path,
                       capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    other = shutil.copytree(crawl, tmp_path / "crawl")
    warc = first(other, "south/*")
    warc.write_bytes(warc.read_bytes() + b"\n")
    shutil.rmtree(out)
    shutil.copytree(finished, out)
    command = configure(other, out)
    (out / "inputs.json").unlink()
    capsys.readouterr()
    assert main(command) == 2
    assert f"input {warc.name} (" in capsys.readouterr().err
    changed = {k for k, v in digests(out).items() if digests(finished).get(k) != v}
    assert changed == {"inputs.json"}


def test_input_that_went_away(crawl: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused([*configure(crawl, out), "input.north=nowhere"], out, capsys)
    assert "nowhere" in said


def in_own_mounts(script: str, *words: str) -> "subprocess.CompletedProcess[str]":
    """Run a script that may mount what nobody else sees."""
    tool = ["unshare", "--mount", *([] if os.getuid() == 0 else ["--map-root-user"])]
    return subprocess.run(
        [*tool, "bash", "-c", script, "bash", *words], capture_output=True, text=True, timeout=120
    )  # fmt: skip


def may_mount() -> bool:
    return in_own_mounts("mount -t tmpfs none /mnt").returncode == 0


needs_mounts = pytest.mark.skipif(not may_mount(), reason="this user may not mount a tmpfs")

FULL = """
folder=$1 size=$2; shift 2
mount -t tmpfs -o size=$size none "$folder" || exit 9
"$@"; first=$?
mount -o remount,size=64m "$folder" || exit 9
"$@" > /dev/null 2>&1; second=$?
cd "$folder/out" && find . -type f -name '*.parquet' -print0 | sort -z | xargs -0 sha256sum
echo "status $first $second"
"""


@needs_mounts
def test_full_disk(crawl: Path, finished: Path, tmp_path: Path) -> None:
    """The same command goes on once there is room, and the bytes come out the same."""
    command = [sys.executable, "-m", "data_pipeline", *configure(crawl, tmp_path / "out")]
    done = in_own_mounts(FULL, str(tmp_path), "400k", *command)
    *lines, statuses = done.stdout.splitlines()
    assert statuses == "status 2 0", done.stderr
    assert "No space left on device; free some space and give the same command again" in done.stderr
    assert "Traceback" not in done.stderr
    made = {name.removeprefix("./"): digest for digest, name in map(str.split, lines)}
    wanted = {k: v for k, v in digests(finished).items() if k.endswith(".parquet")}
    assert made == wanted


READ_ONLY = """
folder=$1; shift
mount --bind "$folder" "$folder" && mount -o remount,bind,ro "$folder" || exit 9
"$@"
"""


@needs_mounts
def test_read_only_folder(crawl: Path, out: Path) -> None:
    before = digests(out)
    shutil.rmtree(first(out, "stages/*-tokenize"))
    command = [sys.executable, "-m", "data_pipeline", *configure(crawl, out)]
    done = in_own_mounts(READ_ONLY, str(out), *command)
    assert done.returncode == 2, done.stderr
    assert "Read-only file system; give a folder that can be written" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert digests(out).items() <= before.items()
