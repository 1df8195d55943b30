import gzip
import hashlib
import io

import pytest
from fastwarc.warc import ArchiveIterator, WarcRecordType

from data_pipeline.sample.crawl import make_sample
from data_pipeline.sample.markup import to_html
from data_pipeline.sample.pages import Page, module_pages, render, text_page
from llmtrain.errors import DataError

MODULE = b'''
"""Queues that several threads may share, with a choice of order.

The order is first in, first out unless the caller asks for a heap or for a stack; every queue
blocks when it is full.
"""
import this_module_does_not_exist
raise RuntimeError("a crawl never runs what it reads")

class Queue(Base):
    """A queue of items.

    %s
    """
    def put(self, item, block: bool = True):
        """Put an item into the queue."""

def add_docs(f, text): ...
add_docs("Queue.get", r"""get(block) -> item

Remove and return an item. The call waits for an item to come when the queue is empty, unless the
caller says otherwise; then it raises Empty at once. %s
""")
''' % (b"Long prose about queues. " * 80, b"More. " * 20)


@pytest.fixture(scope="module")
def crawl(tmp_path_factory):
    out = tmp_path_factory.mktemp("crawl")
    docs = out / "share"
    licences = docs / "common-licenses"
    licences.mkdir(parents=True)
    (licences / "BSD").write_text("Redistribution is permitted.\nThe rest is not. " * 20)
    summary = make_sample(out / "a", pages=40, packages=["tqdm"], workers=2, system_docs=docs)
    return out, docs, summary


def digest(folder):
    files = sorted(folder.glob("*/*.warc.gz"))
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]


def responses(folder):
    for file in sorted(folder.glob("*/*.warc.gz")):
        stream = io.BytesIO(file.read_bytes())
        yield from (
            (record.headers, record.http_headers, record.reader.read())
            for record in ArchiveIterator(stream, record_types=WarcRecordType.response)
        )


def test_three_sources_of_real_pages(crawl):
    out, _, summary = crawl
    assert set(summary.pages) == {"stdlib", "packages", "licenses"}
    assert all(count > 0 for count in summary.pages.values())
    pages = [(h, body) for h, http, body in responses(out / "a") if http.status_code == 200]
    urls = [h["WARC-Target-URI"] for h, _ in pages]
    assert "https://docs.example/packages/tqdm" in urls
    assert "https://docs.example/licenses/common/BSD" in urls
    assert len({h["WARC-Record-ID"] for h, _ in pages}) == len(pages)
    html = [body for _, body in pages if b"<nav" in body]
    assert len(html) == sum(summary.pages.values())
    assert sum(map(len, html)) == summary.html_bytes


def test_one_gzip_member_per_record_without_a_time(crawl):
    out, _, summary = crawl
    data = (out / "a" / next(iter(summary.files))).read_bytes()
    starts = data.count(b"\x1f\x8b\x08\x00\x00\x00\x00\x00")
    assert starts >= gzip.decompress(data).count(b"WARC/1.0\r\n") > 3


def test_bytes_do_not_depend_on_workers_and_a_finished_sample_stays(crawl):
    out, docs, summary = crawl
    again = make_sample(out / "b", pages=40, packages=["tqdm"], workers=1, system_docs=docs)
    assert digest(out / "a") == digest(out / "b")
    assert again == summary
    before = (out / "b" / "sample.json").stat().st_mtime_ns
    assert make_sample(out / "b", pages=40, packages=["tqdm"], system_docs=docs) == summary
    assert (out / "b" / "sample.json").stat().st_mtime_ns == before


def test_unknown_package_is_one_sentence(tmp_path):
    with pytest.raises(DataError, match="package 'no-such-thing' is not installed"):
        make_sample(tmp_path, packages=["no-such-thing"])


def test_module_pages_split_long_members_and_run_nothing():
    pages = {page.title: page for page in module_pages(MODULE, "queue", "https://x/q")}
    assert set(pages) == {"queue", "queue.Queue"}
    main = pages["queue"]
    assert main.url == "https://x/q/queue"
    assert '<a href="https://x/q/queue/Queue">Queue</a>' in main.body
    assert "Remove and return an item." in main.body
    assert "class Queue(Base)" in pages["queue.Queue"].body
    assert "put(self, item, block: bool=True)" in pages["queue.Queue"].body


@pytest.mark.parametrize("source", [b"def f(:", b"\x00", b'"""Short."""'])
def test_modules_without_pages(source):
    assert module_pages(source, "m", "https://x") == []


def test_navigation_surrounds_the_article():
    pages = [Page(url=f"https://x/{i}", title=f"T{i}", body="<p>Body.</p>") for i in range(99)]
    html = render(pages[50], pages).decode()
    assert html.count('<li><a class="reference') == 24
    assert 'href="https://x/50"' in html
    assert html.index("<main>") < html.index("<p>Body.</p>") < html.index("</main>")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Two lines\nof one paragraph.", "<p>Two lines of one paragraph.</p>"),
        ("A.\n\n>>> f(1)\n2\n\nB.", "<p>A.</p>\n<pre>&gt;&gt;&gt; f(1)\n2</pre>\n<p>B.</p>"),
        ("Call::\n\n    f(x)", "<p>Call:</p>\n<pre>f(x)</pre>"),
        ("Title\n-----\nText.", "<h3>Title</h3>\n<p>Text.</p>"),
        ("- a\n  b\n- c", "<ul><li><p>a b</p></li><li><p>c</p></li></ul>"),
        ("x : int\n    The x.", "<dl><dt>x : int</dt><dd><p>The x.</p></dd></dl>"),
        (":param x: The x.", "<dl><dt><code>param x</code></dt><dd><p>The x.</p></dd></dl>"),
        ("===  ==\na    b\n===  ==", "<pre>===  ==\na    b\n===  ==</pre>"),
        ("See :func:`~a.b.c` [1]_.", '<p>See <code class="xref">c</code> '
         '<a class="footnote" href="#note-1">[1]</a>.</p>'),
        (":math:`x_{i}^2` is *so* **big**.", '<p><span class="math">x<sub>i</sub><sup>2</sup>'
         "</span> is <em>so</em> <strong>big</strong>.</p>"),
        ("[label](http://a.b) & <tag>", '<p><a href="http://a.b">label</a> &amp; &lt;tag&gt;</p>'),
        ("```py\nx = {}\n```\nEnd.", "<pre>x = {}</pre>\n<p>End.</p>"),
        (".. note:: Mind it.", '<div class="admonition note"><p>Mind it.</p></div>'),
    ],
)  # fmt: skip
def test_markup(text, expected):
    assert to_html(text) == expected


def test_descriptions_lose_their_tags():
    page = text_page("# T\n<img src='x'>\nHello, world.", "demo", "https://x")
    assert page.body == "<h1>demo</h1>\n<h3>T</h3>\n<p>Hello, world.</p>"
