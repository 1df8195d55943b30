"""Python source, package descriptions and licences to web pages, for the sample crawl.

Source is parsed with ``ast`` and never imported, so no foreign code runs. A module gives one page;
what is long enough to stand alone (a class, a function, a method) gets its own, which the module's
page links to and quotes the first sentence of, as documentation sites do.

    module_pages(Path("queue.py").read_bytes(), "queue", "https://docs.example/python")
"""

import ast
import html
import inspect
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from data_pipeline.sample.markup import to_html

OWN_PAGE_CHARS = 1500
"""Documentation of at least this many characters stands on its own page."""

MINIMUM_PAGE_CHARS = 200
"""A module with less documentation than this gets no page."""

_NUM_SIBLINGS = 24
_STYLE = (
    "body{font:16px/1.5 sans-serif;margin:0}main{max-width:48em;margin:auto;padding:1em}"
    "pre{background:#f4f4f4;padding:.6em;overflow:auto}nav.sidebar{float:left;width:16em}"
    "dt{font-weight:bold}footer{clear:both;color:#666;padding:1em}code.xref{color:#06c}"
)
_FRAME = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="canonical" href="{url}">
<style>{style}</style>
<script>document.documentElement.className = "scripted";</script>
</head>
<body>
<header class="site-header"><a href="https://docs.example/">Documentation</a>
<form action="/search" role="search"><input name="q" placeholder="Search the docs"></form>
<noscript>Please enable JavaScript to search this site.</noscript></header>
<nav class="breadcrumbs" aria-label="Breadcrumbs">{breadcrumbs}</nav>
<nav class="sidebar" aria-label="Contents"><ul>
{sidebar}
</ul></nav>
<main><article>
{body}
</article></main>
<footer class="site-footer">
<p>By using this site you agree to our terms of use and cookie policy.</p>
<a href="/privacy">Privacy</a> <a href="/about">About</a> <a href="#top">Back to top</a></footer>
</body>
</html>
"""

_Documented = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """One page before navigation is put around it."""

    url: str
    """Address."""
    title: str
    """Title of the page and of its link."""
    body: str
    """HTML of the article."""


@dataclass(slots=True)
class _Entry:
    """A documented thing: its text, its signature, what it contains."""

    name: str
    signature: str
    doc: str
    members: "list[_Entry]"

    def size(self) -> int:
        """Return the characters of documentation, members included."""
        return len(self.doc) + sum(member.size() for member in self.members)


def module_pages(source: bytes, module: str, prefix: str) -> list[Page]:
    """Return the pages of one module; none if it does not parse or says little.

    Args:
        source: The module's source file.
        module: Dotted name, such as ``json.decoder``.
        prefix: Address of the project's documentation, without a slash at the end.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return []
    url = f"{prefix}/{module.replace('.', '/')}"
    entry = _Entry(module, "", ast.get_docstring(tree) or "", _members(tree))
    entry.members.extend(_attached(tree))
    if entry.size() < MINIMUM_PAGE_CHARS:
        return []
    return list(_pages(entry, url, module))


def text_page(text: str, title: str, url: str) -> Page:
    """Return the page of a package description or of a licence."""
    without_tags = re.sub(r"<!--.*?-->|</?[A-Za-z][^>\n]*>", "", text, flags=re.DOTALL)
    return Page(
        url=url, title=title, body=f"<h1>{html.escape(title)}</h1>\n{to_html(without_tags)}"
    )


def render(page: Page, siblings: Sequence[Page]) -> bytes:
    """Return the page as UTF-8 HTML with header, breadcrumbs, sidebar and footer around it."""
    parts = page.url.removeprefix("https://").split("/")
    crumbs = (
        f'<a href="https://{"/".join(parts[: depth + 1])}">{html.escape(part)}</a>'
        for depth, part in enumerate(parts)
    )
    here = next((i for i, other in enumerate(siblings) if other.url == page.url), 0)
    first = max(0, min(here - _NUM_SIBLINGS // 2, len(siblings) - _NUM_SIBLINGS))
    sidebar = "\n".join(
        f'<li><a class="reference internal" href="{other.url}">{html.escape(other.title)}</a></li>'
        for other in siblings[first : first + _NUM_SIBLINGS]
    )
    return _FRAME.format(
        title=html.escape(page.title),
        url=html.escape(page.url),
        style=_STYLE,
        breadcrumbs=" &raquo; ".join(crumbs),
        sidebar=sidebar,
        body=page.body,
    ).encode("utf-8", "replace")


def _members(node: ast.Module | ast.ClassDef) -> list[_Entry]:
    """Return the documented classes and functions directly inside ``node``."""
    found: list[_Entry] = []
    for child in node.body:
        if not isinstance(child, _Documented):
            continue
        doc = ast.get_docstring(child) or ""
        members = _members(child) if isinstance(child, ast.ClassDef) else []
        if doc or members:
            found.append(_Entry(child.name, _signature(child), doc, members))
    return found


def _signature(node: _Documented) -> str:
    """Return how the thing is called or derived."""
    if isinstance(node, ast.ClassDef):
        return f"class {node.name}({', '.join(ast.unparse(base) for base in node.bases)})"
    return f"{node.name}({ast.unparse(node.args)})"


def _attached(tree: ast.Module) -> Iterator[_Entry]:
    """Yield documentation that is data: ``add_docstr(f, "...")`` calls and dicts of long texts.

    Modules written in C keep theirs so (numpy, torch), and ``pydoc_data.topics`` its chapters.
    """
    for node in tree.body:
        value = node.value if isinstance(node, ast.Expr | ast.Assign) else None
        if isinstance(value, ast.Dict):
            pairs = zip(value.keys, value.values, strict=True)
            texts = [(_constant(key), _constant(text)) for key, text in pairs]
        elif isinstance(value, ast.Call) and len(value.args) > 1:
            texts = [_call_documentation(value)]
        else:
            continue
        for name, text in texts:
            if name and len(text) >= MINIMUM_PAGE_CHARS and " " not in name:
                yield _Entry(name, "", inspect.cleandoc(text), [])


def _call_documentation(call: ast.Call) -> tuple[str, str]:
    """Return the name and the text that a documenting call attaches to it."""
    *targets, last = call.args
    if isinstance(last, ast.Tuple) and len(last.elts) == 2:
        targets, last = [*targets, last.elts[0]], last.elts[1]
    elif isinstance(last, ast.Call) and isinstance(last.func, ast.Attribute):
        last = last.func.value  # "...".format(**common)
    names = [_constant(target) or ast.unparse(target) for target in targets]
    return ".".join(names), _constant(last)


def _constant(node: ast.expr | None) -> str:
    """Return the value of a string constant, or an empty string."""
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def _pages(entry: _Entry, url: str, title: str) -> Iterator[Page]:
    """Yield the page of ``entry`` and those of its members that are long enough for their own."""
    parts = [f"<h1>{html.escape(title)}</h1>"]
    if entry.signature:
        parts.append(f"<pre>{html.escape(entry.signature)}</pre>")
    parts.append(to_html(entry.doc))
    own: list[tuple[_Entry, str]] = []
    for member in entry.members:
        link = f"{url}/{member.name}"
        if member.size() >= OWN_PAGE_CHARS:
            own.append((member, link))
            parts.append(f'<h2><a href="{link}">{html.escape(member.name)}</a></h2>')
            parts.append(f"<p>{html.escape(_first_sentence(member.doc), quote=False)}</p>")
        else:
            parts.extend(_section(member))
    yield Page(url=url, title=title, body="\n".join(parts))
    for member, link in own:
        yield from _pages(member, link, f"{title}.{member.name}")


def _section(entry: _Entry) -> Iterator[str]:
    """Yield the HTML of a short entry inside another's page."""
    yield f'<h2 id="{html.escape(entry.name)}">{html.escape(entry.name)}</h2>'
    if entry.signature:
        yield f"<pre>{html.escape(entry.signature)}</pre>"
    yield to_html(entry.doc)
    for member in entry.members:
        yield from _section(member)


def _first_sentence(doc: str) -> str:
    """Return the first sentence of a docstring, at most its first paragraph."""
    paragraph = " ".join(doc.strip().split("\n\n")[0].split())
    return re.split(r"(?<=[.!?])\s", paragraph, maxsplit=1)[0]
