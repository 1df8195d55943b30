"""The same as ``verdict.render`` as a self-contained HTML page.

Path("why.html").write_text(render([explained]))
"""

import html
from collections.abc import Sequence

from data_pipeline.report.markup import card, code, page, table
from data_pipeline.report.verdict import Explained, shown


def render(found: Sequence[Explained]) -> str:
    """Return the page of some documents."""
    return page("explain · llmtrain-data", "\n".join(_document(one) for one in found))


def _document(one: Explained) -> str:
    kind = "status stopped" if one.reason else "status"
    place = one.reason or "kept"
    head = (
        f"<header><h1>{html.escape(one.document.url or one.document.id)} "
        f'<span class="{kind}">{html.escape(place)}</span></h1>'
        f"<p>{html.escape(one.verdict)}. {code(one.document.id)}, {html.escape(one.origin)}.</p>"
        "</header>"
    )
    events = table(
        ["step", "what happened"],
        ([code(e.place), html.escape(e.outcome)] for e in one.events),
        texts=("what happened",),
    )
    rules = table(
        ["rule", "measured", "limit", "verdict"],
        (
            [code(f.rule), html.escape(shown(f.value)), html.escape(f.limit), _mark(f.passed)]
            for event in one.events
            for f in event.findings
        ),
        texts=("limit",),
    )
    text = f'<figure class="sample"><p>{html.escape(one.head)}</p></figure>'
    cards = [
        card("Steps", "In the order they ran.", events, wide=True),
        card("Rules", "Measured on the text as it came to the step; after it was dropped, as it "
             "was then.", rules, wide=True),
        card("Text", "As it was last.", text, wide=True),
    ]  # fmt: skip
    return f'{head}<div class="cards" style="margin-top:20px">{"".join(cards)}</div>'


def _mark(passed: bool) -> str:
    return (
        f'<span class="verdict {"pass" if passed else "fail"}">{"ok" if passed else "fails"}</span>'
    )
