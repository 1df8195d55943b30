"""A small crawl with everything the pipeline has rules for; the same bytes on every call."""

import io
import random
from pathlib import Path

from warcio.statusandheaders import StatusAndHeaders
from warcio.warcwriter import WARCWriter

SUBJECTS = ("The farmer", "A young teacher", "The old captain", "My neighbour", "The museum",
            "Her brother", "The committee", "An engineer", "The doctor", "Our guide")  # fmt: skip
VERBS = ("described", "remembered", "repaired", "discovered", "carried", "painted", "measured",
         "defended", "explained", "collected", "followed", "ignored")  # fmt: skip
OBJECTS = ("the wooden bridge", "several letters", "a broken clock", "the winter harvest",
           "an unusual map", "the northern road", "three small boats", "the town's archive",
           "a long argument", "the quiet garden", "some forgotten songs")  # fmt: skip
ENDS = ("before the rain began.", "while the others slept.", "with great patience.",
        "because nobody else would.", "after the meeting ended.", "in the early morning light.",
        "without a single complaint.", "for more than twenty years.")  # fmt: skip
GERMAN = ("Der alte Bauer erinnerte sich an die lange Reise durch das verschneite Gebirge.",
          "Seine Schwester wollte am nächsten Morgen mit dem Zug in die Stadt fahren.",
          "Niemand wusste genau, warum die Brücke über den Fluss gesperrt worden war.",
          "Im Herbst sammelten die Kinder Kastanien unter den hohen Bäumen am Markt.")  # fmt: skip


def sentence(rng: random.Random) -> str:
    """One English sentence that is most likely unique."""
    where = f"near house {rng.randrange(9999)}"
    parts = map(rng.choice, (SUBJECTS, VERBS, OBJECTS, (where,), ENDS))
    return " ".join(parts)


def page(rng: random.Random, paragraphs: list[str]) -> str:
    """A page with navigation around its paragraphs."""
    body = "".join(f"<p>{p}</p>\n" for p in paragraphs)
    return (
        "<!DOCTYPE html><html><head><title>Stories</title></head><body>"
        "<nav><a href='/'>Home</a> <a href='/about'>About</a></nav>"
        f"<main><h1>Story {rng.randrange(10**6)}</h1>\n{body}</main>"
        "<footer>Terms of use and the rest of it.</footer></body></html>"
    )


def paragraphs_of(rng: random.Random) -> list[str]:
    """Between three and seven paragraphs, some lines of which the rules delete."""
    found = [
        " ".join(sentence(rng) for _ in range(rng.randint(1, 3))) for _ in range(rng.randint(3, 7))
    ]
    if rng.random() < 0.4:
        found.insert(rng.randrange(len(found)), "Read more about this")
    if rng.random() < 0.3:
        found.append("We use cookies to make this site work for every reader.")
    if rng.random() < 0.3:
        found[0] = found[0].replace(" near", "[12] near", 1)
    return found


def pages(seed: int, number: int) -> list[tuple[str, str, str, str]]:
    """(url, date, status, html) of every page, duplicates of several kinds included."""
    rng = random.Random(seed)
    result: list[tuple[str, str, str, str]] = []
    kept: list[list[str]] = []
    for i in range(number):
        url, status = f"https://www.example.org/{seed}/{i}", "200 OK"
        date = f"2026-01-{1 + i % 28:02d}T00:00:00Z"
        kind = rng.random()
        content = paragraphs_of(rng)
        if kept and kind < 0.05:
            content = list(rng.choice(kept))  # the same page at another address
        elif kept and kind < 0.12:
            digits = str.maketrans("0123456789", "5678901234")  # another line, the same shingles
            content = [line.translate(digits) for line in rng.choice(kept)]
        elif result and kind < 0.18:
            url = rng.choice(result)[0].replace("https://www.", "http://") + "/?utm_source=feed"
        elif kind < 0.22:
            content = list(GERMAN)
        elif kind < 0.26:
            content = [sentence(rng)]
        elif kind < 0.30:
            content.append("function call() { return every value that was found here.")
        elif kind < 0.33:
            status = "404 Not Found"
        if rng.random() < 0.5:
            content.append("All stories were read aloud on the radio by their own authors.")
        kept.append(content)
        result.append((url, date, status, page(rng, content)))
    return result


def write_warc(path: Path, seed: int, number: int, *, gzip: bool = True) -> int:
    """Write a WARC with a warcinfo record and ``number`` pages; returns the number of pages."""
    buffer = io.BytesIO()
    writer = WARCWriter(buffer, gzip=gzip)
    info = writer.create_warcinfo_record(path.name, {"software": "test"})
    info.rec_headers.replace_header("WARC-Record-ID", f"<urn:test:{seed}:info>")
    info.rec_headers.replace_header("WARC-Date", "2026-01-01T00:00:00Z")
    writer.write_record(info)
    for i, (url, date, status, html) in enumerate(pages(seed, number)):
        headers = StatusAndHeaders(
            status, [("Content-Type", "text/html; charset=utf-8")], protocol="HTTP/1.1"
        )
        body = html.encode()
        record = writer.create_warc_record(
            url, "response", payload=io.BytesIO(body), length=len(body), http_headers=headers,
            warc_headers_dict={"WARC-Date": date, "WARC-Record-ID": f"<urn:test:{seed}:{i}>"},
        )  # fmt: skip
        writer.write_record(record)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(buffer.getvalue())
    return number


def write_crawl(folder: Path, pages_per_file: int = 60) -> dict[str, str]:
    """Write two sources of two files each; returns the inputs of a pipeline."""
    for source, first in (("north", 0), ("south", 10)):
        for i in range(2):
            write_warc(folder / source / f"crawl-{i:05d}.warc.gz", first + i, pages_per_file)
    return {source: str(folder / source) for source in ("north", "south")}
