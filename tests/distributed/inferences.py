"""What ranks do in the tests of inference over several of them."""

import numpy as np

from llmtrain.eval.decoding import generate
from llmtrain.eval.perplexity import nats_of
from llmtrain.eval.sampling import Sampling
from llmtrain.eval.trained import opened_run
from llmtrain.parallel.place import Place

PROMPTS = [[5, 9, 2, 11, 30], [7], [3, 3, 8, 1]]
"""Three rows: two ranks do not divide them."""


def infer(place: Place, run: str, tp: int) -> tuple[list[list[list[int]]], float]:
    """Greedy and drawn continuations, and the loss of two documents."""
    with opened_run(run, None, tp, place) as trained:
        drawn = Sampling(max_new_tokens=24, temperature=0.8, repetition_penalty=1.2)
        settings = (Sampling(max_new_tokens=24, temperature=0), drawn)
        rows = [generate(trained.model, PROMPTS, sampling) for sampling in settings]
        documents = [np.arange(3, 40), np.arange(9, 20)]
        return rows, nats_of(trained.model, documents, 16, 64)
