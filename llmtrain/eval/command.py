"""``llmtrain eval``: held-out loss of a run, or tasks of lm-evaluation-harness.

llmtrain eval run=runs/demo
llmtrain eval run=runs/demo tasks=[hellaswag,arc_easy] harness.num_fewshot=5
"""

from importlib import import_module

from llmtrain.config.generate import EvalConfig


def main(config: EvalConfig) -> int:
    """Run the evaluation that is asked for; what the other needs is not imported."""
    module = import_module(f"llmtrain.eval.{'harness' if config.tasks else 'perplexity'}")
    status: int = module.main(config)
    return status
