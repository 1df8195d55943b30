"""The saved dashboard of a run's rows, dashboard.json, and what puts it into Weights & Biases.

A workspace lives on the server, so it is saved once for a project, with access to the server; runs
synced later from offline records fill it. Needs ``pip install 'wandb-workspaces>=0.4.13'``.

    python -m llmtrain.train.dashboard --entity my-team --project llmtrain
"""

import argparse
import importlib.util
import json
import logging
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from llmtrain import logs
from llmtrain.errors import ConfigError

DEFINITION = Path(__file__).with_name("dashboard.json")
"""Sections of panels; a panel shows ``fields`` or all fields that match ``pattern``."""
INSTALL = "pip install 'wandb-workspaces>=0.4.13'"

logger = logging.getLogger(__name__)


def workspace(entity: str, project: str) -> Any:
    """Build the workspace of a project, not saved yet.

    Raises:
        ConfigError: wandb-workspaces is not installed.
    """
    if importlib.util.find_spec("wandb_workspaces") is None:
        raise ConfigError(f"the dashboard needs wandb-workspaces, which is missing; run {INSTALL}")
    ws: Any = import_module("wandb_workspaces.workspaces")
    definition = json.loads(DEFINITION.read_text(encoding="utf-8"))
    sections = [
        ws.Section(
            name=section["name"], panels=[_panel(panel) for panel in section["panels"]],
            is_open=True,
        )
        for section in definition["sections"]
    ]  # fmt: skip
    return ws.Workspace(entity=entity, project=project, name=definition["name"], sections=sections)


def _panel(panel: dict[str, Any]) -> Any:
    plots: Any = import_module("wandb_workspaces.reports.v2")
    return plots.LinePlot(
        title=panel["title"], x="train_step", y=panel.get("fields", []),
        metric_regex=panel.get("pattern"), log_y=panel.get("log"),
    )  # fmt: skip


def main(words: Sequence[str] | None = None) -> int:
    """Save the workspace; its address is printed by wandb."""
    parser = argparse.ArgumentParser(prog="python -m llmtrain.train.dashboard")
    parser.add_argument("--entity", required=True, help="user or team the project belongs to")
    parser.add_argument("--project", default="llmtrain", help="monitor.wandb_project of the runs")
    asked = parser.parse_args(words)
    workspace(asked.entity, asked.project).save()
    return 0


if __name__ == "__main__":
    logs.setup(None)
    raise SystemExit(logs.run_command(main))
