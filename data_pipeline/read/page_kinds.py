"""What a single file holds, by the ending of its name: HTML, text, Markdown or code.

page_kind("manual.md")   # PageKind("markdown", "text/markdown", "")
"""

from pathlib import PurePosixPath
from typing import NamedTuple


class PageKind(NamedTuple):
    """How a file is read and what is noted of it."""

    name: str
    """``html``, ``text``, ``markdown`` or ``code``."""
    content_type: str
    """Media type its bytes are taken for."""
    language: str
    """Programming language, of code."""


_HTML = ("html", "htm", "xhtml", "shtml")
_TEXT = ("txt", "text", "rst", "adoc", "asciidoc", "org", "tex", "textile")
_MARKDOWN = ("md", "markdown", "mdown", "mkd")
_CODE = {
    "assembly": "asm s", "batch": "bat cmd", "c": "c h", "c++": "cc cpp cxx hh hpp hxx",
    "c#": "cs", "clojure": "clj cljs cljc", "cmake": "cmake", "css": "css scss sass less",
    "cuda": "cu cuh", "d": "d", "dart": "dart", "elixir": "ex exs", "elm": "elm", "erlang": "erl",
    "f#": "fs fsx", "fortran": "f f77 f90 f95 f03 for", "go": "go", "graphql": "graphql",
    "groovy": "groovy gradle", "haskell": "hs", "java": "java", "javascript": "js jsx mjs cjs",
    "julia": "jl", "kotlin": "kt kts", "lisp": "lisp el scm rkt", "lua": "lua", "nim": "nim",
    "nix": "nix", "objective-c": "m mm", "ocaml": "ml mli", "pascal": "pas", "perl": "pl pm",
    "php": "php", "powershell": "ps1", "prolog": "pro", "protobuf": "proto", "python": "py pyi",
    "r": "r", "ruby": "rb", "rust": "rs", "scala": "scala sc", "shell": "sh bash zsh fish",
    "solidity": "sol", "sql": "sql", "swift": "swift", "tcl": "tcl", "terraform": "tf",
    "toml": "toml", "typescript": "ts tsx", "verilog": "v sv", "vhdl": "vhd vhdl", "vue": "vue",
    "yaml": "yaml yml", "zig": "zig",
}  # fmt: skip
_KINDS = {
    **{ending: PageKind("html", "text/html", "") for ending in _HTML},
    **{ending: PageKind("text", "text/plain", "") for ending in _TEXT},
    **{ending: PageKind("markdown", "text/markdown", "") for ending in _MARKDOWN},
    **{
        ending: PageKind("code", "text/plain", language)
        for language, endings in _CODE.items()
        for ending in endings.split()
    },
}


def page_kind(name: str) -> PageKind | None:
    """Return what a file of this name holds, or None if that is not known."""
    return _KINDS.get(PurePosixPath(name).suffix.lower().removeprefix("."))
