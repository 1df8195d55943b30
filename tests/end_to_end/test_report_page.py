"""The report's pages in a real browser: of a run, of several, of a sweep, wide and narrow."""

import json
import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmtrain.cli import main
from tests.end_to_end.chromium import BINARY, Chromium, Page
from tests.end_to_end.commands import TINY, Command, make_store

pytestmark = pytest.mark.skipif(
    BINARY is None, reason="no Chromium here: apt-get install chromium opens the report's pages"
)
KINDS = ("run", "compare", "sweep")
PLOTS = "[...document.querySelectorAll('.plot')]"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two trained runs, one of which logs what a cluster logs, and a sweep of them."""
    folder: Path = tmp_path_factory.mktemp("report")
    store = make_store(folder / "stores/train/web", 1)
    words = ["train", *TINY, f"runs_dir={folder}", f"data.sources.web={store}"]
    for name, lr in (("one", 1e-2), ("two", 1e-3)):
        log = folder / f"{name}.log"
        more = [f"name={name}", f"optimizer.lr={lr}", "training.num_tokens=5120"]
        assert Command([*words, *more], log).wait() == 0, log.read_text()
    _watch(folder / "one")
    _sweep(folder)
    return folder


def _watch(run: Path) -> None:
    """Add to the rows what this machine has no GPUs, ranks and faults for."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        step = row["step"]
        row |= {
            "layer_grad_norm": {"embed": 0.1, "0": math.exp(-step / 9), "head": 0.5},
            "layer_weight_norm": {"embed": 1.0 + step, "0": 2.0, "head": 3.0},
            "attention_logit_max": {"0": 1.0 + step, "1": 2.0}, "checkpoint_s": step % 5 / 10,
            "rank_step_time_s": {"min": 0.1, "median": 0.2, "max": 0.3, "slowest_rank": 1},
            "gpu_power_w": 500.0 + step, "gpu_memory_bytes": 2**33, "attempt": 1 + (step > 10),
        }  # fmt: skip
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    spike = {"time": 0.0, "step": 12, "attempt": 2, "kind": "spike", "text": "</script><b>"}
    (run / "events.jsonl").write_text(json.dumps(spike) + "\n")


def _sweep(folder: Path) -> None:
    """A sweep of six trials over two parameters, one of which failed."""
    sweep = folder / "sweep"
    sweep.mkdir()
    plan = {"command": "llmtrain train --multirun", "sweeper": "basic", "launcher": "local",
            "objective": {"metric": "loss", "direction": "minimize"},
            "parameters": ["optimizer.lr", "schedule.kind"]}  # fmt: skip
    (sweep / "sweep.json").write_text(json.dumps(plan))
    lines = []
    for number in range(6):
        shutil.copytree(folder / ("one", "two")[number % 2], sweep / f"trial-{number:03d}")
        point = {"optimizer.lr": 10.0 ** (number % 3 - 4), "schedule.kind": ("a", "b")[number // 3]}
        lines.append(
            {"number": number, "folder": f"trial-{number:03d}", "overrides": point,
             "state": "done" if number else "failed", "value": 4 - number / 9 if number else None,
             "started": 0.0, "ended": 60.0}
        )  # fmt: skip
    (sweep / "trials.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    points = [[1.0, 3.0], [10.0, 2.0]]
    study = {"kind": "ladder", "title": "Ladder", "text": "It fits.", "x": "tokens", "y": "loss",
             "curves": [{"name": "measured", "points": points}], "log": True,
             "table": {"head": ["run", "error"], "rows": [["held out", "1 %"]]}}  # fmt: skip
    (sweep / "study.json").write_text(json.dumps(study))


@pytest.fixture(scope="module")
def pages(folder: Path) -> dict[str, Path]:
    targets = {
        "run": str(folder / "one"),
        "compare": f"[{folder / 'one'},{folder / 'two'}]",
        "sweep": str(folder / "sweep"),
    }
    for kind, target in targets.items():
        started = time.process_time()
        assert main(["report", f"run={target}", f"out={folder / kind}.html"]) == 0
        assert time.process_time() - started < 5
    return {kind: folder / f"{kind}.html" for kind in KINDS}


@pytest.fixture(scope="module")
def browser() -> Iterator[Chromium]:
    with Chromium() as browser:
        yield browser


def clean(page: Page) -> None:
    """Nothing went wrong, and nothing but the file itself was asked for."""
    assert page.told("Runtime.exceptionThrown") == []
    assert page.told("Runtime.consoleAPICalled") == []
    assert page.told("Log.entryAdded") == []
    urls = [told["request"]["url"] for told in page.told("Network.requestWillBeSent")]
    assert len(urls) == 1
    assert urls[0].startswith("file://")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, False), (390, True)])
def test_every_plot_draws_and_nothing_leaves_the_page(
    browser: Chromium, pages: dict[str, Path], kind: str, width: int, dark: bool
) -> None:
    page = browser.open(pages[kind], width, dark=dark)
    drawn = page.run(
        f"Object.fromEntries({PLOTS}.map(plot => [plot.id, Number(plot.dataset.drawn)]))"
    )
    assert set(drawn) == set(page.run("Object.keys(specs)"))
    assert len(drawn) >= 4
    assert all(count > 0 for count in drawn.values()), drawn
    assert page.run("document.documentElement.scrollWidth") == width
    boxes = f"{PLOTS}.every(plot => plot.getBoundingClientRect().right <= innerWidth)"
    assert page.run(boxes)
    clean(page)


def box(page: Page, name: str) -> tuple[float, float, float, float]:
    """Left, top, width and height of a plot, scrolled into sight."""
    page.run(f"document.getElementById('{name}').scrollIntoView({{block: 'center'}})")
    page.settle()  # scrolling hides the read-out
    found = f"document.querySelector('#{name} svg').getBoundingClientRect()"
    left, top, width, height = page.run(f"(r => [r.x, r.y, r.width, r.height])({found})")
    return left, top, width, height


def test_reading_zooming_and_switching(browser: Chromium, pages: dict[str, Path]) -> None:
    page = browser.open(pages["compare"], 1280)
    left, top, width, height = box(page, "loss")
    page.hover((left + width / 2, top + height / 2), until="tip.style.opacity === '1'")
    assert "one" in page.run("tip.textContent")
    whole = page.run("plots[0].whole")
    page.drag((left + width * 0.3, top + 90), (left + width * 0.6, top + 90))
    zooms = page.run("plots.map(plot => plot.zoom)")
    assert all(zoom == zooms[0] for zoom in zooms)
    assert whole[0] < zooms[0][0] < zooms[0][1] < whole[1]
    page.run("plots[0].svg.focus()")
    page.press("Escape")
    assert page.run("plots.every(plot => plot.zoom === null)")
    page.press("ArrowRight")
    assert "step" in page.run("tip.textContent")
    page.click("[data-axis='1']")
    assert page.run("plots[0].whole[1]") == 5120
    assert "tokens" in page.run("document.querySelector('#loss svg').textContent")
    page.click(".tools button")
    assert page.run("plots[0].logY")
    page.click("[data-series='one']")
    assert page.run("document.querySelector('#loss').dataset.drawn") == "1"
    assert (
        page.run("document.querySelector(\"[data-series='one']\").getAttribute('aria-pressed')")
        == "false"
    )
    clean(page)


def test_a_sweep_is_sorted_and_filtered(browser: Chromium, pages: dict[str, Path]) -> None:
    page = browser.open(pages["sweep"], 1280)
    table = "document.querySelector('table.sortable:has([data-trial]) tbody')"
    trials = f"[...{table}.rows].filter(r => !r.hidden).map(r => Number(r.cells[0].textContent))"
    assert page.run(trials) == [5, 4, 3, 2, 1, 0]
    page.run(f"{table}.closest('table').querySelector('th button').click()")
    assert page.run(trials) == [0, 1, 2, 3, 4, 5]
    left, top, *_ = box(page, "parallel")
    x = left + page.run("plots.find(plot => plot.xs).xs[0]")
    page.drag((x, top + 312), (x, top + 250))
    assert page.run(trials) == [0, 3]
    assert page.run("document.querySelector('#losses').dataset.drawn") == "2"
    page.run("document.querySelector('.brush').focus()")
    page.press("Escape")
    assert page.run(trials) == [0, 1, 2, 3, 4, 5]
    page.press("ArrowUp")
    assert page.run(trials) == [1, 2, 4, 5]
    clean(page)
