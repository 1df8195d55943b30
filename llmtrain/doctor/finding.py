"""A finding: what was looked at, what is there, and what to do where that is not well.

Invariant: asking never fails and never hangs. A question that raises or takes too long is itself a
finding.

    findings = ask([Question("machine", "cores", cores)], timeout_s=10)
"""

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["ok", "warn", "bad"]
"""``ok``; ``warn``: a run works, but slower or with a risk; ``bad``: a run would fail."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of what a machine has."""

    name: str
    """What was looked at."""
    value: str
    """What is there."""
    verdict: Verdict = "ok"
    """How well that is."""
    advice: str = ""
    """What to do; empty where the verdict is ok."""

    def __post_init__(self) -> None:
        """A verdict that asks for something says what."""
        if (self.verdict == "ok") == bool(self.advice):
            raise ValueError(f"{self.name} is {self.verdict}, its advice is '{self.advice}'")


@dataclass(frozen=True, slots=True)
class Question:
    """Something to find out about a machine."""

    section: str
    """Heading it stands under."""
    name: str
    """What it is about, in case that there is no answer."""
    answer: Callable[[], Iterable[Finding]]
    """Gives its findings; it may raise and may hang."""


def ask(questions: Sequence[Question], timeout_s: float) -> list[tuple[str, Finding]]:
    """Answer the questions in turn, each within ``timeout_s``; gives (section, finding)."""
    return [
        (question.section, finding)
        for question in questions
        for finding in _answer(question, timeout_s)
    ]


def _answer(question: Question, timeout_s: float) -> list[Finding]:
    """The findings of one question; a thread that hangs is left behind."""
    found: list[Finding] = []
    failed: list[Exception] = []

    def work() -> None:
        try:
            found.extend(question.answer())
        except Exception as error:  # whatever it is, the other questions are to be asked
            failed.append(error)

    thread = threading.Thread(target=work, name=question.name, daemon=True)
    thread.start()
    thread.join(timeout_s)
    if thread.is_alive():
        return [*found, Finding(
            name=question.name, value=f"no answer within {timeout_s:g} s", verdict="warn",
            advice="a driver or a file system may hang; look at dmesg, or give it more timeout_s",
        )]  # fmt: skip
    if failed:
        reason = f"{type(failed[0]).__name__}: {failed[0]}".splitlines()[0]
        return [*found, Finding(
            name=question.name, value=f"could not be found out ({reason})", verdict="warn",
            advice="look at what the message names",
        )]  # fmt: skip
    return found
