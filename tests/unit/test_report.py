import json
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from llmtrain.config.commands import ReportConfig
from llmtrain.config.load import load, write_yaml
from llmtrain.config.run import RunConfig
from llmtrain.errors import ConfigError
from llmtrain.report.columns import Columns, read_columns
from llmtrain.report.page import main
from llmtrain.report.record import read_run
from llmtrain.report.series import Timeline, smooth


def row(step):
    return {
        "step": step, "tokens": step * 1024, "loss": 8 - step / 100, "grad_norm": None, "lr": 1e-3,
        "tokens_per_s": 1000.0 + step, "mfu": None, "step_time_s": 0.5, "data_wait_s": 0.05,
        "source_loss": {"web": 7.0}, "source_tokens": {"web": 30, "<code>": 10},
        "skipped_steps": 0,
    }  # fmt: skip


@pytest.fixture(scope="module")
def config():
    return load("train", ["experiment=demo"], RunConfig)


@pytest.fixture
def run(tmp_path, config):
    folder = tmp_path / "runs" / "mine"
    (folder / "logs").mkdir(parents=True)
    data = replace(config.data, sources={"web": f"{tmp_path}/out/stores/train/web"})
    write_yaml(replace(config, data=data), folder / "config.yaml")
    rows = [row(10), row(20), row(30) | {"validation_loss": {"web": 6.5}}]
    lines = "".join(json.dumps(one) + "\n" for one in rows)
    (folder / "metrics.jsonl").write_text(lines + '{"step": 40, "lo')
    (folder / "logs" / "rank0.log").write_text("x resumed from /a/step-000000020\n")
    return folder


def score(model):
    return {
        "bits_per_byte": model, "unigram_bits_per_byte": 3.0, "uniform_bits_per_byte": 5.0,
        "loss": 4.0, "tokens": 10, "bytes": 40, "documents": 2,
    }  # fmt: skip


def finish(run):
    (run / "eval.json").write_text(json.dumps({"step": 30, "web": score(2.1), "all": score(2.1)}))
    sample = {"prompt": "Return <b>", "completion": "the & value", "temperature": 0.8, "seed": 1}
    (run / "samples.json").write_text(json.dumps({"step": 30, "samples": [sample]}))
    (run / "status.json").write_text('{"code": 0, "reason": "done", "step": 30}')
    stage = {
        "stage": "02-c4", "documents_in": 100, "documents_out": 80, "dropped": {"c4.brace": 20},
        "quarantined": {}, "deleted": {}, "text_bytes": 5000, "tokens": 0, "seconds": 1.5,
    }  # fmt: skip
    data = run.parent.parent / "out"
    data.mkdir()
    (data / "funnel.json").write_text(json.dumps({"stages": [stage]}))


class Balanced(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.sources = [], []

    def handle_starttag(self, tag, attrs):
        self.sources += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "br", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_page_of_a_finished_run(run):
    finish(run)
    assert main(ReportConfig(run=str(run))) == 0
    page = (run / "report.html").read_text()
    parser = Balanced()
    parser.feed(page)
    assert (parser.open, parser.sources) == ([], [])
    assert "done, step 30" in page
    assert "Return &lt;b&gt;</mark>the &amp; value" in page
    assert "c4.brace 20" in page
    assert "held out, 70% of a unigram" in page
    assert "25.00% seen" in page
    plots = json.loads(re.search(r'id="plots">(.*?)</script>', page)[1])
    assert plots["loss"]["marks"] == [[20, "resumed", False]]
    assert [s["name"] for s in plots["loss"]["series"]] == [
        "training", "running mean", "held out: web",
    ]  # fmt: skip
    assert plots["loss"]["axes"] == ["step", "tokens", "seconds of training"]
    assert plots["loss"]["series"][0]["points"] == [
        [10, 7.9, 10240, 5.0], [20, 7.8, 20480, 10.0], [30, 7.7, 30720, 15.0],
    ]  # fmt: skip
    assert plots["norm"]["series"][0]["points"] == []


def test_page_of_a_run_that_still_trains(run, tmp_path):
    out = tmp_path / "elsewhere" / "page.html"
    assert main(ReportConfig(run=str(run), out=str(out))) == 0
    page = out.read_text()
    assert "training, step 30" in page
    assert "Bits per byte" not in page
    assert "Data funnel" not in page


def test_record_counts_what_was_trained(run):
    record = read_run(run, None)
    assert record.realised() == {"web": 90, "<code>": 30}
    assert record.trained_s() == 15.0


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda run: (run / "config.yaml").unlink(), "holds no config.yaml; give run="),
        (lambda run: (run / "metrics.jsonl").write_text(""), "holds no step yet"),
        (lambda run: (run / "eval.json").write_text("{"), r"eval\.json is not JSON"),
    ],
)
def test_what_is_wrong_is_said(run, spoil, message):
    spoil(run)
    with pytest.raises(ConfigError, match=message):
        read_run(run, None)


def test_missing_data_folder_is_said(run, tmp_path):
    with pytest.raises(ConfigError, match=r"funnel\.json does not exist; give data="):
        read_run(run, tmp_path / "nowhere")


def test_thinning_keeps_ends_and_every_spike():
    rows = [{"step": i, "tokens": i, "step_time_s": 1.0} for i in range(1, 100_001)]
    values = np.full(len(rows), 2.0)
    values[54_321], values[77_777] = 40.0, -3.0
    values[10] = np.nan
    points = Timeline(Columns([rows])).points(values)
    assert len(points) <= 1502
    assert [point[0] for point in points] == sorted({point[0] for point in points})
    assert (points[0][0], points[-1][0]) == (1, 100_000)
    assert [54_322, 40.0, 54_322, 54_322.0] in points
    assert [77_778, -3.0, 77_778, 77_778.0] in points


def test_running_mean_leaves_gaps():
    assert np.array_equal(smooth(np.array([1.0, np.nan, 3.0])), [1.0, np.nan, 3.0], equal_nan=True)
    assert smooth(np.arange(40.0))[-1] == 38.5


def test_columns_of_rows_that_are_not_alike():
    first = [{"step": 1, "tokens": 8, "hash": "7", "loss": None, "by": {"b": 1.0, "a": None}}]
    later = [
        {"step": 2, "tokens": 16, "loss": 2.5, "by": None},
        {"step": 3, "tokens": 24, "loss": 2, "by": {"c": 3, "a": 4}, "new": {"x": None}},
        {"step": 4, "tokens": 32, "by": {}},
    ]
    rows = Columns([first, [], later])
    nan = np.nan
    assert (rows.num_rows, rows.last) == (4, later[-1])
    assert rows.names("by") == ["b", "a", "c"]
    assert rows.names("new") == ["x"]
    assert rows.names("nowhere") == []
    for found, expected in (
        (rows.column("loss"), [nan, 2.5, 2.0, nan]),
        (rows.column("by"), [1.0, nan, 1.0, nan]),
        (rows.column("hash"), [nan] * 4),
        (rows.inside("by", "a"), [nan, nan, 4.0, nan]),
        (rows.inside("new", "x"), [nan] * 4),
    ):
        assert np.array_equal(found, expected, equal_nan=True)
    assert Columns([later], only=["by"]).names("new") == []


def test_a_row_without_a_step_is_said(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "tokens": 8}\n{"loss": 2.0}\n')
    with pytest.raises(ConfigError, match=r"row 2 of .*metrics\.jsonl has no step; expected"):
        read_columns(path)


def watched(step):
    return row(step) | {
        "layer_grad_norm": {"embed": 0.1, "0": 0.5 * step, "head": None},
        "layer_weight_norm": {"embed": 1.0, "0": 2.0}, "attention_logit_max": {"0": 9.0},
        "rank_step_time_s": {"min": 0.4, "median": 0.5, "max": 0.6, "slowest_rank": 3},
        "checkpoint_s": 0.5 if step == 20 else 0.0, "gpu_power_w": 600.0,
        "gpu_memory_bytes": 2**31, "planned_share": {"web": 0.7, "<code>": 0.3},
        "attempt": 1 if step < 20 else 2,
    }  # fmt: skip


def plots_of(page):
    return json.loads(re.search(r'id="plots">(.*?)</script>', page)[1])


def test_what_a_watched_run_logs_is_drawn(run):
    rows = "".join(json.dumps(watched(step)) + "\n" for step in (10, 20, 30))
    (run / "metrics.jsonl").write_text(rows)
    spike = {"time": 1.0, "step": 20, "attempt": 2, "kind": "spike", "text": "norm <9>"}
    kept = {"time": 0.0, "step": 0, "attempt": 1, "kind": "start", "text": "1 process"}
    (run / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in (kept, spike)))
    assert main(ReportConfig(run=str(run))) == 0
    page = (run / "report.html").read_text()
    plots = plots_of(page)
    assert {"layer-grad", "layer-weight", "logits", "memory", "power", "shares"} <= set(plots)
    assert plots["layer-grad"]["values"] == [[0.1] * 3, [5.0, 10.0, 15.0], [None] * 3]
    assert plots["loss"]["marks"] == [[20, "resumed", False], [20, "spike", True]]
    assert plots["loss"]["bands"] == [[10, 30]]
    assert [s["name"] for s in plots["step-time"]["series"]] == [
        "step", "slowest rank", "fastest rank", "wait for data", "saving",
    ]  # fmt: skip
    assert "Rank 3 was the slowest in 100% of the rows" in page
    assert "norm &lt;9&gt;" in page
    planned = next(s for s in plots["shares"]["series"] if s["name"] == "web, planned")
    assert [point[1] for point in planned["points"]] == [70.0] * 3


def test_no_torch_is_imported():
    code = "import sys, llmtrain.report.page; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("out", "message"),
    [(".", "is a folder; name a file in it"), ("a/page.html", "cannot be written")],
)
def test_a_page_that_cannot_be_written_is_one_sentence(run, out, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").write_text("a file where a folder should be")
    with pytest.raises(ConfigError, match=message):
        main(ReportConfig(run=str(run), out=out))
    assert not list(tmp_path.glob("*.partial"))
