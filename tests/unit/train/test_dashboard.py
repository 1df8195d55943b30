"""The saved dashboard: what it shows exists, and W&B takes it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from llmtrain.errors import ConfigError
from llmtrain.train import dashboard
from tests.wandb_server import WandbServer

DOCUMENTED = Path(__file__).parents[3] / "docs" / "monitoring.md"


def test_every_panel_shows_a_documented_field() -> None:
    documented = set(re.findall(r"^\| `(\w+)`", DOCUMENTED.read_text(), re.MULTILINE))
    shown = set()
    for section in json.loads(dashboard.DEFINITION.read_text())["sections"]:
        for panel in section["panels"]:
            assert ("fields" in panel) != ("pattern" in panel)
            for name in panel.get("fields", [panel.get("pattern")]):
                shown.add(name.split("/")[0])
    assert shown <= documented
    assert {"loss", "layer_grad_norm", "attention_logit_max", "rank_step_time_s"} <= shown


def test_weights_and_biases_takes_it() -> None:
    with WandbServer() as server:
        done = subprocess.run(
            [sys.executable, "-m", "llmtrain.train.dashboard", "--entity", "me"],
            env=os.environ | server.environment, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "View saved: " in done.stderr
    (view,) = server.views
    text = json.dumps(view)
    assert "train_step" in text
    assert "layer_grad_norm/.*" in text
    assert (view["entityName"], view["projectName"]) == ("me", "llmtrain")


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dashboard.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"run pip install 'wandb-workspaces>=0\.4\.13'"):
        dashboard.workspace("me", "llmtrain")
