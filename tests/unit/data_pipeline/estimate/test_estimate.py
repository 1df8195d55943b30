"""Samples are nested and fair, and what is said of the whole holds the whole."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.config.extract import FieldsConfig
from data_pipeline.config.report import EstimateConfig
from data_pipeline.config.run import RunConfig
from data_pipeline.estimate.command import estimate
from data_pipeline.estimate.draw import NESTED, Draw, draw_samples
from data_pipeline.estimate.model import Seen, grow
from data_pipeline.execute.local import InlineExecutor
from data_pipeline.pipeline import run_pipeline
from data_pipeline.read.inputs import find_raw_files
from data_pipeline.read.warc import Record, read_warc
from data_pipeline.report.record import read_folder
from data_pipeline.stages import Context
from llmtrain.config.load import load
from llmtrain.errors import DataError
from tests.crawl import write_crawl

SETTINGS = [
    "pipeline=demo", "pipeline.tokenizer.vocab_size=400", "pipeline.stages=[url,c4,minhash]",
    "pipeline.split.validation_share=0.1",
]  # fmt: skip


@pytest.fixture(scope="module")
def crawl(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_crawl(tmp_path_factory.mktemp("estimate"), pages_per_file=50)


def draw(inputs: dict[str, str], scratch: Path, sample: float, read: float = 1.0) -> Draw:
    files = find_raw_files(inputs)
    total = sum(Path(file.path).stat().st_size for file in files)
    return draw_samples(
        files, FieldsConfig(), scratch, sample_bytes=int(sample * total),
        read_bytes=int(read * total), max_record_bytes=10_000_000,
    )  # fmt: skip


def pages_of(folder: str) -> dict[str, bytes]:
    found = {}
    for path in sorted(Path(folder).glob("*")):
        for record in read_warc(path):
            assert isinstance(record, Record)
            found[record.record_id] = record.payload
    return found


def test_samples_of_a_crawl_are_nested_and_whole(crawl: dict[str, str], tmp_path: Path) -> None:
    drawn = draw(crawl, tmp_path, sample=0.5)
    whole = pages_of(crawl["north"])
    small, middle, large = (pages_of(inputs["north"]) for inputs in drawn.inputs)
    assert small.keys() < middle.keys() < large.keys() < whole.keys()
    assert all(whole[key] == payload for key, payload in large.items())
    assert drawn.records == 200
    assert drawn.share == sum(len(pages_of(f)) for f in drawn.inputs[-1].values()) / 200
    assert 0.4 < drawn.share < 0.6


def test_every_source_has_the_same_chance_when_some_files_are_read(tmp_path: Path) -> None:
    rows = [{"text": f"line {i}"} for i in range(600)]
    for source, number in (("one", 1), ("many", 8)):
        (tmp_path / source).mkdir()
        for i in range(number):
            lines = "".join(json.dumps(row) + "\n" for row in rows[::number])
            path = tmp_path / source / f"{i}.jsonl.gz"
            path.write_bytes(gzip.compress(lines.encode(), mtime=0))
    inputs = {name: str(tmp_path / name) for name in ("one", "many")}
    drawn = draw(inputs, tmp_path / "scratch", sample=0.4, read=0.6)
    read = {s: [f for f in drawn.files if f.source == s] for s in inputs}
    assert len(read["one"]) == 1
    assert 1 <= len(read["many"]) < 8
    chosen = {s: sum(f.chosen for f in files) for s, files in read.items()}
    assert abs(chosen["one"] - chosen["many"]) < 0.25 * max(chosen.values())
    lines = Path(drawn.inputs[-1]["one"], "00000.jsonl").read_text().splitlines()
    assert len(lines) == chosen["one"]
    assert all(json.loads(line)["text"].startswith("line ") for line in lines)


def test_a_member_that_holds_a_whole_crawl_is_copied_once(
    crawl: dict[str, str], tmp_path: Path
) -> None:
    (path, *_) = sorted(Path(crawl["north"]).glob("*.warc.gz"))
    packed = tmp_path / "one.warc.gz"
    packed.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()), mtime=0))
    drawn = draw({"s": str(packed)}, tmp_path / "scratch", sample=1.0)
    (copy,) = Path(drawn.inputs[-1]["s"]).iterdir()
    assert copy.read_bytes() == packed.read_bytes()


def test_lines_are_read_up_to_the_limit_of_the_run(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "x" * 9_000_000}) + "\n")
    drawn = draw({"s": str(path)}, tmp_path / "scratch", sample=1.0)
    (copy,) = Path(drawn.inputs[-1]["s"]).iterdir()
    assert len(json.loads(copy.read_text())["text"]) == 9_000_000


def test_files_of_pages_are_copied(tmp_path: Path) -> None:
    for i in range(40):
        (tmp_path / "docs").mkdir(exist_ok=True)
        (tmp_path / "docs" / f"page-{i}.md").write_text(f"# Page {i}\n")
    drawn = draw({"docs": str(tmp_path / "docs")}, tmp_path / "scratch", sample=0.5)
    copied = sorted(Path(drawn.inputs[-1]["docs"]).iterdir())
    assert drawn.records == 40
    assert len(copied) == drawn.files[0].chosen
    assert all(path.suffix == ".md" for path in copied)


def test_empty_samples_are_refused(crawl: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the sample is empty"):
        draw(crawl, tmp_path, sample=1e-5)


def nested_samples(sizes: list[int], share: float, seed: int) -> list[Seen]:
    """What deduplication removes from nested samples of clusters of the given sizes."""
    rng = np.random.default_rng(seed)
    large = rng.binomial(sizes, share)
    middle = rng.binomial(large, 0.5)
    found = [
        (int(n.sum()), int(np.maximum(n - 1, 0).sum()))
        for n in (rng.binomial(middle, 0.5), middle, large)
    ]
    return [Seen(share * part, *one) for part, one in zip(NESTED, found, strict=True)]


@pytest.mark.parametrize(
    "sizes",
    [[1] * 20_000, [2] * 10_000, [200] * 100, [1] * 10_000 + [2] * 3000 + [50] * 80],
    ids=["none", "pairs", "large clusters", "mixed"],
)
@pytest.mark.parametrize("share", [0.02, 0.1, 0.4])
def test_growth_of_deduplication_holds_the_truth(sizes: list[int], share: float) -> None:
    truth = 1 - len(sizes) / sum(sizes)
    found = [grow(nested_samples(sizes, share, seed)) for seed in range(100)]
    assert all(0.0 <= one.low <= one.mid <= one.high <= 1.0 for one in found)
    assert sum(one.low - 1e-9 <= truth <= one.high + 1e-9 for one in found) >= 95
    if share == 0.4:
        assert np.median([abs(one.mid - truth) for one in found]) < 0.1


def test_growth_of_the_whole_is_what_was_seen() -> None:
    seen = [Seen(0.25, 25, 1), Seen(0.5, 50, 3), Seen(1.0, 100, 10)]
    assert grow(seen) == (0.1, 0.1, 0.1)


def test_estimate_holds_the_real_run(crawl: dict[str, str], tmp_path: Path) -> None:
    given = [f"input.{name}={path}" for name, path in crawl.items()]
    real = load("data_run", [*SETTINGS, *given, f"out={tmp_path / 'real'}"], RunConfig)
    run_pipeline(real, Context(out=tmp_path / "real", executor=InlineExecutor()))
    truth = {row.name: row for row in read_folder(tmp_path / "real").rows}
    total = sum(f.stat().st_size for path in crawl.values() for f in Path(path).iterdir())
    out = tmp_path / "estimate.json"
    config = load(
        "data_estimate", [*SETTINGS, *given, f"sample_bytes={total // 2}", f"out={out}"],
        EstimateConfig,
    )  # fmt: skip
    text = estimate(config, InlineExecutor())
    found = json.loads(out.read_text())
    assert [step["name"] for step in found["steps"]] == ["extract", "url", "c4", "minhash", "split"]
    for step in found["steps"]:
        row, kept = truth[step["name"]], step["documents_out"]
        assert kept["low"] <= row.documents_out <= kept["high"], step["name"]
        assert abs(kept["mid"] - row.documents_out) < 0.2 * row.documents_out
        assert step["bytes_out"]["low"] <= row.bytes_out <= step["bytes_out"]["high"]
    assert [step["compares"] for step in found["steps"]] == [False, True, False, True, False]
    tokens = found["tokens"]
    assert tokens["low"] <= truth["tokenize"].tokens <= tokens["high"]
    assert found["records"]["mid"] == 200
    assert set(found["seconds"]) > {"00-extract", "03-minhash"}
    assert "url*" in text
    assert "compares documents" in text
