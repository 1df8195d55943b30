r"""Docstrings, reStructuredText and Markdown to plain HTML, for the sample crawl.

Hard-wrapped paragraphs become one ``<p>`` each, examples and tables become ``<pre>``, parameter
lists become ``<dl>``; inline markup turns into tags. Light on purpose: what it does not know it
passes on as text, and it never fails on odd input.

    to_html("Add two numbers.\n\n>>> add(1, 2)\n3")  # <p>Add two numbers.</p> <pre>...</pre>
"""

import html
import re
import textwrap

_UNDERLINE = re.compile(r"([=\-~^\"#*+`.:'])\1{2,}\s*$")
_TABLE = re.compile(r"\s*(\+[-=+]{3,}|={3,}(\s+={2,})+|\|.*\||-{3,}(\s+-{2,})+)\s*$")
_DIRECTIVE = re.compile(r"\.\.\s+(?:\|[^|]+\|\s+)?([\w:-]+)::\s*(.*)$")
_COMMENT = re.compile(r"\.\.(\s|$)")
_FIELD = re.compile(r":(\w[^:`]*):(?:\s+(.*))?$")
_BULLET = re.compile(r"([-*+•]|\(?(?:\d{1,2}|[a-z])[.)])\s+")
_SECTION = re.compile(
    r"(Args|Arguments|Parameters|Params|Returns?|Yields?|Raises|Examples?|Notes?|Attributes|"
    r"Keyword Args|Keyword Arguments|See also|References|Usage|Warnings?|Shape|Inputs?|Outputs?)"
    r":\s*$",
    re.IGNORECASE,
)
_TERM = re.compile(r"[\w*`.,\[\]' ]{1,60}( : .*|\s?\(.*\))?:?$|[\w*`]+ ?(\(.*\))?: ")
_PROSE_DIRECTIVES = {
    "note", "warning", "tip", "important", "caution", "attention", "danger", "hint", "seealso",
    "admonition", "deprecated", "versionadded", "versionchanged", "rubric", "topic", "glossary",
}  # fmt: skip
_CODE_MARKS = re.compile(r"[=(){}\[\];<>|\\]|^\s*[$%#]")

_INLINE = re.compile(
    r"``(?P<literal>.+?)``"
    r"|:math:`(?P<math>[^`]+)`"
    r"|:[\w:+-]+:`(?P<role>[^`]+)`"
    r"|`(?P<text>[^`&]+?)\s*&lt;(?P<target>[^`&]+)&gt;`__?"
    r"|`(?P<quoted>[^`]+)`_{0,2}"
    r"|!\[[^\]]*\]\([^)]*\)"
    r"|\[(?P<label>[^\]\[]+)\]\((?P<href>[^)\s]+)[^)]*\)"
    r"|\[(?P<note>\d+|#\w*)\]_"
    r"|\*\*(?P<strong>[^*\s](?:[^*]*[^*\s])?)\*\*"
    r"|(?<![\w*])\*(?P<em>[^*\s](?:[^*]*[^*\s])?)\*(?![\w*])"
    r"|(?P<url>https?://[^\s<>\"')]+[^\s<>\"').,;:])"
)
_LATEX = (
    (re.compile(r"\\(?:d|t)?frac\{([^{}]*)\}\{([^{}]*)\}"), r"(\1)/(\2)"),
    (re.compile(r"\\(?:text|mathrm|mathbf|mathbb|mathcal|operatorname|mbox)\{([^{}]*)\}"), r"\1"),
    (re.compile(r"\\sqrt\{([^{}]*)\}"), r"√(\1)"),
    (re.compile(r"\^\{([^{}]*)\}|\^(\w)"), r"<sup>\1\2</sup>"),
    (re.compile(r"_\{([^{}]*)\}|_(\w)"), r"<sub>\1\2</sub>"),
    (re.compile(r"\\(?:(?:left|right|quad|qquad)\b|[,;!])"), " "),
    (re.compile(r"\\([A-Za-z]+)"), r"\1"),
    (re.compile(r"[{}]"), ""),
)


def to_html(text: str) -> str:
    """Return the HTML blocks of a docstring or a package description."""
    lines = textwrap.dedent(text.expandtabs(4)).strip("\n").split("\n")
    return "\n".join(_blocks([line.rstrip() for line in lines]))


def inline(text: str) -> str:
    """Return one line of text with its inline markup as tags."""
    return _INLINE.sub(_tag, html.escape(text, quote=False))


def _tag(match: re.Match[str]) -> str:
    """Return the HTML for one piece of inline markup."""
    kind = match.lastgroup
    if kind is None:
        return ""
    value = match[kind]
    if kind in ("literal", "quoted"):
        return f"<code>{value}</code>"
    if kind == "math":
        return f'<span class="math">{_math(value)}</span>'
    if kind == "role":
        shown = value.split(" &lt;")[0].lstrip("~!")
        return f'<code class="xref">{shown.rsplit(".", 1)[-1] if value[0] == "~" else shown}</code>'
    if kind == "target":
        return f'<a href="{html.escape(value)}">{match["text"]}</a>'
    if kind == "href":
        return f'<a href="{html.escape(value)}">{match["label"]}</a>'
    if kind == "note":
        return f'<a class="footnote" href="#note-{value}">[{value}]</a>'
    if kind == "url":
        return f'<a href="{html.escape(value)}">{value}</a>'
    return f"<{kind}>{value}</{kind}>"


def _math(source: str) -> str:
    """Return simple LaTeX as HTML; unknown commands stay as words."""
    for pattern, replacement in _LATEX:
        source = pattern.sub(replacement, source)
    return source


def _blocks(lines: list[str]) -> list[str]:
    """Split lines without common indentation into HTML blocks."""
    result: list[str] = []
    at = 0
    while at < len(lines):
        line = lines[at]
        if not line.strip():
            at += 1
        elif line.startswith(">>> ") or _TABLE.match(line):
            at = _until_blank(lines, at, result)
        elif line.lstrip().startswith(("```", "~~~")):
            at = _fence(lines, at, result)
        elif at + 1 < len(lines) and len(line) > 1 and _UNDERLINE.fullmatch(lines[at + 1]):
            result.append(f"<h3>{inline(line.strip())}</h3>")
            at += 2
        elif _UNDERLINE.fullmatch(line):
            at += 1
        elif re.match(r"#{1,6} ", line):
            result.append(f"<h3>{inline(line.strip('# '))}</h3>")
            at += 1
        elif line.startswith(".."):
            at = _directive(lines, at, result)
        elif line.startswith(" "):
            at = _indented(lines, at, result)
        elif _BULLET.match(line):
            at = _list(lines, at, result)
        elif _FIELD.match(line) or (at + 1 < len(lines) and lines[at + 1].startswith(" ")):
            at = _definition(lines, at, result)
        else:
            at = _paragraph(lines, at, result)
    return result


def _until_blank(lines: list[str], at: int, result: list[str]) -> int:
    """Append the lines up to the next blank one as they stand."""
    end = at
    while end < len(lines) and lines[end].strip():
        end += 1
    result.append(_pre(lines[at:end]))
    return end


def _fence(lines: list[str], at: int, result: list[str]) -> int:
    """Append a fenced code block of Markdown."""
    mark = lines[at].lstrip()[:3]
    end = at + 1
    while end < len(lines) and not lines[end].lstrip().startswith(mark):
        end += 1
    result.append(_pre(lines[at + 1 : end]))
    return end + 1


def _body(lines: list[str], at: int) -> int:
    """Return the end of the indented block that starts at ``at``, blank lines inside included."""
    end = at
    while end < len(lines) and (not lines[end].strip() or lines[end].startswith(" ")):
        end += 1
    while end > at and not lines[end - 1].strip():
        end -= 1
    return end


def _directive(lines: list[str], at: int, result: list[str]) -> int:
    """Append a directive: admonitions as prose, maths and code as they stand, others not at all."""
    end = _body(lines, at + 1)
    body = _dedent(lines[at + 1 : end])
    match = _DIRECTIVE.match(lines[at])
    if match is None:
        if not _COMMENT.match(lines[at]):
            return _paragraph(lines, at, result)
        note = re.match(r"\.\.\s+\[(\w+)\]\s+(.*)$", lines[at])
        if note:
            text = " ".join([note[2], *(line.strip() for line in body)])
            result.append(f"<p>[{html.escape(note[1])}] {inline(text)}</p>")
        return end
    name, argument = match[1], match[2]
    if name in _PROSE_DIRECTIVES:
        inner = _blocks([line for line in [argument, *body] if not re.match(r":\w+:", line)])
        result.append(f'<div class="admonition {name}">{"".join(inner)}</div>')
    elif name == "math":
        text = " ".join([argument, *body])
        result.append(f'<p class="math">{_math(html.escape(text, quote=False))}</p>')
    elif body:
        result.append(_pre([line for line in body if not re.match(r":\w+:", line)]))
    return end


def _indented(lines: list[str], at: int, result: list[str]) -> int:
    """Append an indented block: a quotation where it reads like prose, else code."""
    end = _body(lines, at)
    body = _dedent(lines[at:end])
    full = [line for line in body if line.strip()]
    coded = sum(bool(_CODE_MARKS.search(line)) for line in full)
    if body[0].startswith(">>>") or coded * 2 > len(full):
        result.append(_pre(body))
    else:
        result.append(f"<blockquote>{''.join(_blocks(body))}</blockquote>")
    return end


def _list(lines: list[str], at: int, result: list[str]) -> int:
    """Append a run of list items."""
    items: list[str] = []
    while at < len(lines) and (match := _BULLET.match(lines[at])):
        end = at + 1
        while end < len(lines) and lines[end].strip() and not _BULLET.match(lines[end]):
            end += 1
        if end < len(lines) and not lines[end].strip():
            end = max(end, _body(lines, end))
        first = lines[at][match.end() :]
        items.append(f"<li>{''.join(_blocks([first, *_dedent(lines[at + 1 : end])]))}</li>")
        at = end
        while at + 1 < len(lines) and not lines[at].strip() and _BULLET.match(lines[at + 1]):
            at += 1
    result.append(f"<ul>{''.join(items)}</ul>")
    return at


def _definition(lines: list[str], at: int, result: list[str]) -> int:
    """Append a term with its indented explanation, or a section such as ``Args:``."""
    end = _body(lines, at + 1)
    body = _dedent(lines[at + 1 : end])
    field = _FIELD.match(lines[at])
    if field:
        term, first = field[1], field[2] or ""
        inner = _blocks([" ".join([first, *(line.strip() for line in body)]).strip()])
        result.append(
            f"<dl><dt><code>{html.escape(term)}</code></dt><dd>{''.join(inner)}</dd></dl>"
        )
    elif _SECTION.match(lines[at]):
        result.append(f"<h3>{lines[at].strip(' :')}</h3>")
        result.extend(_blocks(body))
    elif lines[at].endswith("::"):
        result.append(f"<p>{inline(lines[at][:-1])}</p>{_pre(body)}")
    elif re.match(r"[\w*`.,\[\]' ]{1,60}( : .*|\s?\(.*\))?:?$|[\w*`]+ ?(\(.*\))?: ", lines[at]):
        term, _, first = (
            lines[at].partition(": ") if " : " not in lines[at] else (lines[at], "", "")
        )
        inner = _blocks([first, *body])
        result.append(f"<dl><dt>{inline(term.rstrip(':'))}</dt><dd>{''.join(inner)}</dd></dl>")
    else:
        # A paragraph whose continuation is indented.
        result.extend(_blocks([lines[at], *body]) if body else [f"<p>{inline(lines[at])}</p>"])
    return end


def _paragraph(lines: list[str], at: int, result: list[str]) -> int:
    """Append one reflowed paragraph; a final ``::`` announces an indented block of code."""
    end = at + 1
    while (
        end < len(lines)
        and lines[end].strip()
        and not lines[end].startswith((">>>", ".. ", "```"))
        and not (end + 1 < len(lines) and _UNDERLINE.fullmatch(lines[end + 1]))
        and not (_BULLET.match(lines[end]) and lines[end][0] in "-*+•")
        and not _FIELD.match(lines[end])
    ):
        end += 1
    text = " ".join(line.strip() for line in lines[at:end])
    code = text.endswith("::")
    result.append(f"<p>{inline(text.removesuffix(':') if code else text)}</p>")
    if code:
        stop = _body(lines, end)
        if stop > end:
            result.append(_pre(_dedent(lines[end:stop])))
            return stop
    return end


def _pre(lines: list[str]) -> str:
    """Return lines as they stand."""
    return f"<pre>{html.escape(chr(10).join(lines).strip(chr(10)), quote=False)}</pre>"


def _dedent(lines: list[str]) -> list[str]:
    """Return lines without their common indentation."""
    return textwrap.dedent("\n".join(lines)).split("\n") if lines else []
