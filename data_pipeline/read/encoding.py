"""Which encoding bytes are in, and the text they mean.

    decode("café".encode("latin-1"), "text/html; charset=latin-1")   # "café"

The same bytes and content type always give the same text, and every text can be stored as UTF-8.
"""

import codecs
import re

from resiliparse.parse.encoding import detect_encoding, map_encoding_to_html5

HEAD_BYTES = 4096
"""Bytes at the start of a page in which it may name its encoding."""
_CHARSET = re.compile(r"charset\s*=\s*[\"']?([A-Za-z0-9_.:-]+)", re.IGNORECASE)
_META = re.compile(rb"<meta\b[^>]{0,300}?\bcharset\s*=\s*[\"']?([A-Za-z0-9_.:-]+)", re.IGNORECASE)
_XML = re.compile(rb"\s*<\?xml\b[^>]{0,200}?\bencoding\s*=\s*[\"']([A-Za-z0-9_.:-]+)")
_BOMS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_UTF8_BYTES = 4


def decode(payload: bytes, content_type: str) -> str:
    """Return the payload as a string; bytes that mean nothing in its encoding become U+FFFD.

    The first that holds decides: a byte order mark; that it is UTF-8 beyond ASCII, be it cut inside
    its last character, which other text practically never is by chance and declarations often get
    wrong; the charset of the content type; ``<meta>`` or XML declaration; detection.
    """
    for mark, unicode_form in _BOMS:
        if payload.startswith(mark):
            return payload[len(mark) :].decode(unicode_form, errors="replace")
    if not payload.isascii():
        try:
            return payload.decode("utf-8")
        except UnicodeDecodeError as error:
            cut = error.reason == "unexpected end of data" and error.start > _UTF8_BYTES
            if cut and not payload[: error.start].isascii():
                return payload.decode("utf-8", errors="replace")
    encoding = _declared(payload, content_type) or detect_encoding(payload) or "utf-8"
    return payload.decode(encoding, errors="replace")


def has_mark(payload: bytes) -> bool:
    """Whether the payload begins with a byte order mark."""
    return payload.startswith(tuple(mark for mark, _ in _BOMS))


def _declared(payload: bytes, content_type: str) -> str | None:
    """Return the codec that header, ``<meta>`` or XML declaration names, if any is known."""
    labels = []
    if (header := _CHARSET.search(content_type)) is not None:
        labels.append(header[1])
    head = payload[:HEAD_BYTES]
    for declaration in (_META.search(head), _XML.match(head)):
        if declaration is not None:
            labels.append(declaration[1].decode("ascii"))
    for label in labels:
        codec: str | None = map_encoding_to_html5(label, fallback_utf8=False)
        if codec is not None and (b"\0" in head or not codec.startswith("utf-16")):
            return codec
    return None
