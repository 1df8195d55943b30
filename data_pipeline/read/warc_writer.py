"""Writing WARC files whose bytes depend on their content alone.

One gzip member per record, no time of writing, and record ids that derive from address and date.
The file appears under its name only when it is whole.

    with WarcFile(Path("crawl/a.warc.gz"), date, software="my crawler") as warc:
        warc.response("https://docs.example/", date, b"<p>Hello.</p>")
"""

import io
import os
import uuid
from contextlib import AbstractContextManager
from datetime import datetime
from pathlib import Path
from types import TracebackType

from warcio.statusandheaders import StatusAndHeaders
from warcio.warcwriter import WARCWriter


class WarcFile(AbstractContextManager["WarcFile"]):
    """A WARC file under construction, with a ``warcinfo`` record at its start."""

    def __init__(self, path: Path, date: datetime, software: str) -> None:
        """Write to ``path``, whose last two parts name the file in its first record."""
        self._path = path
        self._partial = path.with_name(path.name + ".partial")
        self._date = date
        self._software = software

    def __enter__(self) -> "WarcFile":
        """Open the file beside its final name."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._partial.open("wb")
        self._writer = WARCWriter(self._file, gzip=True)
        info = f"software: {self._software}\r\nformat: WARC File Format 1.0\r\n".encode()
        name = "/".join(self._path.parts[-2:])
        self._record("warcinfo", f"urn:file:{name}", self._date, info, "application/warc-fields")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Give the file its name, or remove it after an error."""
        with self._file:
            self._file.flush()
            os.fsync(self._file.fileno())
        if error is None:
            self._partial.replace(self._path)
        else:
            self._partial.unlink()

    def response(
        self,
        url: str,
        date: datetime,
        payload: bytes,
        content_type: str = "text/html; charset=utf-8",
        status: str = "200 OK",
    ) -> None:
        """Append what a server answered to a request for ``url``."""
        headers = [
            ("Content-Type", content_type),
            ("Content-Length", str(len(payload))),
            ("Date", date.strftime("%a, %d %b %Y %H:%M:%S GMT")),
            ("Server", "docs"),
        ]
        http = StatusAndHeaders(status, headers, protocol="HTTP/1.1")
        self._record("response", url, date, payload, "application/http; msgtype=response", http)

    def _record(
        self,
        kind: str,
        url: str,
        date: datetime,
        payload: bytes,
        content_type: str,
        http: StatusAndHeaders | None = None,
    ) -> None:
        stamp = date.strftime("%Y-%m-%dT%H:%M:%SZ")
        headers = {
            "WARC-Record-ID": f"<urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, f'{url} {stamp}')}>",
            "WARC-Date": stamp,
        }
        record = self._writer.create_warc_record(
            url,
            kind,
            payload=io.BytesIO(payload),
            length=len(payload),
            warc_content_type=content_type,
            http_headers=http,
            warc_headers_dict=headers,
        )
        self._writer.write_record(record)
