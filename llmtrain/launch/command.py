"""``llmtrain launch``: the same training command on this machine or on a cluster, by one word.

Invariant: a dry run prints what would run and touches nothing; neither it nor a submission imports
torch.

    llmtrain launch target=slurm cluster=infiniband cluster.num_nodes=8 dry_run=true model=llama3_8b
"""

import sys
from collections.abc import Mapping
from importlib import import_module

from llmtrain.config.launch import LaunchConfig
from llmtrain.launch.plan import Plan

TARGETS: Mapping[str, str] = {
    "local": "machines:local",
    "torchrun": "machines:node",
    "deepspeed": "machines:deepspeed",
    "slurm": "slurm:slurm",
    "kubernetes": "manifests:kubernetes",
    "skypilot": "manifests:skypilot",
}
"""Module of this package and function in it that makes a plan, by launch.kind."""


def main(config: LaunchConfig) -> int:
    """Start the run, or print how; returns the run's exit status, 0 once it is submitted."""
    module, _, function = TARGETS[config.launch.kind].partition(":")
    plan: Plan = getattr(import_module(f"llmtrain.launch.{module}"), function)(config)
    if config.dry_run:
        sys.stdout.write(plan.shown)
        return 0
    return plan.start()
