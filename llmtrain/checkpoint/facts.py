"""What must be the same for a run to go on: facts by name, kept in every checkpoint.

The fingerprint of the batch plan decides; the other facts are there to say what changed.

    facts = data_facts(plan)
    changed_facts(checkpoint.meta["facts"], facts)   # [] when the run may go on
"""

from collections.abc import Mapping

from llmtrain.data.plan import BatchPlan

FINGERPRINT = "data fingerprint"
"""Name of the fact that covers everything the order of tokens depends on."""


def data_facts(plan: BatchPlan) -> dict[str, str]:
    """Name everything that the batches of a run follow from."""
    facts = {
        FINGERPRINT: plan.fingerprint,
        "training.seed": str(plan.seed),
        "training.sequence_length": str(plan.steps.unit_tokens),
        "rows of the steps": ", then ".join(
            f"{units * (plan.steps.unit_tokens // length)} of {length}"
            for units, length in plan.steps.shapes()
        ),
        "mixture": plan.mixture.schedule.fingerprint,
    }
    for name, order in zip(plan.source_names, plan.orders, strict=True):
        facts[f"content of data.sources.{name}"] = order.store.fingerprint
        facts[f"order of data.sources.{name}"] = order.kind
    return facts


def changed_facts(saved: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Say of each fact that differs what it was and what it is; empty where none does.

    The fingerprint is named only where nothing else explains that it changed.
    """
    changed = {
        name: f"{name} was {saved.get(name, 'absent')} and is {now.get(name, 'absent')}"
        for name in sorted(saved.keys() | now.keys())
        if saved.get(name) != now.get(name)
    }
    return [text for name, text in changed.items() if name != FINGERPRINT] or list(changed.values())
