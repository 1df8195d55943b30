"""Personal data and secrets in texts: replaced one by one, or the document dropped, per kind.

By default e-mail and public IPv4 addresses are replaced by FineWeb's placeholders
(arXiv:2406.17557), and bank accounts, card numbers and secrets by others. Placeholders take turns
from the first in every document, so that the text alone says what becomes of it; a text with
placeholders only does not change. What is replaced by nothing and leaves nothing goes as a whole.

    Pii(config)(document)  # Kept(..., deleted={"pii.email": 17}, inserted=17)
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

from data_pipeline.config.content import PiiAction, PiiConfig
from data_pipeline.document import Document, spliced
from data_pipeline.filters.pii_patterns import (
    Span,
    find_cards,
    find_emails,
    find_ibans,
    find_ipv4,
    find_phones,
)
from data_pipeline.filters.pii_scan import AT, CODE, DOTTED, LONG, PHONE, Traces, scan
from data_pipeline.filters.secret_tokens import find_secrets
from data_pipeline.step import Dropped, Finding, Kept, StepKind, Verdict


@dataclass(frozen=True, slots=True)
class _Kind:
    """One kind of personal data."""

    name: str
    action: PiiAction
    replacements: tuple[str, ...]
    find: Callable[[str, Traces], Iterable[Span]]


def _kinds(config: PiiConfig) -> list[_Kind]:
    """Return the kinds in the order they claim stretches: of two that overlap, the first has it."""
    public = config.public_ips_only
    return [
        _Kind(
            "secret", config.secret, config.secret_replacements,
            lambda text, seen: find_secrets(text, seen.literals) if seen.literals else (),
        ),
        _Kind(
            "email", config.email, config.email_replacements,
            lambda text, seen: find_emails(text) if seen.marks & AT else (),
        ),
        _Kind(
            "ip", config.ip, config.ip_replacements,
            lambda text, seen: find_ipv4(text, public_only=public) if seen.marks & DOTTED else (),
        ),
        _Kind(
            "iban", config.iban, config.iban_replacements,
            lambda text, seen: find_ibans(text) if seen.marks & CODE else (),
        ),
        _Kind(
            "credit_card", config.credit_card, config.credit_card_replacements,
            lambda text, seen: find_cards(text) if seen.marks & LONG else (),
        ),
        _Kind(
            "phone", config.phone, config.phone_replacements,
            lambda text, seen: find_phones(text) if seen.marks & PHONE else (),
        ),
    ]  # fmt: skip


_Stretch = tuple[int, int, str]
"""Start, end, and what stands there instead."""


class Pii:
    """Replaces personal data, or drops the documents that have some."""

    name = "pii"

    def __init__(self, config: PiiConfig) -> None:
        self._kinds = _kinds(config)

    def __call__(self, document: Document) -> Verdict:
        """Return the document with placeholders, or drop it."""
        taken: list[_Stretch] = []
        deleted: dict[str, int] = {}
        seen = scan(document.text)
        for kind in self._kinds:
            if kind.action == "keep":
                continue
            found = _stretches(document.text, seen, kind, taken)
            if found and kind.action == "drop":
                return Dropped(f"pii.{kind.name}")
            if found:
                deleted[f"pii.{kind.name}"] = sum(end - start for start, end, _ in found)
                taken = sorted(taken + found)
        if not taken:
            return Kept(document)
        text, runs = spliced(document.text, taken)
        if not text.strip():
            return Dropped("pii.empty")
        inserted = sum(len(instead) for _, _, instead in taken)
        return Kept(document.edited(text, runs), deleted, inserted)

    def findings(self, document: Document) -> list[Finding]:
        """Return how many stretches of each kind a document has; whole values are not shown."""
        result = []
        taken: list[_Stretch] = []
        seen = scan(document.text)
        for kind in self._kinds:
            found = _stretches(document.text, seen, kind, taken)
            if kind.action != "keep":
                taken = sorted(taken + found)
            limit = {"keep": "not looked at", "replace": "replaced", "drop": "none"}[kind.action]
            passed = not found or kind.action != "drop"
            result.append(Finding(f"pii.{kind.name}", len(found), limit, passed))
        return result


def _stretches(text: str, seen: Traces, kind: _Kind, taken: list[_Stretch]) -> list[_Stretch]:
    """Return the stretches of a kind; placeholders and what is taken (in order) are left out."""
    found: list[_Stretch] = []
    starts = [start for start, _, _ in taken]
    done = 0
    for start, end in sorted(kind.find(text, seen)):
        before = bisect_left(starts, end)  # of those that begin before the end, the last
        clash = start < done or (before > 0 and taken[before - 1][1] > start)
        if not clash and text[start:end] not in kind.replacements:
            instead = kind.replacements[len(found) % len(kind.replacements)]
            found.append((start, end, instead))
            done = end
    return found


PII = StepKind(
    build=Pii,
    options=lambda config: {"config": config.pii},
    settings=lambda config: asdict(config.pii),
)
"""How the step comes out of the configuration."""
