"""A benchmark corpus of real text in many languages, as a crawl in WARC files.

The pages are the HTML of Debian's documentation packages, fetched with ``apt-get download`` and
unpacked without installing. The text stays outside the repository. Packages become files one by
one, so the command goes on where it stopped; corpus.json, written last, tells what there is.

    python benchmarks/corpus.py out=/data/corpus
    python benchmarks/corpus.py out=/data/corpus packages=git-doc,debian-handbook workers=4
"""

import gzip
import hashlib
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import quote

from resiliparse.extract.html2text import extract_plain_text
from resiliparse.parse.encoding import detect_encoding

from data_pipeline.read.warc_writer import WarcFile
from llmtrain.errors import ConfigError, DataError

SITE = "https://docs.example/debian"
FILE_BYTES = 64 << 20
"""HTML in one WARC file, so that several workers share a large package."""
EPOCH = datetime(2025, 1, 1, tzinfo=UTC)

TECHNICAL = """
    linux-doc-6.1 rust-doc openjdk-17-doc python3.11-doc libboost1.74-doc postgresql-doc-15
    python-django-doc git-doc sqlite3-doc debian-policy
""".split()  # noqa: SIM905
MANUALS = """
    debian-handbook installation-guide-amd64 developers-reference debian-reference-de
    debian-reference-en debian-reference-es debian-reference-fr debian-reference-it
    debian-reference-ja debian-reference-pt
""".split()  # noqa: SIM905
LIBREOFFICE = "cs de el es fr hu it ja ko nl pl pt-br ru sv tr vi zh-cn".split()  # noqa: SIM905
GIMP = "de en es fr it ko nl ru sv".split()  # noqa: SIM905
PACKAGES = [
    *TECHNICAL,
    *MANUALS,
    *(f"libreoffice-help-{language}" for language in LIBREOFFICE),
    *(f"gimp-help-{language}" for language in GIMP),
]


@dataclass(frozen=True, kw_only=True)
class PackageSummary:
    """What one package gave."""

    package: str
    version: str
    pages: int
    html_bytes: int
    text_bytes: int
    files: list[str]
    seconds: float


def main(arguments: list[str]) -> int:
    """Make the corpus and print what it holds."""
    options = dict(argument.partition("=")[::2] for argument in arguments)
    unknown = set(options) - {"out", "packages", "workers"}
    if unknown or "out" not in options:
        raise ConfigError(f"found {sorted(options)}, expected out=DIR [packages=A,B] [workers=N]")
    out = Path(options["out"]).resolve()
    if Path(__file__).resolve().parents[1] in out.parents:
        raise ConfigError(f"out={out} lies in the repository; choose a folder outside of it")
    names = options["packages"].split(",") if "packages" in options else PACKAGES
    workers = int(options.get("workers", len(os.sched_getaffinity(0))))
    out.mkdir(parents=True, exist_ok=True)
    debs = fetch(names, out / "debs")
    summaries = []
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        for summary in pool.map(convert, debs, [out] * len(debs)):
            summaries.append(summary)
            print(
                f"{summary.package:<28}{summary.pages:>8,} pages{summary.html_bytes / 1e6:>9.1f} MB"
                f" of HTML{summary.text_bytes / 1e6:>8.1f} MB of text{summary.seconds:>7.1f} s",
                flush=True,
            )
    pages, html, text = (
        sum(getattr(summary, field) for summary in summaries)
        for field in ("pages", "html_bytes", "text_bytes")
    )
    content = {"text_bytes": text, "packages": [asdict(summary) for summary in summaries]}
    (out / "corpus.json").write_text(json.dumps(content, indent=1))
    print(f"{out}: {pages:,} pages, {html / 1e6:.1f} MB of HTML, {text / 1e6:.1f} MB of text")
    return 0


def fetch(names: list[str], folder: Path) -> list[Path]:
    """Download the packages that are not there yet."""
    folder.mkdir(exist_ok=True)
    missing = [name for name in names if not list(folder.glob(f"{name}_*.deb"))]
    if missing:
        command = ["apt-get", "download", "-qq", "-o", "APT::Sandbox::User=root", *missing]
        result = subprocess.run(command, cwd=folder, check=False, stderr=subprocess.PIPE, text=True)
        if result.returncode:
            said = "; ".join(result.stderr.strip().splitlines())
            raise DataError(f"apt-get download failed ({said}); choose others with packages=A,B")
    return [max(folder.glob(f"{name}_*.deb")) for name in names]


def convert(deb: Path, out: Path) -> PackageSummary:
    """Turn a package into WARC files of at most FILE_BYTES of HTML; a finished one is kept."""
    package, version = deb.name.split("_")[:2]
    done = out / "packages" / f"{package}.json"
    if done.is_file():
        return PackageSummary(**json.loads(done.read_text()))
    started = time.monotonic()
    pages = html_bytes = text_bytes = 0
    files: list[str] = []
    with tempfile.TemporaryDirectory(dir=out) as unpacked:
        subprocess.run(["dpkg", "-x", str(deb), unpacked], check=True)
        for number, group in enumerate(_groups(_pages(Path(unpacked)))):
            path = out / "warc" / f"{package}-{number:05d}.warc.gz"
            files.append(str(path.relative_to(out)))
            with WarcFile(path, EPOCH, software="llmtrain benchmarks/corpus.py") as warc:
                for name, payload in group:
                    url = f"{SITE}/{package}/{quote(name)}"
                    warc.response(url, _date(url), payload, "text/html")
                    pages += 1
                    html_bytes += len(payload)
                    text_bytes += len(_text(payload).encode())
    if not pages:
        raise DataError(f"{deb} holds no HTML page; leave {package} out")
    summary = PackageSummary(
        package=package,
        version=version,
        pages=pages,
        html_bytes=html_bytes,
        text_bytes=text_bytes,
        files=files,
        seconds=round(time.monotonic() - started, 1),
    )
    done.parent.mkdir(exist_ok=True)
    done.write_text(json.dumps(asdict(summary)))
    return summary


def _pages(root: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the HTML files below ``root``, unzipped, under the path a server would give them."""
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root)).removesuffix(".gz")
        if (
            path.is_symlink()
            or not path.is_file()
            or not name.endswith((".html", ".htm", ".xhtml"))
        ):
            continue
        payload = path.read_bytes()
        yield name, gzip.decompress(payload) if path.suffix == ".gz" else payload


def _groups(pages: Iterator[tuple[str, bytes]]) -> Iterator[list[tuple[str, bytes]]]:
    """Cut a stream of pages into groups of about FILE_BYTES."""
    group: list[tuple[str, bytes]] = []
    size = 0
    for name, payload in pages:
        group.append((name, payload))
        size += len(payload)
        if size >= FILE_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _date(url: str) -> datetime:
    """Return a time of crawl that depends on the address alone."""
    draw = int.from_bytes(hashlib.sha256(url.encode()).digest()[:8], "big")
    return EPOCH + timedelta(seconds=draw % (90 * 86400))


def _text(payload: bytes) -> str:
    """Return the main text, to say how much of it there is."""
    html = payload.decode(detect_encoding(payload) or "utf-8", "replace")
    return str(extract_plain_text(html, main_content=True))


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (ConfigError, DataError) as error:
        sys.exit(f"error: {error}")
