"""Runs stages on request, for a caller that times two sides in turn.

A request is a line of JSON with the name of the stage and its arguments; the answer is a line with
what the stage returned and how long it took, start-up and imports before the first request left
out. Nothing but the standard library is needed, so that every interpreter can run it.

    serve({"c4": judge_c4})   # {"stage": "c4", "inputs": [...]} -> {"seconds": 1.2, "result": ...}
"""

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

Stage = Callable[..., Any]


def serve(stages: Mapping[str, Stage]) -> None:
    """Answer requests on standard input until it ends; prints of libraries go to standard error."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        answers.write(json.dumps(answer(stages, request)) + "\n")
        answers.flush()


def answer(stages: Mapping[str, Stage], request: dict[str, Any]) -> dict[str, Any]:
    """Run the stage a request names; an error becomes part of the answer."""
    started = time.perf_counter()
    try:
        result = stages[request.pop("stage")](**request)
    except Exception:
        return {"error": traceback.format_exc()}
    return {"seconds": time.perf_counter() - started, "result": result}
