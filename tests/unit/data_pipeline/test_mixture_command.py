"""``llmtrain-data mixture``: what a run would read, told before it begins; nothing is trained."""

import html
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.cli import main
from llmtrain.config.load import load, to_yaml
from llmtrain.config.run import RunConfig
from llmtrain.data.adaptive import AdaptiveSchedule
from llmtrain.data.journal import SHARE_UNIT, Journal
from llmtrain.data.plan import plan_of
from llmtrain.data.store import open_source
from tests.stores import write_store

RUN = ["training.sequence_length=16", "training.global_batch_tokens=64"]


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Sources of 1,001 and 251 windows of 16 tokens."""
    folder, words = tmp_path_factory.mktemp("stores"), list[str]()
    for name, documents in (("big", 400), ("small", 100)):
        write_store(folder / name, [list(range(3, 42))] * documents + [[3] * 16], num_shards=2)
        words.append(f"data.sources.{name}={folder / name}")
    return words


def told(words: list[str], tmp_path: Path) -> dict[str, Any]:
    """What the command writes as JSON."""
    assert main(["mixture", *RUN, *words, f"json={tmp_path / 'plan.json'}"]) == 0
    found: dict[str, Any] = json.loads((tmp_path / "plan.json").read_text())
    return found


def test_the_table_tells_shares_tokens_and_epochs(
    stores: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*stores, "training.num_tokens=8000", "mixture.weights={big: 3, small: 1}"]
    assert main(["mixture", *RUN, *words]) == 0
    shown = capsys.readouterr()
    assert "8,000 tokens in 125 steps, constant mixture of 2 sources" in shown.out
    rows = {line.split()[0]: line.split()[1:] for line in shown.out.splitlines() if line}
    assert rows["big"] == ["75.00%", "6,000", "16,017", "0.375"]
    assert rows["small"] == ["25.00%", "2,000", "4,017", "0.498"]
    assert "phase" not in shown.out
    assert shown.err == ""


def test_what_is_told_is_what_the_steps_take(stores: list[str], tmp_path: Path) -> None:
    mixing = [
        "mixture=phases",
        "mixture.phases=[{until_tokens: 3200, weights: {big: 1}},"
        "{until_tokens: 6400, weights: {big: 3, small: 1}, interpolation: linear},"
        "{weights: {small: 1}}]",
    ]
    found = told([*stores, "training.num_tokens=8000", *mixing], tmp_path)
    words = [*RUN, *stores, "training.num_tokens=8000", *mixing]
    config = load("train", words, RunConfig)
    plan = plan_of(config, {n: open_source(p) for n, p in config.data.sources.items()})
    seen = np.concatenate([plan.windows(step).sources for step in range(config.training.num_steps)])
    for phase in found["phases"]:
        start, end = (tokens // 16 for tokens in phase["tokens"])
        given = np.bincount(seen[start:end], minlength=2) * 16
        assert np.abs(given - phase["gives"]).max() <= 2 * 16
    assert [phase["tokens"] for phase in found["phases"]] == [[0, 3200], [3200, 6400], [6400, 8000]]
    assert found["phases"][1]["first"] == [0.75, 0.25]
    assert found["phases"][1]["last"] == [0.0, 1.0]
    assert [source["planned_tokens"] for source in found["sources"]] == [4400, 3600]
    assert sum(map(sum, (phase["gives"] for phase in found["phases"]))) == 8000
    assert found["bins"][-1] == [8000, [4400, 3600]]
    assert found["points"][0] == [0, [1.0, 0.0]]
    assert found["points"][-1][1] == [0.0, 1.0]
    assert found["phases"][-1]["epochs"] == [source["epochs"] for source in found["sources"]]


def test_ramps_are_told_with_their_steps(stores: list[str], tmp_path: Path) -> None:
    ramps = [
        "training.num_tokens=8000",
        "training.batch_ramp=[{until_tokens: 1600, global_batch_tokens: 32}]",
        "training.length_ramp=[{until_tokens: 800, sequence_length: 4}]",
    ]
    found = told([*stores, *ramps], tmp_path)
    assert [stage["steps"] for stage in found["stages"]] == [[1, 25], [26, 50], [51, 150]]
    assert [stage["tokens_per_step"] for stage in found["stages"]] == [32, 32, 64]
    assert [stage["sequence_length"] for stage in found["stages"]] == [4, 16, 16]
    assert found["stages"][-1]["tokens"] == [1600, 8000]


def test_many_epochs_are_a_warning_and_a_cap_refuses_them(
    stores: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*RUN, *stores, "training.num_tokens=64000", "mixture.weights={big: 0.5, small: 0.5}"]
    assert main(["mixture", *words]) == 0
    shown = capsys.readouterr().err
    assert "small 7.97 times" in shown
    assert "big" not in shown
    assert main(["mixture", *words, "mixture.max_epochs=4"]) == 2
    assert "source small is read 7.968 times" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["training.num_tokens=8000", "mixture.weights={big: 1}"], "gives no share to the source"),
        (
            ["training.num_tokens=8000", "mixture=phases", "mixture.phases=[{until_tokens: 9000, "
             "weights: {big: 1}}, {weights: {small: 1}}]"],
            "mixture.phases[0].until_tokens=9000 is not before the end of the run",
        ),
        (["training.num_tokens=8000", "mixture.wieghts={big: 1}"], "wieghts"),
        (["training.num_tokens=8000", "data.sources.other=absent"], "data.sources.other: "),
        (["training.num_tokens=8000", "run=runs/x"], "run=runs/x brings its own configuration"),
        (["training.num_tokens=8000", "plot=plan.png"], "plot=plan.png has to be a file that ends"),
        ([], "training.num_tokens"),
    ],
)  # fmt: skip
def test_what_cannot_be_planned_is_one_message(
    stores: list[str], capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(["mixture", *RUN, *stores, *words]) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert "Traceback" not in shown


def test_a_run_tells_its_own_plan(
    stores: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load("train", [*RUN, *stores, "training.num_tokens=8000"], RunConfig)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert main(["mixture", f"run={tmp_path}", "json=-"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["num_tokens"] == 8000
    assert [source["name"] for source in found["sources"]] == ["big", "small"]
    assert main(["mixture", f"run={tmp_path / 'absent'}"]) == 2
    assert "is no run folder: it has no config.yaml" in capsys.readouterr().err


def test_an_adaptive_mixture_says_what_its_shares_may_become(
    stores: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["training.num_tokens=8000", "mixture=adaptive", "mixture.interval_tokens=1600"]
    assert main(["mixture", *RUN, *stores, *words]) == 0
    assert "later ones are between 5.00% and 95.00%" in capsys.readouterr().out


def test_what_an_adaptive_run_decided_is_told(
    stores: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["training.num_tokens=64000", "mixture=adaptive", "mixture.interval_tokens=1600"]
    config = load("train", [*RUN, *stores, *words], RunConfig)
    plan = plan_of(config, {n: open_source(p) for n, p in config.data.sources.items()})
    schedule = plan.mixture.schedule
    assert isinstance(schedule, AdaptiveSchedule)
    changes = tuple(schedule.decide([(100.0, 50.0), (900.0, 100.0)]) for _ in range(30))
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    (tmp_path / "journal.json").write_text(json.dumps(Journal(shares=changes).to_plain()))
    assert main(["mixture", f"run={tmp_path}"]) == 0
    assert "32 phases: plot= and json= tell each" in capsys.readouterr().out
    assert main(["mixture", f"run={tmp_path}", "json=-"]) == 0
    phases = json.loads(capsys.readouterr().out)["phases"]
    assert phases[1]["first"] == phases[0]["first"]
    told = [phase["first"] for phase in phases[2:]]
    assert told == [[share / SHARE_UNIT for share in change.shares] for change in changes]
    assert told[-1][1] > phases[0]["first"][1]


class Balanced(HTMLParser):
    """Collects tags that are not closed, and addresses that a page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [str(value) for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "br", "link", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_draws_every_source(stores: list[str], tmp_path: Path) -> None:
    page = tmp_path / "plan.html"
    curriculum = ["mixture=curriculum", "mixture.order=[small,big]", "training.num_tokens=160000"]
    found = told([*stores, *curriculum, f"plot={page}"], tmp_path)
    text = page.read_text()
    parser = Balanced()
    parser.feed(text)
    assert (parser.open, parser.loads) == ([], [])
    lines = re.findall(r'<polyline points="([^"]*)"', text)
    assert len(lines) == 2
    heights = [[float(pair.split(",")[1]) for pair in line.split()] for line in lines]
    assert all(line == sorted(line, reverse=True) for line in heights)
    assert min(map(min, heights)) == 0.0  # the most epochs reach the top
    assert all(line[0] == 100.0 for line in heights)
    tips = [html.unescape(tip) for tip in re.findall(r'data-tip="([^"]*)"', text)]
    assert tips[-1] == "160k: " + ", ".join(
        f"{source['name']} {source['epochs']:.2f}" for source in found["sources"]
    )
    assert sum("small 100" in tip or tip.endswith(": 100") for tip in tips) > 0


def test_neither_torch_nor_what_the_pipeline_needs_is_imported(stores: list[str]) -> None:
    program = (
        f"import sys; from data_pipeline.cli import main; main({['mixture', *RUN, *stores]!r} + "
        "['training.num_tokens=8000']); "
        "print([m for m in ('torch', 'pyarrow', 'numba') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip().endswith("[]")
