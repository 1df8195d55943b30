"""The data pipeline from WARC files to token stores: same bytes, nothing lost, all traced."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest

from data_pipeline.config.run import RunConfig
from data_pipeline.execute.local import LocalExecutor
from data_pipeline.pipeline import run_pipeline
from data_pipeline.read.extract import Extracted, payload_text
from data_pipeline.read.warc import Record, read_member
from data_pipeline.shards import Shard, read_documents
from data_pipeline.stages import Context
from llmtrain.config.load import load
from llmtrain.data.lineage import read_records
from llmtrain.data.store import TokenStore, verify
from llmtrain.errors import ConfigError, DataError
from llmtrain.tokenizer.tokenizer import load as load_tokenizer
from tests.crawl import write_crawl, write_warc

SETTINGS = [
    "pipeline=demo", "pipeline.extract.shard_bytes=50000", "pipeline.tokenizer.vocab_size=400",
    "pipeline.split.validation_share=0.1", "pipeline.store.part_bytes=30000",
]  # fmt: skip


def configure(inputs: dict[str, str], out: Path, *more: str) -> RunConfig:
    given = [f"input.{name}={path}" for name, path in inputs.items()]
    return load("data_run", [*SETTINGS, *given, f"out={out}", *more], RunConfig)


def run(config: RunConfig, num_workers: int) -> Path:
    with LocalExecutor(num_workers, time_limit_s=120) as executor:
        run_pipeline(config, Context(out=Path(config.out), executor=executor))
    return Path(config.out)


def digests(out: Path) -> dict[str, str]:
    """Digest of every file that is not about time, below a pipeline's folder."""
    aside = {"timing.json", "funnel.json", "inputs.json", "report.html", "data_card.json"}
    files = [p for p in out.rglob("*") if p.is_file() and p.name not in aside]
    return {str(p.relative_to(out)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def manifest_of(out: Path, stage: str) -> dict[str, object]:
    (path,) = out.glob(f"stages/*-{stage}/manifest.json")
    content: dict[str, object] = json.loads(path.read_text())
    return content


@pytest.fixture(scope="module")
def crawl(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_crawl(tmp_path_factory.mktemp("crawl"))


@pytest.fixture(scope="module")
def reference(crawl: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(configure(crawl, tmp_path_factory.mktemp("one") / "out"), num_workers=1)


def test_every_rule_has_work(reference: Path) -> None:
    rows = {
        row["stage"]: row for row in json.loads((reference / "funnel.json").read_text())["stages"]
    }
    for stage in ("00-extract", "01-url", "02-c4", "03-line_dedup", "04-language", "06-minhash"):
        assert rows[stage]["dropped"], stage
    assert rows["02-c4"]["deleted"]
    assert rows["03-line_dedup"]["deleted"]
    assert rows["09-tokenize"]["tokens"] > 0


def test_stages_hand_on_what_they_keep(reference: Path) -> None:
    manifests = [
        json.loads(p.read_text()) for p in sorted(reference.glob("stages/*/manifest.json"))
    ]
    chain = [m["counts"] for m in manifests if m["stage"] != "08-tokenizer"]
    for before, after in pairwise(chain):
        assert before["documents_out"] == after["documents_in"]
        assert before["characters_out"] == after["characters_in"]
        assert before["bytes_out"] == after["bytes_in"]
    stores = [verify(p.parent) for p in sorted(reference.glob("stores/*/*/manifest.json"))]
    assert sum(store.num_tokens for store in stores) == chain[-1]["tokens"]
    assert sum(store.num_documents for store in stores) == chain[-1]["documents_out"]


def test_two_workers_write_the_same_bytes(
    reference: Path, crawl: dict[str, str], tmp_path: Path
) -> None:
    out = run(configure(crawl, tmp_path / "out"), num_workers=2)
    assert digests(out) == digests(reference)


def test_same_bytes_after_kills_of_workers_and_of_the_driver(
    reference: Path, crawl: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    inputs = [f"input.{name}={path}" for name, path in crawl.items()]
    command = [sys.executable, "-m", "data_pipeline", "run", *SETTINGS, *inputs, f"out={out}"]
    for awaited in ("stages/00-extract/tasks", "stages/03-line_dedup/tasks", "stages/06-minhash"):
        driver = subprocess.Popen([*command, "num_workers=2"], stderr=subprocess.DEVNULL)
        wait_for(out / awaited, driver)
        driver.kill()
        assert driver.wait() == -signal.SIGKILL
    driver = subprocess.Popen([*command, "num_workers=2"], stderr=subprocess.PIPE, text=True)
    killed = kill_a_worker(driver)
    _, messages = driver.communicate(timeout=120)
    assert driver.returncode == 0, messages
    assert killed
    assert digests(out) == digests(reference)


def wait_for(path: Path, driver: "subprocess.Popen[bytes]") -> None:
    while not path.exists():
        assert driver.poll() is None, f"the driver ended before {path} was there"
        time.sleep(0.002)


def kill_a_worker(driver: "subprocess.Popen[str]") -> bool:
    """Kill the first process that the driver's fork server has started."""
    while driver.poll() is None:
        for child in children(driver.pid):
            for worker in children(child):
                os.kill(worker, signal.SIGKILL)
                return True
        time.sleep(0.002)
    return False


def children(pid: int) -> list[int]:
    try:
        found = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except FileNotFoundError:
        return []
    return [int(child) for child in found.split()]


def test_second_run_makes_nothing(reference: Path, crawl: dict[str, str]) -> None:
    before = {p: p.stat().st_mtime_ns for p in reference.glob("stages/*/manifest.json")}
    before |= {p: p.stat().st_mtime_ns for p in reference.glob("stores/**/*.bin")}
    run(configure(crawl, reference), num_workers=1)
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_another_setting_is_refused_by_name(reference: Path, crawl: dict[str, str]) -> None:
    config = configure(crawl, reference, "pipeline.split.validation_share=0.2")
    with pytest.raises(ConfigError, match=r"split\.validation_share was 0\.1, is 0\.2"):
        run(config, num_workers=1)


def test_damaged_shard_is_refused(crawl: dict[str, str], tmp_path: Path) -> None:
    out = run(configure(crawl, tmp_path / "out", "pipeline.stages=[url]"), num_workers=2)
    victim = sorted(out.glob("stages/01-url/documents/*"))[0]
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    shutil.rmtree(out / "stages/02-split")
    with pytest.raises(DataError, match=f"{victim.name} is damaged"):
        run(configure(crawl, out, "pipeline.stages=[url]"), num_workers=1)


def test_every_document_leads_back_to_its_record(reference: Path, crawl: dict[str, str]) -> None:
    extracted = documents_of(reference, "extract")
    final = documents_of(reference, "split")
    tokenizer = load_tokenizer(reference / "tokenizer")
    files = {
        hashlib.sha256(path.read_bytes()).hexdigest(): path
        for folder in crawl.values()
        for path in Path(folder).iterdir()
    }
    seen = 0
    for manifest in sorted(reference.glob("stores/*/*/manifest.json")):
        store = TokenStore.open(manifest.parent)
        parts = sorted(manifest.parent.glob("*.docs.parquet"))
        records = [record for part in parts for record in read_records(part)]
        for number, record in enumerate(records):
            text = final[record.id].text
            origin = extracted[record.id].text
            assert tokenizer.decode(store.document(number)[:-1].tolist()) == text
            assert record.text_bytes == len(text.encode())
            for start, extracted_start, length in record.edits:
                piece = text[start : start + length]
                assert piece == origin[extracted_start : extracted_start + length]
            (member,) = read_member(
                files[record.source_file_id], record.member_offset, record.member_length
            )
            assert isinstance(member, Record)
            again = payload_text(member.payload, member.content_type)
            assert isinstance(again, Extracted)
            assert hashlib.sha256(again.text.encode()).hexdigest() == record.extracted_sha256
            seen += 1
    assert seen == len(final) > 50
    assert any(len(document.edits) > 1 for document in final.values())


def documents_of(out: Path, stage: str) -> dict[str, object]:
    shards = [Shard(**shard) for shard in manifest_of(out, stage)["shards"]]
    return {d.id: d for shard in shards for d in read_documents(out, shard)}


@pytest.mark.parametrize("damage", ["cut", "flip"])
def test_damaged_warc_costs_one_record(damage: str, tmp_path: Path) -> None:
    victim = tmp_path / "north" / "crawl-00000.warc.gz"
    write_warc(victim, seed=0, number=60)
    content = bytearray(victim.read_bytes())
    if damage == "cut":
        members = [i for i in range(len(content)) if content[i : i + 3] == b"\x1f\x8b\x08"]
        content = content[: members[-1] + 100]
    else:
        content[len(content) // 2] ^= 0xFF
    victim.write_bytes(content)
    inputs = {"north": str(victim)}
    out = run(configure(inputs, tmp_path / "out", "pipeline.stages=[]"), num_workers=1)
    counts = manifest_of(out, "extract")["counts"]
    assert counts["quarantined"] == {"extract.unreadable": 1}
    assert counts["documents_in"] == 60
    (entry,) = (out / "stages/00-extract/quarantined").iterdir()
    found = json.loads(entry.read_text())
    assert found["file"] == victim.name
    assert 0 < found["offset"] < len(content)
