"""A real crawl from the documentation on this machine: WARC files without the network.

Three sources: the standard library, the installed packages and their licences. Natural duplicates
come with them (vendored copies, inherited docstrings, the same licence many times), and some pages
are crawled twice under another spelling of their address. The bytes depend only on what is
installed and on the arguments: no clock, no randomness, no trace of the number of workers.

    llmtrain-data sample out=demo/crawl
"""

import hashlib
import json
import logging
import multiprocessing
import os
import platform
import re
import sysconfig
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from importlib import metadata
from pathlib import Path

from tqdm import tqdm

from data_pipeline.read.warc_writer import WarcFile
from data_pipeline.sample.pages import Page, module_pages, render, text_page
from llmtrain.errors import DataError

logger = logging.getLogger(__name__)

SITE = "https://docs.example"
_VERSION = 1  # raise it whenever the bytes change, so that finished samples are made anew
_NUM_FILES = {"stdlib": 2, "packages": 12, "licenses": 1}
_PAGE_SHARE = {"stdlib": 0.12, "packages": 0.82, "licenses": 0.06}
_MODULES_PER_PACKAGE = 110
_SYSTEM_LICENCES = 200
_LICENCE_BYTES = 60_000
_MODULE_BYTES = 1 << 20
_MINIMUM_DOC_BYTES = 400
_MINIMUM_DOC_SHARE = 0.12
_EPOCH = datetime(2025, 1, 1, tzinfo=UTC)
_CRAWL_DAYS = 60
_RECRAWL_ONE_IN = 25
_NO_PROSE = {
    "test", "tests", "testing", "_testing", "idlelib", "lib2to3", "site-packages",
    "dist-packages", "__pycache__", "ensurepip", "turtledemo", "benchmarks",
}  # fmt: skip
_DOCSTRING = re.compile(rb'"""(.*?)"""', re.DOTALL)
_LICENCE = re.compile(r"(licen[cs]e|copying|notice|authors)[^/]*$", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleSummary:
    """What a sample crawl holds."""

    pages: dict[str, int]
    """Pages per source, second crawls included."""
    html_bytes: int
    """Bytes of HTML before compression."""
    files: dict[str, int]
    """WARC file, relative to the folder -> bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Item:
    """Something that becomes pages: a module's file, or a text with a title."""

    name: str
    prefix: str
    path: str = ""
    text: str = ""
    weight: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class _Task:
    """One WARC file to write."""

    path: str
    items: tuple[_Item, ...]
    pages: int


def make_sample(
    out: Path,
    pages: int | None = None,
    packages: Sequence[str] | None = None,
    workers: int | None = None,
    system_docs: Path = Path("/usr/share"),
) -> SampleSummary:
    """Write ``out/{stdlib,packages,licenses}/*.warc.gz``; a finished sample is left as it is.

    Args:
        out: Folder to write to.
        pages: About how many pages at most; None takes all (about 6,000).
        packages: Installed distributions to read; None takes those of ``requirements.lock``, in its
            order, or all by name where there is no lock.
        workers: Processes; None takes the cores this process may use. Never changes the bytes.
        system_docs: Folder with Debian's ``common-licenses`` and ``doc/*/copyright``.

    Raises:
        DataError: A named package is not installed.
    """
    workers = workers or _num_cores()
    names = _package_names() if packages is None else list(packages)
    settings = {
        "version": _VERSION,
        "python": platform.python_version(),
        "pages": pages,
        "packages": [f"{name}=={_distribution(name).version}" for name in names],
    }
    if (finished := _finished(out, settings)) is not None:
        logger.info("%s is complete: %d pages", out, sum(finished.pages.values()))
        return finished
    (out / "sample.json").unlink(missing_ok=True)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        packages_read = pool.map(_package_items, names)
        items = {
            "stdlib": _stdlib(),
            "packages": [item for found in packages_read for item in found],
            "licenses": _licences(names, system_docs),
        }
        tasks = [task for source in items for task in _tasks(out, source, items[source], pages)]
        written = pool.map(_write_warc, tasks)
        results = list(tqdm(written, total=len(tasks), desc="crawl", unit="file", disable=None))
    summary = _summary(out, tasks, results)
    record = json.dumps({"settings": settings, "summary": asdict(summary)}, indent=1)
    partial = out / "sample.json.partial"
    partial.write_text(record)
    partial.replace(out / "sample.json")
    num_pages = sum(summary.pages.values())
    logger.info("%s: %d pages, %.1f MB of HTML", out, num_pages, summary.html_bytes / 1e6)
    return summary


def _num_cores() -> int:
    """Return the cores this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux alone has it
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _summary(
    out: Path, tasks: Sequence[_Task], results: Sequence[tuple[int, int]]
) -> SampleSummary:
    """Add up what the tasks wrote."""
    pages = dict.fromkeys(_NUM_FILES, 0)
    files = {}
    for task, (num_pages, _) in zip(tasks, results, strict=True):
        path = Path(task.path)
        pages[path.parent.name] += num_pages
        files[str(path.relative_to(out))] = path.stat().st_size
    return SampleSummary(pages=pages, html_bytes=sum(size for _, size in results), files=files)


def _finished(out: Path, settings: dict[str, object]) -> SampleSummary | None:
    """Return the summary of a complete sample made with the same settings."""
    try:
        record = json.loads((out / "sample.json").read_bytes())
        summary = SampleSummary(**record["summary"])
        whole = all((out / file).stat().st_size == size for file, size in summary.files.items())
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return summary if whole and record["settings"] == settings else None


# What there is to read -------------------------------------------------------------------------


def _package_names() -> list[str]:
    """Return the locked packages that are installed, in lock order, or all installed by name."""
    installed = {_canonical(d.name): d.name for d in metadata.distributions() if d.name}
    lock = Path(__file__).parents[2] / "requirements.lock"
    if not lock.is_file():
        return [installed[key] for key in sorted(installed)]
    locked = (_canonical(line.split("==")[0]) for line in lock.read_text().splitlines())
    return [installed[key] for key in locked if key in installed]


def _canonical(name: str) -> str:
    """Return the name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def _distribution(name: str) -> metadata.Distribution:
    """Return an installed distribution."""
    try:
        return metadata.distribution(name)
    except metadata.PackageNotFoundError:
        raise DataError(
            f"package {name!r} is not installed; name installed packages or leave packages unset"
        ) from None


def _stdlib() -> list[_Item]:
    """Return the modules of the standard library."""
    root = Path(sysconfig.get_path("stdlib"))
    prefix = f"{SITE}/python/{'.'.join(platform.python_version_tuple()[:2])}"
    paths = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = set(subfolders) - _NO_PROSE
        paths += [Path(folder, file).relative_to(root) for file in files if file.endswith(".py")]
    return list(_modules(root, sorted(paths), prefix))


def _package_items(name: str) -> list[_Item]:
    """Return a package's description and its best documented modules, in name order."""
    distribution = _distribution(name)
    prefix = f"{SITE}/packages/{_canonical(name)}"
    root = Path(str(distribution.locate_file("")))
    paths = sorted(Path(str(file)) for file in distribution.files or () if file.suffix == ".py")
    modules = sorted(_modules(root, paths, prefix), key=lambda item: (-item.weight, item.name))
    modules = sorted(modules[:_MODULES_PER_PACKAGE], key=lambda item: item.name)
    text = distribution.metadata.json.get("description", "")
    description = [_Item(name=distribution.name, prefix=prefix, text=str(text), weight=len(text))]
    return [*(description if text else ()), *modules]


def _modules(root: Path, paths: Sequence[Path], prefix: str) -> Iterator[_Item]:
    """Yield the files that hold documentation; its bytes are the weight."""
    for path in paths:
        if ".." in path.parts or any(
            part in _NO_PROSE or part.startswith(("test_", "config-")) for part in path.parts
        ):
            continue
        try:
            source = (root / path).read_bytes()
        except OSError:
            continue  # listed by the package but deleted since
        weight = sum(len(match[1]) for match in _DOCSTRING.finditer(source))
        if "pydoc_data" in path.parts:
            weight = len(source)
        if (
            weight >= max(_MINIMUM_DOC_BYTES, _MINIMUM_DOC_SHARE * len(source))
            and len(source) <= _MODULE_BYTES
        ):
            module = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
            yield _Item(name=module, prefix=prefix, path=str(root / path), weight=weight)


def _licences(names: Sequence[str], system_docs: Path) -> list[_Item]:
    """Return the licence texts of the packages and of the operating system."""
    found: list[tuple[str, Path]] = []
    for name in names:
        distribution = _distribution(name)
        for file in distribution.files or ():
            if _LICENCE.search(file.name) and file.suffix not in (".py", ".pyc"):
                url = f"{SITE}/licenses/{_canonical(name)}/{'/'.join(file.parts[1:])}"
                found.append((url, Path(str(distribution.locate_file(file)))))
    for path in sorted(system_docs.glob("common-licenses/*")):
        found.append((f"{SITE}/licenses/common/{path.name}", path))
    for path in sorted(system_docs.glob("doc/*/copyright"))[:_SYSTEM_LICENCES]:
        found.append((f"{SITE}/licenses/debian/{path.parent.name}", path))
    items = []
    for url, path in found:
        if path.is_file() and path.stat().st_size <= _LICENCE_BYTES:
            text = path.read_text(encoding="utf-8", errors="replace")
            title = " ".join(url.split("/")[4:])
            items.append(_Item(name=title, prefix=url, text=text, weight=len(text)))
    return items


# Writing -----------------------------------------------------------------------------------------


def _tasks(out: Path, source: str, items: list[_Item], pages: int | None) -> Iterator[_Task]:
    """Split a source's items into neighbouring groups of about equal weight, one per file."""
    num_files = _NUM_FILES[source]
    share = 1 << 30 if pages is None else max(1, round(pages * _PAGE_SHARE[source] / num_files))
    total = sum(item.weight for item in items)
    groups: list[list[_Item]] = [[] for _ in range(num_files)]
    seen = 0
    for item in items:
        groups[min(num_files - 1, seen * num_files // max(1, total))].append(item)
        seen += item.weight
    for index, group in enumerate(groups):
        path = out / source / f"crawl-{index:05d}.warc.gz"
        yield _Task(path=str(path), items=tuple(group[:share]), pages=share)


def _write_warc(task: _Task) -> tuple[int, int]:
    """Write one WARC file, return its pages and their bytes of HTML."""
    pages: list[Page] = []
    for item in task.items:
        if item.text:
            pages.append(text_page(item.text, item.name, item.prefix))
        else:
            pages.extend(module_pages(Path(item.path).read_bytes(), item.name, item.prefix))
    pages = pages[: task.pages]
    path = Path(task.path)
    name = "/".join(path.parts[-2:])
    num_pages = html_bytes = 0
    with WarcFile(path, _EPOCH, software="llmtrain-data sample") as warc:
        robots = b"User-agent: *\nAllow: /\n"
        warc.response(f"{SITE}/robots.txt", _date(name), robots, "text/plain")
        missing = b"<html><title>Not found</title><p>There is no such page here, sorry.</p></html>"
        warc.response(f"{SITE}/missing/{name}", _date(name), missing, status="404 Not Found")
        for page in pages:
            payload = render(page, pages)
            for url, date in _visits(page.url):
                warc.response(url, date, payload)
                num_pages += 1
                html_bytes += len(payload)
    return num_pages, html_bytes


def _draw(key: str) -> int:
    """Return a large number that looks random and depends on the key alone."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")


def _date(url: str) -> datetime:
    """Return when the crawler came by."""
    return _EPOCH + timedelta(seconds=_draw(url) % (_CRAWL_DAYS * 86400))


def _visits(url: str) -> Iterator[tuple[str, datetime]]:
    """Yield when a page was crawled; one in 25 again later, by another spelling of its address."""
    yield url, _date(url)
    if _draw(url) % _RECRAWL_ONE_IN == 0:
        again = url.replace("https://", "https://www.") + "?utm_source=newsletter"
        yield again, _date(url) + timedelta(days=_CRAWL_DAYS)
