"""The process that runs trafilatura, one page after another, until its parent closes the pipe.

Every page has a limit of processor time that the kernel enforces: an expression that backtracks for
ever holds the interpreter, so nothing inside it could stop it. Only ``trafilatura_process`` starts
this: ``python -m data_pipeline.read.trafilatura_child HANDLE OPTIONS LIMIT_S``.
"""

import json
import logging
import os
import signal
import sys
from multiprocessing.connection import Connection
from typing import Any

TEXT = b"t"
"""Begins an answer that holds the text."""
FAILED = b"f"
"""Begins an answer that holds what was raised."""


def main(handle: int, options: dict[str, Any], limit_s: float) -> None:
    """Answer pages until the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver decides what Ctrl-C means
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    pipe = Connection(handle)
    from trafilatura import extract

    logging.disable()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the parent reads what goes wrong up to here
    pipe.send_bytes(TEXT)
    while True:
        try:
            html = pipe.recv_bytes().decode()
        except (EOFError, OSError):
            return
        signal.setitimer(signal.ITIMER_PROF, limit_s)
        try:
            text = extract(html, **options) or ""
            answer = TEXT + text.encode("utf-8", "replace")
        except Exception as error:  # whatever a page makes it raise costs that page alone
            answer = FAILED + repr(error).encode("utf-8", "replace")
        signal.setitimer(signal.ITIMER_PROF, 0)
        try:
            pipe.send_bytes(answer)
        except OSError:
            return


if __name__ == "__main__":
    main(int(sys.argv[1]), json.loads(sys.argv[2]), float(sys.argv[3]))
