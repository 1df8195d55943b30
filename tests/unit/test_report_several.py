import json
import re
from dataclasses import replace

import numpy as np
import pytest

from llmtrain.config.commands import ReportConfig
from llmtrain.config.load import load, write_yaml
from llmtrain.config.run import RunConfig
from llmtrain.errors import ConfigError
from llmtrain.report.columns import Columns
from llmtrain.report.compare_record import differing, held_out, read_several
from llmtrain.report.page import main
from llmtrain.report.sweep_record import read_sweep

PARAMETERS = ("optimizer.lr", "schedule.kind")


@pytest.fixture(scope="module")
def config():
    return load("train", ["experiment=demo"], RunConfig)


def rows(loss):
    return "".join(
        json.dumps({
            "step": step, "tokens": step * 100, "loss": loss + 10 / step, "grad_norm": 1.0,
            "lr": 1e-3, "tokens_per_s": 1000.0 / loss, "mfu": None, "step_time_s": 0.1,
            "validation_loss": {"web": loss, "code": loss + 3},
            "validation_tokens": {"web": 200, "code": 100},
        }) + "\n"
        for step in (10, 20)
    )  # fmt: skip


@pytest.fixture
def runs(tmp_path, config):
    for name, lr, loss in (("a", 1e-3, 4.0), ("b", 3e-3, 3.0)):
        folder = tmp_path / name
        folder.mkdir()
        optimizer = replace(config.optimizer, lr=lr)
        write_yaml(replace(config, name=name, optimizer=optimizer), folder / "config.yaml")
        (folder / "metrics.jsonl").write_text(rows(loss))
    return [tmp_path / "a", tmp_path / "b"]


@pytest.fixture
def sweep(tmp_path):
    folder = tmp_path / "tune"
    folder.mkdir()
    plan = {"command": "llmtrain train -m", "sweeper": "basic", "launcher": "local",
            "objective": {"metric": "validation_loss", "direction": "minimize"},
            "parameters": list(PARAMETERS)}  # fmt: skip
    (folder / "sweep.json").write_text(json.dumps(plan))
    lines = []
    for number, (lr, kind) in enumerate(
        (lr, k) for lr in (1e-3, 1e-2, 1e-1) for k in ("wsd", "cosine")
    ):
        trial = folder / f"trial-{number:03d}"
        trial.mkdir()
        (trial / "metrics.jsonl").write_text(rows(4.0 - number / 10))
        line = {"number": number, "folder": trial.name, "state": "running", "value": None,
                "overrides": dict(zip(PARAMETERS, (lr, kind), strict=True)),
                "started": 10.0 * number, "ended": None}  # fmt: skip
        lines.append(line)
        if number < 5:
            lines.append(
                line | {"state": "done", "value": 4.0 - number, "ended": 10.0 * number + 6}
            )
        else:
            lines.append(line | {"state": "failed", "ended": 99.0})
            (trial / "status.json").write_text('{"code": 1, "reason": "out_of_memory", "step": 20}')
    (folder / "trials.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    return folder


def plots_of(page):
    return json.loads(re.search(r'id="plots">(.*?)</script>', page)[1])


def test_runs_beside_each_other(runs, tmp_path):
    assert main(ReportConfig(run=tuple(map(str, runs)))) == 0
    page = (tmp_path / "compare.html").read_text()
    plots = plots_of(page)
    assert list(plots) == ["loss", "held-out", "throughput", "norm", "lr"]
    assert all([s["name"] for s in plot["series"]] == ["a", "b"] for plot in plots.values())
    assert all([s["color"] for s in plot["series"]] == [0, 1] for plot in plots.values())
    assert plots["held-out"]["series"][0]["points"][-1] == [20, 5.0, 2000, 2.0]
    table = page[page.index("<h2>Differing settings") :]
    assert "<td>optimizer.lr</td><td>0.001</td><td>0.003</td>" in table
    assert "optimizer.beta" not in table
    assert '<span class="best">3.5</span>' in page
    assert '<span class="best">4.5</span>' not in page


def test_only_settings_that_differ_are_told(runs):
    assert differing(read_several(runs)) == {"optimizer.lr": ["0.001", "0.003"]}


def test_names_are_as_long_as_they_must_be(runs, tmp_path):
    (tmp_path / "other").mkdir()
    other = runs[0].rename(tmp_path / "other" / "b")
    assert [run.name for run in read_several([other, runs[1]])] == [
        "other/b", f"{tmp_path.name}/b",
    ]  # fmt: skip


def test_held_out_loss_is_the_mean_over_tokens():
    row = {
        "validation_loss": {"a": 1.0, "b": 4.0, "c": None},
        "validation_tokens": {"a": 3, "b": 1},
    }
    found = held_out(Columns([[row, {"loss": 1.0}]]))
    assert found[0] == 1.75
    assert np.isnan(found[1])


def test_a_sweep(sweep):
    assert main(ReportConfig(run=str(sweep))) == 0
    page = (sweep / "report.html").read_text()
    plots = plots_of(page)
    assert set(plots) == {"parallel", "parameter-0", "parameter-1", "history", "losses"}
    axes = plots["parallel"]["axes"]
    assert [axis["name"] for axis in axes] == ["lr", "kind", "validation_loss"]
    assert axes[0]["log"]
    assert axes[1]["categories"] == ["cosine", "wsd"]
    assert plots["parallel"]["shades"] == [1.0, 0.75, 0.5, 0.25, 0.0, None]
    assert plots["parameter-0"]["log"] == "x"
    assert len(plots["losses"]["series"]) == 6
    assert [point[1] for point in plots["history"]["series"][1]["points"]] == [4, 3, 2, 1, 0]
    assert "5 done, 1 failed" in page
    assert "out of memory" in page
    best = page[page.index('class="best-row"') :]
    assert best.startswith('class="best-row" data-trial="4"')


def test_the_last_line_of_a_trial_counts(sweep):
    record = read_sweep(sweep)
    assert [trial.state for trial in record.trials] == ["done"] * 5 + ["failed"]
    assert record.judged[0].number == 4
    assert record.judged[0].minutes() == 0.1


def test_a_study_is_drawn_as_its_own_card(sweep):
    curves = [
        {"name": "1 M, measured", "points": [[1, 3], [10, 2]]},
        {"name": "1 M, fitted", "points": [[1, 3.1], [5, 2.4], [10, 2.1]]},
    ]
    table = {"head": ["run", "error"], "rows": [["<big>", "1 %"]]}
    study = {"kind": "ladder", "title": "Ladder", "text": "fits", "table": table,
             "curves": curves, "x": "tokens", "y": "loss", "log": True}  # fmt: skip
    (sweep / "study.json").write_text(json.dumps(study))
    main(ReportConfig(run=str(sweep)))
    page = (sweep / "report.html").read_text()
    plot = plots_of(page)["study"]
    assert (plot["log"], plot["axes"], plot["y"]) == ("x", ["tokens"], "loss")
    assert [(s["dots"], s["line"], s["color"]) for s in plot["series"]] == [
        (True, False, 0), (False, True, 0),
    ]  # fmt: skip
    assert "&lt;big&gt;" in page


def test_a_sweep_without_an_objective_yet(sweep):
    lines = (sweep / "trials.jsonl").read_text().splitlines(keepends=True)
    (sweep / "trials.jsonl").write_text(lines[0])
    assert main(ReportConfig(run=str(sweep))) == 0
    assert list(plots_of((sweep / "report.html").read_text())) == ["losses"]


def test_an_objective_without_a_name_and_a_command_as_words(sweep):
    plan = json.loads((sweep / "sweep.json").read_text())
    plan |= {
        "objective": {"metric": None, "direction": "maximize"},
        "command": ["train", "a=[b, c]"],
    }
    (sweep / "sweep.json").write_text(json.dumps(plan))
    record = read_sweep(sweep)
    assert record.metric == "held-out loss"
    assert record.judged[0].number == 0
    assert record.command == "llmtrain train 'a=[b, c]'"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), r"run=\[\] names no run; give one folder or several"),
        (("a", "a"), "names .*a 2 times; name every run once"),
        (("a", "nowhere"), "nowhere holds no config.yaml"),
        (("a", "tune"), "tune is a sweep, not a run; describe it alone"),
    ],
)
def test_bad_lists_of_runs(runs, sweep, tmp_path, words, message):
    with pytest.raises(ConfigError, match=message):
        main(ReportConfig(run=tuple(str(tmp_path / word) for word in words)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no trial yet; report once one has started"),
        (
            '{"number": 1}\n',
            r"trials\.jsonl:1 holds no overrides, state; expected a line of a sweep",
        ),
    ],
)
def test_bad_sweeps(sweep, text, message):
    (sweep / "trials.jsonl").write_text(text)
    with pytest.raises(ConfigError, match=message):
        main(ReportConfig(run=str(sweep)))


def test_data_is_for_one_run(runs, sweep):
    for run in (str(sweep), tuple(map(str, runs))):
        with pytest.raises(ConfigError, match="data=x is for the page of one run"):
            main(ReportConfig(run=run, data="x"))
