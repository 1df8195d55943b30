"""Proof of a run's lineage: random spans of its batches against the raw crawl, and both directions.

Every span is a random stretch of tokens of a random document in a random row of a random step. Its
record is opened in the raw file and extracted again with the pinned extractor; hashes are compared,
the edit map is applied, and the characters have to be those that the tokens decode to. Then pairs
of a step and a document: the step's documents hold the document, and the document's steps hold the
step, with the same rows and tokens, whichever of the two was drawn first.

    python benchmarks/trace_proof.py run=demo/runs/demo spans=1000 pairs=1000
"""

import json
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from llmtrain.config.trace import TraceConfig
from llmtrain.data.trace import Stretch, sightings, step_content
from llmtrain.trace.documents import look
from llmtrain.trace.proof import ask, verdict
from llmtrain.trace.run import TracedRun, open_run

SEED = 0


def random_span(run: TracedRun, rng: np.random.Generator) -> Stretch:
    """A random part of a random stretch of a random step."""
    content = step_content(run.plan, int(rng.integers(run.done)))
    stretch = content[int(rng.integers(len(content)))]
    length = stretch.tokens[1] - stretch.tokens[0]
    low = int(rng.integers(length))
    high = int(rng.integers(low + 1, length + 1))
    (first, _), (token, _) = stretch.inputs, stretch.tokens
    return stretch._replace(inputs=(first + low, first + high), tokens=(token + low, token + high))


def prove(run: TracedRun, config: TraceConfig, number: int) -> tuple[Counter[str], int, int]:
    """Reasons why spans are not proven, characters compared, and characters that rules put in."""
    rng = np.random.default_rng(SEED)
    seen = look(run, [random_span(run, rng) for _ in range(number)])
    answers = ask(run, seen, config)
    problems = Counter(verdict(one, answers.get(one.document.key)) for one in seen)
    compared = sum(length for one in seen for *_, length in one.runs)
    return problems, compared, sum(one.num_inserted for one in seen)


def agree(run: TracedRun, number: int) -> int:
    """Pairs of (step, document) for which both directions tell the same; half drawn each way."""
    rng, good = np.random.default_rng(SEED + 1), 0
    while number:
        if number % 2:
            step = int(rng.integers(run.done))
            content = step_content(run.plan, step)
            drawn = content[int(rng.integers(len(content)))]
        else:
            source = int(rng.integers(len(run.plan.orders)))
            document = int(rng.integers(run.store(source).num_documents))
            found = sightings(run.plan, source, document, before_step=run.done)
            if not found:
                continue  # no step has seen it yet
            drawn = found[int(rng.integers(len(found)))]
        forward = [s for s in step_content(run.plan, drawn.step) if _pair(s) == _pair(drawn)]
        backward = sightings(run.plan, drawn.source, drawn.document, before_step=run.done)
        good += drawn in forward and forward == [s for s in backward if s.step == drawn.step]
        number -= 1
    return good


def _pair(stretch: Stretch) -> tuple[int, int]:
    return stretch.source, stretch.document


def main() -> int:
    """Print what is proven; status 1 if anything is not."""
    given = {"run": "demo/runs/demo", "spans": "1000", "pairs": "1000"}
    given |= dict(word.split("=", 1) for word in sys.argv[1:])
    config = TraceConfig(run=given["run"], step=1, verify=True, rules=False)
    run, spans, pairs = open_run(config), int(given["spans"]), int(given["pairs"])
    start = time.perf_counter()
    problems, compared, inserted = prove(run, config, spans)
    proven, proof_s = problems.pop("", 0), time.perf_counter() - start
    start = time.perf_counter()
    good = agree(run, pairs)
    print(json.dumps({
        "run": given["run"], "steps": run.done, "spans": spans, "proven": proven,
        "characters_compared": compared, "characters_inserted_by_rules": inserted,
        "proof_s": round(proof_s, 1), "pairs": pairs, "agree": good,
        "agree_s": round(time.perf_counter() - start, 1), "problems": dict(problems),
    }, indent=1))  # fmt: skip
    return 0 if proven == spans and good == pairs else 1


if __name__ == "__main__":
    sys.exit(main())
