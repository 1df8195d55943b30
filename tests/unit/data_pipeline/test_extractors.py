"""trafilatura in its process, and the union of both extractors."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

from data_pipeline.config.extract import ExtractConfig, ExtractorName, TrafilaturaConfig
from data_pipeline.read.extract import Extracted, Resiliparse, payload_text
from data_pipeline.read.extractors import Union, page_extractor, union_of
from data_pipeline.read.trafilatura_process import TrafilaturaProcess

PARAGRAPHS = "".join(
    f"<p>This is paragraph number {i}, which is long enough to be taken for content.</p>"
    for i in range(6)
)
PAGE = f"<html><head><title>T</title></head><body><article>{PARAGRAPHS}</article></body></html>"


@pytest.fixture(scope="module")
def trafilatura() -> Iterator[TrafilaturaProcess]:
    with TrafilaturaProcess(TrafilaturaConfig()) as process:
        yield process


def text_of(process: TrafilaturaProcess) -> str:
    text = process.text_of(PAGE)
    assert isinstance(text, str)
    return text


def test_the_text_is_what_trafilatura_gives_in_this_process(
    trafilatura: TrafilaturaProcess,
) -> None:
    from trafilatura import extract

    expected = extract(PAGE, include_comments=False, include_formatting=False)
    assert text_of(trafilatura) == expected
    assert "paragraph number 5" in text_of(trafilatura)
    extracted = payload_text(PAGE.encode(), "text/html", extractor=trafilatura)
    assert isinstance(extracted, Extracted)
    assert extracted.extractor.name == "trafilatura"
    assert extracted.metadata == {"title": "T"}


def test_a_child_that_is_killed_is_started_again(trafilatura: TrafilaturaProcess) -> None:
    before = text_of(trafilatura)
    first = trafilatura.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    assert text_of(trafilatura) == before
    assert trafilatura.pid != first


def test_the_child_ends_with_the_context() -> None:
    with TrafilaturaProcess(TrafilaturaConfig()) as process:
        text_of(process)
        child = process.pid
        assert child is not None
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


def test_the_child_ends_with_its_parent() -> None:
    script = (
        "import os, sys\n"
        "from data_pipeline.config.extract import TrafilaturaConfig\n"
        "from data_pipeline.read.trafilatura_process import TrafilaturaProcess\n"
        "process = TrafilaturaProcess(TrafilaturaConfig())\n"
        "process.text_of('<p>x</p>')\n"
        "print(process.pid, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=root, stdout=subprocess.PIPE, check=False
    )
    child = int(done.stdout)
    # A pipe that is closed ends it; nothing else has to be waited for.
    for _ in range(500):
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            break
        if Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            break
        time.sleep(0.01)
    else:
        pytest.fail(f"{child} is still alive")


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("a b\nc d", "a b\nc d", "a b\nc d"),
        ("one\nthree", "one\ntwo\nthree", "one\ntwo\nthree"),
        ("one\ntwo", "zero\none", "zero\none\ntwo"),
        ("one", "one\ntwo\nthree", "one\ntwo\nthree"),
        ("  1. one, two", "- One\n- TWO!\n- four", "  1. one, two\n- four"),
        ("one\n\ntwo", "onetwo", "one\n\ntwo"),
        (" ", "only\nthese", "only\nthese"),
        ("only these", "", "only these"),
    ],
)
def test_union_takes_lines_the_first_does_not_have(first: str, second: str, expected: str) -> None:
    assert union_of(first, second) == expected
    assert union_of(union_of(first, second), second) == union_of(first, second)


def test_union_names_both_and_has_the_lines_of_both(trafilatura: TrafilaturaProcess) -> None:
    both = Union(Resiliparse(), trafilatura)
    extracted = payload_text(PAGE.encode(), "text/html", extractor=both)
    assert isinstance(extracted, Extracted)
    assert extracted.extractor.name == "union"
    assert extracted.extractor.version.startswith("resiliparse ")
    assert ", trafilatura " in extracted.extractor.version
    for i in range(6):
        assert extracted.text.count(f"paragraph number {i}") == 1


def test_the_configuration_chooses() -> None:
    chosen = {"resiliparse": Resiliparse, "trafilatura": TrafilaturaProcess, "union": Union}
    for name in get_args(ExtractorName):
        with page_extractor(ExtractConfig(extractor=name)) as extractor:
            assert isinstance(extractor, chosen[name])
